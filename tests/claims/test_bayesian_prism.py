"""Bayesian prism's claim at a small scale: every value is there, and the control changes the training data alone."""

from __future__ import annotations

import torch

from palimpsest import claims
from palimpsest.claims.bayesian_prism import ONE, TWO
from palimpsest.data.functions import FunctionStream


def test_all_values_are_measured_and_the_control_differs() -> None:
    claim = claims.get("bayesian_prism")
    measured, control = (claim(0, mechanism=mechanism, scale=0.01) for mechanism in (True, False))
    assert measured.keys() == control.keys()
    for name in ("single_off_flat", "lowest_1_single", "spectrum_error_single", "lowest_1_mixture_exact"):
        assert measured[name] == control[name]
    assert measured["exact"] != control["exact"]
    assert control["lowest_2_mixture_exact"] > 0.6
    assert abs(control["lowest_1_single_exact"] - 1 / 3) < 0.01


def test_the_rival_has_the_moments_of_the_mixture() -> None:
    (prior,) = ONE.priors()
    parts = TWO.priors()
    second = sum(part.weight * (part.covariance + torch.outer(part.mean, part.mean)) for part in parts)
    torch.testing.assert_close(prior.covariance, second)
    torch.testing.assert_close(prior.mean, sum(part.weight * part.mean for part in parts))
    one, two = (FunctionStream(family, 4, 4000)(0)["y"].var() for family in (ONE, TWO))
    assert abs(float(one / two) - 1) < 0.1
