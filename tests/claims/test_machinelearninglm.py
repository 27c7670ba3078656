"""MachineLearningLM's claim at a small scale: every value is there, and the control changes the labels alone."""

from __future__ import annotations

import numpy as np

from palimpsest import claims
from palimpsest.claims.machinelearninglm import RIVALS, SETS, SHOTS, real


def test_all_values_are_measured_and_the_control_differs() -> None:
    claim = claims.get("machinelearninglm")
    measured, control = (claim(100, mechanism=mechanism, scale=0.02) for mechanism in (True, False))
    assert measured.keys() == control.keys()
    for shots in SHOTS:
        for name in ("forest", "neighbours", "no_warm_start"):
            assert measured[f"{name}_{shots}"] == control[f"{name}_{shots}"]
    assert measured["majority"] == control["majority"]
    assert any(measured[f"synthetic_{shots}"] != control[f"synthetic_{shots}"] for shots in SHOTS)
    assert measured["forest_64"] > measured["majority"] + 0.2


def test_every_table_has_enough_rows_of_any_two_classes_for_context_and_queries() -> None:
    for name in SETS:
        x, y = real(name)
        assert np.isfinite(x).all()
        assert np.sort(np.bincount(y))[:2].sum() >= 64 + 36
    x, y = real("wine")
    for answer in RIVALS.values():
        assert answer(x[::2], y[::2], x[1::2]).shape == y[1::2].shape
