"""The claim at a small scale: every value is there, gauges can be read, and the control's blind network sees."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from palimpsest import claims
from palimpsest.claims.deep_regression_unlearning import PIXELS, _Stage, gauges


def test_all_values_are_measured_and_the_control_changes_blindspot_alone() -> None:
    claim = claims.get("deep_regression_unlearning")
    measured, control = (claim(0, mechanism=mechanism, scale=0.1) for mechanism in (True, False))
    assert measured.keys() == control.keys()
    for name, value in measured.items():
        if not any(word in name for word in ("blind", "ignorance")):
            assert control[name] == value, name
    assert measured["difference_blindspot"] != control["difference_blindspot"]
    assert measured["difference_retrained"] == measured["w1_retrained"] == 0


def test_gauges() -> None:
    pictures, readings = gauges(300, 0, "train")
    assert pictures.shape == (300, 1, PIXELS, PIXELS)
    again, other = gauges(300, 0, "train"), gauges(300, 0, "test")
    assert torch.equal(again[0], pictures)
    assert not torch.equal(other[0], pictures)
    columns = torch.arange(PIXELS).float()
    bright = pictures.clamp(min=0).sum((1, 2)) ** 2
    centre = (bright * columns).sum(1) / bright.sum(1)
    slope = np.corrcoef(centre.numpy(), readings.numpy())[0, 1]
    assert slope > 0.7, "the needle goes from left to right"


def test_patients_are_split_anew_and_the_lowest_fifth_must_go() -> None:
    one, two = (_Stage.patients(0, split, 0.1) for split in (0, 1))
    assert not torch.equal(one.train[0], two.train[0])
    assert len(one.forget[0]) / len(one.train[0]) == pytest.approx(0.2, abs=0.02), "some targets are equal"
    assert float(one.forget[1].max()) < one.border <= float(one.retain[1].min())
    assert abs(float(one.train[1].mean())) < 1e-5
