"""Families of random functions: their scale, their features and priors, and streams as pure functions of the step."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from palimpsest.core.bayes import predict
from palimpsest.core.errors import InputError
from palimpsest.core.seeds import numpy_rng
from palimpsest.data.functions import (
    DecisionTrees,
    Dense,
    Finite,
    Fourier,
    FunctionStream,
    Linear,
    Mixture,
    Monomials,
    ReluNets,
    Signs,
    Sparse,
)

UNIT = [
    Dense(5),
    Sparse(6, 2),
    Signs(5),
    Fourier(4),
    Fourier(5, low=3),
    DecisionTrees(4, 3),
    ReluNets(5, 16),
    Mixture((Dense(4), Sparse(4, 1), DecisionTrees(4, 2))),
]


@pytest.mark.parametrize("family", UNIT, ids=lambda family: type(family).__name__)
def test_every_family_has_mean_0_and_variance_1(family) -> None:
    batch = FunctionStream(family, 20, batch_size=3000, seed=1)(0)
    assert batch["x"].shape == (3000, 20, family.dim)
    assert abs(float(batch["y"].mean())) < 0.08
    assert float(batch["y"].var()) == pytest.approx(1, abs=0.12)
    assert torch.equal(batch["y"], batch["function"])


@pytest.mark.parametrize("family", UNIT, ids=lambda family: type(family).__name__)
def test_a_batch_is_a_pure_function_of_seed_and_step(family) -> None:
    stream = FunctionStream(family, 6, batch_size=5, noise=0.1, seed=3)
    first = stream(4)
    stream(0)
    again = FunctionStream(family, 6, batch_size=5, noise=0.1, seed=3)(4)
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not torch.equal(first["x"], stream(5)["x"])
    assert not torch.equal(first["y"], first["function"])


@pytest.mark.parametrize("family", [Dense(3, 2.0, 0.5), Sparse(4, 2), Fourier(3, low=2, constant=True)], ids=str)
def test_priors_are_the_moments_of_the_weights_that_are_drawn(family) -> None:
    assert isinstance(family, Linear)
    weights = family.weights(numpy_rng(0, "test"), 40_000)
    priors = family.priors()
    share = 1 / len(priors)
    mean = share * sum(prior.mean for prior in priors)
    second = share * sum(p.covariance + torch.outer(p.mean, p.mean) for p in priors)
    np.testing.assert_allclose(weights.mean(0), mean, atol=0.03)
    np.testing.assert_allclose(weights.T @ weights / len(weights), second, atol=0.03)


def test_values_are_the_weighted_features() -> None:
    family = Fourier(2, half_period=5.0)
    x = torch.tensor([[[0.0], [2.5]]])
    torch.testing.assert_close(
        family.basis(x)[0],
        torch.tensor([[1, 1, 0, 1, 0], [1, 0, 1, -1, 0]]).double(),
        atol=1e-12,
        rtol=0,
    )
    assert Monomials(3, 2).features(np.array([[[1.0, 2.0, 3.0]]])).tolist() == [[[1, 2, 3, 4, 6, 9]]]
    batch = FunctionStream(Dense(2), 4, batch_size=8)(0)
    for x_of_one, y_of_one in zip(batch["x"].double(), batch["y"].double(), strict=True):
        weights = torch.linalg.lstsq(x_of_one[:2], y_of_one[:2, None]).solution
        torch.testing.assert_close((x_of_one @ weights)[:, 0], y_of_one, atol=1e-3, rtol=1e-3)


def test_a_tree_takes_as_many_values_as_it_has_leaves_and_depends_on_signs_alone() -> None:
    family = DecisionTrees(3, 2)
    x = numpy_rng(0, "x").standard_normal((4, 200, 3))
    values = family.values(numpy_rng(1, "tree"), x)
    assert all(len(np.unique(row)) <= 4 for row in values)
    assert max(len(np.unique(row)) for row in values) > 1
    np.testing.assert_array_equal(values, family.values(numpy_rng(1, "tree"), np.sign(x)))


def test_a_mixture_of_frequencies_shares_the_widest_features() -> None:
    mixture = Mixture((Fourier(1), Fourier(3)), (1.0, 3.0))
    priors = mixture.priors()
    assert [prior.weight for prior in priors] == [0.25, 0.75]
    assert priors[0].covariance.diagonal().tolist() == [0, 1, 1, 0, 0, 0, 0]
    batch = FunctionStream(mixture, 9, batch_size=6, seed=2)(0)
    found = predict(mixture.basis(batch["x"]), batch["y"], priors, 1e-2)
    assert found.mean.shape == (6, 9)
    assert torch.allclose(found.mean[:, -1], batch["y"][:, -1].double(), atol=0.05)  # 7 unknowns, 8 pairs


def test_drawn_shares_follow_the_weights() -> None:
    mixture = Mixture((Dense(1, 5.0, 0.0), Dense(1, -5.0, 0.0)), (0.9, 0.1))
    batch = FunctionStream(mixture, 1, batch_size=4000)(0)
    assert float((batch["y"] / batch["x"][..., 0] > 0).float().mean()) == pytest.approx(0.9, abs=0.02)


def test_finite_families_know_their_candidates() -> None:
    family = Finite(Dense(3), 4, seed=5)
    drawn = family.weights(numpy_rng(0, "w"), 200)
    assert len(np.unique(drawn, axis=0)) == 4
    assert family.candidates().shape == (4, 3)
    signs = Signs(3).candidates()
    assert len(signs.unique(dim=0)) == 8
    torch.testing.assert_close(signs.abs(), torch.full_like(signs, 1 / math.sqrt(3)))


def test_bad_input_is_said() -> None:
    with pytest.raises(InputError, match="nonzero must lie between 1 and dim=4"):
        Sparse(4, 5)
    with pytest.raises(InputError, match="too many to enumerate"):
        Sparse(40, 5).priors()
    with pytest.raises(InputError, match="too many to enumerate"):
        Signs(20).candidates()
    with pytest.raises(InputError, match="there is none"):
        Fourier(2, low=3)
    with pytest.raises(InputError, match="the same dimension"):
        Mixture((Dense(2), Dense(3)))
    with pytest.raises(InputError, match="2 families need as many weights"):
        Mixture((Dense(2), Dense(2)), (1.0,))
    with pytest.raises(InputError, match="not every family"):
        Mixture((DecisionTrees(2), DecisionTrees(2))).priors()
    with pytest.raises(InputError, match="points and batch_size"):
        FunctionStream(Dense(2), 0)
