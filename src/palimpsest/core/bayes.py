"""Exact Bayesian prediction for functions linear in known features, in float64: the yardstick of in-context learners.

``y = phi(x) . w + noise`` with Gaussian, mixed or finitely many weights w has a closed form.  One Cholesky factor of a
whole prompt serves all its prefixes, because the factor of a leading block is the leading block of the factor.
Knows nothing of models or of where the numbers come from.
Shapes: B prompts, P points, D features, M components, K candidates.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from palimpsest.core.errors import InputError


@dataclass(frozen=True, eq=False)
class Gaussian:
    """A prior over weights; the covariance may be singular.  `weight`: its share in a mixture, up to a factor."""

    mean: Tensor  # (D,)
    covariance: Tensor  # (D, D)
    weight: float = 1.0


@dataclass(frozen=True, eq=False)
class Prediction:
    """At each position, what is expected from the pairs before it (none at position 0)."""

    mean: Tensor  # (B, P), of the function's value
    weights: Tensor  # (B, P, D), posterior mean
    shares: Tensor  # (B, P, M or K), posterior probability of each component


def predict(phi: Tensor, y: Tensor, priors: Gaussian | Sequence[Gaussian], noise: float) -> Prediction:
    """The posterior mean at every point of every prompt, under a mixture of Gaussian priors.

    `phi`: (B, P, D) features, `y`: (B, P) values, `noise`: standard deviation of the values, positive: a noise-free
    function is one with a small noise, such as 1e-2.  Raises `InputError` for shapes that do not fit, values that are
    not finite, no positive share, and noise <= 0.
    """
    phi, y = _checked(phi, y, noise)
    mixture = [priors] if isinstance(priors, Gaussian) else list(priors)
    parts = [_prefixes(phi, y, prior, noise) for prior in mixture]
    shares = responsibilities(torch.stack([evidence for _, _, evidence in parts], dim=-1), [p.weight for p in mixture])
    means = torch.stack([mean for mean, _, _ in parts], dim=-1)
    weights = torch.stack([weight for _, weight, _ in parts], dim=-1)
    return Prediction((shares * means).sum(-1), (shares[:, :, None] * weights).sum(-1), shares)


def predict_discrete(
    phi: Tensor, y: Tensor, candidates: Tensor, noise: float, *, weights: Sequence[float] | None = None
) -> Prediction:
    """The same where w is one of (K, D) `candidates` (the paper's dMMSE): a softmax of their likelihoods so far."""
    phi, y = _checked(phi, y, noise)
    candidates = candidates.double()
    misses = y[:, :, None] - phi @ candidates.T
    likelihood = -0.5 * (misses / noise) ** 2
    before = likelihood.cumsum(1) - likelihood
    shares = responsibilities(before, weights or [1.0] * len(candidates))
    mean = shares @ candidates
    return Prediction((phi * mean).sum(-1), mean, shares)


def posterior(phi: Tensor, y: Tensor, prior: Gaussian, noise: float) -> tuple[Tensor, Tensor]:
    """Mean (B, D) and covariance (B, D, D) of the weights after all points."""
    phi, y = _checked(phi, y, noise)
    mean, covariance = prior.mean.double(), prior.covariance.double()
    cross = phi @ covariance
    factor = torch.linalg.cholesky(_gram(phi, covariance, noise))
    gain = torch.cholesky_solve(cross, factor)  # (B, P, D)
    miss = y - phi @ mean
    return mean + (gain * miss[:, :, None]).sum(1), covariance - cross.transpose(1, 2) @ gain


def log_evidence(phi: Tensor, y: Tensor, prior: Gaussian, noise: float) -> Tensor:
    """(B,) log density of all values of a prompt under the prior."""
    phi, y = _checked(phi, y, noise)
    factor, miss = _whitened(phi, y, prior, noise)
    return _log_density(factor, miss).sum(1)


def responsibilities(log_evidence: Tensor, weights: Sequence[float]) -> Tensor:
    """(..., M) posterior probabilities of M components, from their log evidences and their prior weights."""
    if min(weights) < 0 or sum(weights) <= 0 or len(weights) != log_evidence.shape[-1]:
        raise InputError(f"{log_evidence.shape[-1]} components need as many weights, not negative and not all 0")
    prior = torch.tensor(list(weights), dtype=torch.float64, device=log_evidence.device).log()
    return (log_evidence + prior).softmax(-1)


def _prefixes(phi: Tensor, y: Tensor, prior: Gaussian, noise: float) -> tuple[Tensor, Tensor, Tensor]:
    """Predicted values (B, P), posterior weights (B, P, D) and log evidence (B, P), each from the points before."""
    mean, covariance = prior.mean.double(), prior.covariance.double()
    factor, white = _whitened(phi, y, prior, noise)
    values = phi @ mean + (factor.tril(-1) @ white[:, :, None])[:, :, 0]
    whitened_phi = torch.linalg.solve_triangular(factor, phi, upper=False)
    steps = whitened_phi * white[:, :, None]
    weights = mean + (steps.cumsum(1) - steps) @ covariance
    densities = _log_density(factor, white)
    return values, weights, densities.cumsum(1) - densities


def _whitened(phi: Tensor, y: Tensor, prior: Gaussian, noise: float) -> tuple[Tensor, Tensor]:
    """The Cholesky factor of the values' covariance, (B, P, P), and the residuals whitened by it, (B, P)."""
    factor = torch.linalg.cholesky(_gram(phi, prior.covariance.double(), noise))
    miss = y - phi @ prior.mean.double()
    return factor, torch.linalg.solve_triangular(factor, miss[:, :, None], upper=False)[:, :, 0]


def _log_density(factor: Tensor, white: Tensor) -> Tensor:
    """(B, P): the log density of each value given those before it."""
    scale = factor.diagonal(dim1=1, dim2=2)
    return -0.5 * white**2 - scale.log() - 0.5 * math.log(2 * math.pi)


def _gram(phi: Tensor, covariance: Tensor, noise: float) -> Tensor:
    identity = torch.eye(phi.shape[1], dtype=phi.dtype, device=phi.device)
    return phi @ covariance @ phi.transpose(1, 2) + noise**2 * identity


def _checked(phi: Tensor, y: Tensor, noise: float) -> tuple[Tensor, Tensor]:
    if phi.ndim != 3 or y.shape != phi.shape[:2]:
        raise InputError(
            f"features (B, P, D) and values (B, P) are wanted, not {tuple(phi.shape)} and {tuple(y.shape)}"
        )
    if not noise > 0:
        raise InputError(f"noise must be positive, not {noise}: take a small one such as 1e-2 for exact functions")
    if not (torch.isfinite(phi).all() and torch.isfinite(y).all()):
        raise InputError("features and values must be finite")
    return phi.double(), y.double()
