"""DMM's claim at a small scale: every value is there, the control touches predictions alone, sets are what they say."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from palimpsest import claims
from palimpsest.claims.dmm import BASELINES, FORGET, JUDGED, PRACTICE, RETAINED, Trial, convex
from palimpsest.core.attribution import margins

SCALE = 0.1


def test_all_values_are_measured_and_the_control_differs() -> None:
    claim = claims.get("dmm")
    measured, control = (claim(0, mechanism=mechanism, scale=SCALE) for mechanism in (True, False))
    assert measured.keys() == control.keys()
    for name in (*BASELINES, "nothing", "oracle_matching_forget", "lds", "convex_gd_half", "convex_oracle_matching"):
        assert measured[name] == control[name]  # nothing without a prediction changes
    for name in ("dmm", "dmm_100_models", "dmm_300_models", "convex_dmm"):
        assert measured[name] != control[name]
    assert measured["best_baseline_three_quarters"] == pytest.approx(0.75 * min(measured[name] for name in BASELINES))


def test_a_trial_is_made_once_and_its_sets_are_apart_from_what_is_retained() -> None:
    trial, again = Trial.of(0, SCALE), Trial.of(0, SCALE)
    assert trial.scores == again.scores
    assert all(torch.equal(value, again.arrays[name]) for name, value in trial.arrays.items())
    pixels, labels = trial.digits
    for name in (*JUDGED, *PRACTICE):
        rows = trial.sets[name]
        assert len(set(rows.tolist())) == FORGET
        assert rows.max() < trial.rows
        assert not set(rows.tolist()) & set(trial.sets["retained"].tolist())
        forget, retain = trial.examples(name)
        assert torch.equal(forget.inputs, pixels[rows])
        assert len(retain) == RETAINED
        assert len(labels[rows].unique()) == 1 or "cluster" not in name
        groups = dict(trial.groups(name))
        assert sorted(np.concatenate(list(groups.values())).tolist()) == list(range(len(labels)))
    _, forget, retain = trial.matched("removal", 60, "extreme")
    own = trial.examples("extreme")
    assert forget.outputs is not None
    effects = trial.arrays["removal.60.extreme"]
    torch.testing.assert_close(forget.outputs, own[0].outputs - effects[:FORGET])
    torch.testing.assert_close(retain.outputs, own[1].outputs - effects[FORGET:])
    judge, matched = trial.arrays["oracle.extreme"], trial.oracle_matched("extreme")[1].outputs
    labels_of = labels[trial.sets["extreme"]]
    assert not torch.allclose(margins(matched, labels_of), judge[:, trial.sets["extreme"]])  # never its own judge


def test_the_convex_case_orders_the_methods() -> None:
    found = convex(0, True)
    assert found["convex_oracle_matching"] < found["convex_dmm"] < found["convex_gd_half"]
    assert convex(0, False)["convex_dmm"] > found["convex_gd_half"]
