"""Exact predictors against brute-force integration on a grid, and against each other."""

from __future__ import annotations

import math

import pytest
import torch

from palimpsest.core.bayes import Gaussian, log_evidence, posterior, predict, predict_discrete, responsibilities
from palimpsest.core.errors import InputError

NOISE = 0.4
PRIORS = [
    Gaussian(torch.tensor([1.5, 0.0]), torch.tensor([[0.3, 0.1], [0.1, 0.5]]), 2.0),
    Gaussian(torch.tensor([-1.0, 0.5]), torch.tensor([[0.6, -0.2], [-0.2, 0.2]]), 1.0),
]


@pytest.fixture
def prompts() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(3, 4, 2, generator=generator).double(), torch.randn(3, 4, generator=generator).double()


def grid(reach: float = 7.0, points: int = 701) -> tuple[torch.Tensor, float]:
    """(points^2, 2) weights on a square, and the area of a cell."""
    line = torch.linspace(-reach, reach, points, dtype=torch.float64)
    return torch.cartesian_prod(line, line), float(line[1] - line[0]) ** 2


def density(prior: Gaussian, weights: torch.Tensor) -> torch.Tensor:
    return (
        torch.distributions.MultivariateNormal(prior.mean.double(), prior.covariance.double()).log_prob(weights).exp()
    )


def test_a_mixture_is_what_integration_over_all_weights_gives(prompts: tuple[torch.Tensor, torch.Tensor]) -> None:
    phi, y = prompts
    weights, cell = grid()
    total = sum(prior.weight for prior in PRIORS)
    parts = [prior.weight / total * density(prior, weights) for prior in PRIORS]
    found = predict(phi, y, PRIORS, NOISE)
    for row in range(len(phi)):
        for n in range(4):
            misses = y[row, :n, None] - phi[row, :n] @ weights.T
            likelihood = torch.exp(-0.5 * (misses / NOISE).square().sum(0)) / (NOISE * math.sqrt(2 * math.pi)) ** n
            masses = torch.stack([(part * likelihood).sum() * cell for part in parts])
            both = sum(parts) * likelihood
            mean = (both[:, None] * weights).sum(0) / both.sum()
            torch.testing.assert_close(found.weights[row, n], mean, rtol=0, atol=1e-6)
            torch.testing.assert_close(found.mean[row, n], phi[row, n] @ mean, rtol=0, atol=1e-6)
            torch.testing.assert_close(found.shares[row, n], masses / masses.sum(), rtol=0, atol=1e-6)
    whole = torch.stack([log_evidence(phi, y, prior, NOISE) for prior in PRIORS], dim=1)
    misses = y[0, :, None] - phi[0] @ weights.T
    likelihood = torch.exp(-0.5 * (misses / NOISE).square().sum(0)) / (NOISE * math.sqrt(2 * math.pi)) ** 4
    masses = [(density(prior, weights) * likelihood).sum() * cell for prior in PRIORS]
    torch.testing.assert_close(whole[0], torch.stack(masses).log(), rtol=0, atol=1e-6)


def test_one_gaussian_is_ridge_regression(prompts: tuple[torch.Tensor, torch.Tensor]) -> None:
    phi, y = prompts
    spread = 1.7
    prior = Gaussian(torch.zeros(2), spread**2 * torch.eye(2))
    gram = phi.transpose(1, 2) @ phi + NOISE**2 / spread**2 * torch.eye(2)
    by_hand = torch.linalg.solve(gram, phi.transpose(1, 2) @ y[..., None])[..., 0]
    mean, covariance = posterior(phi, y, prior, NOISE)
    torch.testing.assert_close(mean, by_hand)
    torch.testing.assert_close(covariance, NOISE**2 * torch.linalg.inv(gram))
    nothing_new = torch.cat([phi, torch.zeros(3, 1, 2)], dim=1), torch.cat([y, torch.zeros(3, 1)], dim=1)
    torch.testing.assert_close(predict(*nothing_new, prior, NOISE).weights[:, -1], by_hand)


def test_finitely_many_weights_are_a_mixture_of_points(prompts: tuple[torch.Tensor, torch.Tensor]) -> None:
    phi, y = prompts
    candidates = torch.randn(5, 2, generator=torch.Generator().manual_seed(1)).double()
    shares = [1.0, 2.0, 1.0, 0.5, 0.0]
    points = [Gaussian(w, torch.zeros(2, 2), share) for w, share in zip(candidates, shares, strict=True)]
    one, other = predict_discrete(phi, y, candidates, NOISE, weights=shares), predict(phi, y, points, NOISE)
    torch.testing.assert_close(one.mean, other.mean)
    torch.testing.assert_close(one.shares, other.shares)
    torch.testing.assert_close(one.shares[0, 0], torch.tensor(shares).double() / sum(shares))


def test_an_answer_knows_nothing_of_what_comes_later(prompts: tuple[torch.Tensor, torch.Tensor]) -> None:
    phi, y = prompts
    other = y.clone()
    other[:, 2:] += 5
    one, two = predict(phi, y, PRIORS, NOISE), predict(phi, other, PRIORS, NOISE)
    torch.testing.assert_close(one.mean[:, :3], two.mean[:, :3])
    assert not torch.allclose(one.mean[:, 3], two.mean[:, 3])


def test_without_noise_the_true_family_is_found() -> None:
    generator = torch.Generator().manual_seed(3)
    phi = torch.randn(1, 6, 2, generator=generator).double()
    w = torch.tensor([1.5, 0.2]).double()
    found = predict(phi, phi @ w, PRIORS, 1e-2)
    torch.testing.assert_close(found.weights[0, -1], w, atol=1e-3, rtol=0)


def test_refuses_what_cannot_be(prompts: tuple[torch.Tensor, torch.Tensor]) -> None:
    phi, y = prompts
    with pytest.raises(InputError, match="noise must be positive"):
        predict(phi, y, PRIORS, 0.0)
    with pytest.raises(InputError, match=r"not \(3, 4, 2\) and \(3, 3\)"):
        predict(phi, y[:, :3], PRIORS, NOISE)
    with pytest.raises(InputError, match="finite"):
        predict(phi, y.masked_fill(y > 0, torch.nan), PRIORS, NOISE)
    with pytest.raises(InputError, match="2 components need as many weights"):
        responsibilities(torch.zeros(3, 2), [1.0])
