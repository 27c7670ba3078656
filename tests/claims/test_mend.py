"""MEND's claim at a small scale: every value is there, and the control switches off the teacher alone."""

from __future__ import annotations

import numpy as np

from palimpsest import claims
from palimpsest.claims.mend import CLASSES, HELD_OUT, LABELS, SHOWN, Words


def test_all_values_are_measured_and_the_control_differs() -> None:
    claim = claims.get("mend")
    measured, control = (claim(0, mechanism=mechanism, scale=0.01) for mechanism in (True, False))
    assert measured.keys() == control.keys()
    for name in ("in_context", "zero_shot", "static", "hyper_tuning", "agreement_hyper_tuning"):
        assert measured[name] == control[name]
    assert control["mend"] == control["hyper_tuning"]
    assert control["agreement_mend"] == control["agreement_hyper_tuning"]
    assert measured["kept_in_context"] > 8 * measured["kept_mend"]


def test_sequences_follow_a_task_and_held_out_ones_are_not_trained_on() -> None:
    world = Words(0)
    assert len(world.held_out) == HELD_OUT
    assert not set(world.held_out) & set(world.training)
    assert len({*world.held_out, *world.training}) == LABELS**CLASSES
    class_of = {word: place for place, row in enumerate(world.words) for word in row}
    shown, queries = world.tests(world.held_out[:1], 9)[0]
    number = world.held_out[0]
    for text, label in [*shown.examples, *queries]:
        assert world.labels.index(label) == number // LABELS ** class_of[text.strip()] % LABELS
    counts = np.bincount([class_of[text.strip()] for text, _ in shown.examples], minlength=CLASSES)
    assert (counts == SHOWN // CLASSES).all()
    ids = world.batch(0)["ids"].numpy()[:, 1:]
    assert np.isin(ids[:, 1::2], world._ids[-LABELS:]).all()
    assert np.isin(ids[:, ::2], world._ids[:-LABELS]).all()
