"""GPICL's claim at a small scale: every value is there, and the control changes the number of tasks alone."""

from __future__ import annotations

from palimpsest import claims


def test_all_values_are_measured_and_the_control_differs() -> None:
    claim = claims.get("gpicl")
    measured, control = (claim(0, mechanism=mechanism, scale=0.02) for mechanism in (True, False))
    assert measured.keys() == control.keys()
    for name in ("unseen_few", "improvement_few", "plateau_unbiased", "nearest_neighbour"):
        assert measured[name] == control[name]
    assert measured["seen_minus_unseen_many"] != control["seen_minus_unseen_many"]
    assert 0.7 < measured["nearest_neighbour"] <= 1
    assert measured["plateau_unbiased"] <= 32
