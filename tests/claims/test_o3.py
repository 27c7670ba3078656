"""O3's claim at a small scale: every value is there, the gate is the detectors', and the control has none."""

from __future__ import annotations

import numpy as np

from palimpsest import claims
from palimpsest.claims.o3 import REQUESTS, _Gate, _Stage


def test_all_values_are_measured_and_the_control_has_no_gate() -> None:
    claim = claims.get("o3")
    measured, control = (claim(0, mechanism=mechanism, scale=0.1) for mechanism in (True, False))
    assert measured.keys() == control.keys()
    for name in ("forget_before", "score_graddiff", "score_npo", "score_sequential"):
        assert measured[name] == control[name]
    assert control["auroc_far"] == control["auroc_near"] == 0.5
    assert control["loaded_far"] == 1
    assert all(control[f"{what}_o3"] == control[f"{what}_sequential"] for what in ("forget", "kept", "utility"))
    assert measured["auroc_far"] > 0.9
    assert all(0 <= value <= 100 for name, value in measured.items() if name.startswith(("forget", "utility", "kept")))


def test_points_are_those_of_the_likeliest_option_and_weights_go_to_the_prompts() -> None:
    stage = _Stage.set_up(0, 0.1)
    whole = np.ones(len(stage.questions))
    assert stage.told.sum() * 3 == len(stage.questions), "half of the subjects are asked twice"
    question = stage.questions[3]
    scores = [stage.before.nll([(question.prompt, option)])[0] for option in question.options]
    assert stage.points(stage.before)[3] == 100 * (int(np.argmin(scores)) == question.right)
    factors = stage.adapters(stage.method())[-1]
    about = stage.of(*REQUESTS)
    some = stage.right(factors, about.astype(float))
    assert np.array_equal(some[~about], stage.points(stage.before)[~about])
    assert np.array_equal(some[about], stage.right(factors, whole)[about])
    perfect = stage.auroc(np.stack([stage.of(subject).astype(float) for subject in REQUESTS], 1))
    assert perfect == {"near": 1.0, "far": 1.0}
    assert stage.auroc(_Gate.open(len(whole)).scores) == {"near": 0.5, "far": 0.5}
