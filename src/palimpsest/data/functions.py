"""Random functions and the points they are seen at, drawn on the fly: what in-context learners of functions train on.

A family is a prior over functions of unit variance (families in a mixture must not be told apart by their scale).
Those linear in known features say so (`basis`, `priors`), which gives them an exact Bayesian predictor (core/bayes.py).
After Garg et al. 2022 (arXiv:2208.01066) and Panwar et al. 2024 (arXiv:2306.04891).  A batch is a pure function of
(seed, step).  Shapes: B prompts, P points, X inputs, D features.
"""

from __future__ import annotations

import itertools
import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Protocol, cast, runtime_checkable

import numpy as np
import torch
from torch import Tensor

from palimpsest.core.bayes import Gaussian
from palimpsest.core.errors import InputError
from palimpsest.core.seeds import numpy_rng

_MOST_SUPPORTS = 5000  # of sparse weights that are enumerated for the exact predictor


class Family(Protocol):
    """A prior over functions."""

    @property
    def dim(self) -> int: ...

    def inputs(self, rng: np.random.Generator, shape: tuple[int, int]) -> np.ndarray:
        """(B, P, X) points."""
        ...

    def values(self, rng: np.random.Generator, x: np.ndarray) -> np.ndarray:
        """(B, P): one fresh function a prompt, at its points."""
        ...


@runtime_checkable
class Linear(Protocol):
    """A family whose functions are weighted sums of known features."""

    def basis(self, x: Tensor) -> Tensor:
        """(B, P, X) -> (B, P, D)."""
        ...

    def priors(self) -> list[Gaussian]:
        """The prior over the weights, as a mixture of Gaussians."""
        ...


class _Weighted(ABC):
    """What families of weighted features share; they draw `weights` and know their `features`."""

    dim: Any  # of the inputs: a field or a property of every family

    def inputs(self, rng: np.random.Generator, shape: tuple[int, int]) -> np.ndarray:
        return rng.standard_normal((*shape, self.dim))

    def values(self, rng: np.random.Generator, x: np.ndarray) -> np.ndarray:
        weights = self.weights(rng, len(x))
        return np.einsum("bpd,bd->bp", self.features(x)[..., : weights.shape[1]], weights)

    def basis(self, x: Tensor) -> Tensor:
        return torch.from_numpy(self.features(x.double().numpy()))

    def features(self, x: np.ndarray) -> np.ndarray:
        return x

    @abstractmethod
    def weights(self, rng: np.random.Generator, rows: int) -> np.ndarray: ...


@dataclass(frozen=True)
class Dense(_Weighted):
    """``y = w . x / sqrt(X)`` with standard normal weights; the first may have a mean and a spread of its own.

    With noise its Bayesian predictor is ridge regression.
    """

    dim: int = 20
    first_mean: float = 0.0
    first_spread: float = 1.0

    def weights(self, rng: np.random.Generator, rows: int) -> np.ndarray:
        drawn = rng.standard_normal((rows, self.dim))
        drawn[:, 0] = self.first_mean + self.first_spread * drawn[:, 0]
        return drawn / math.sqrt(self.dim)

    def priors(self) -> list[Gaussian]:
        mean, variance = torch.zeros(self.dim), torch.ones(self.dim)
        mean[0], variance[0] = self.first_mean, self.first_spread**2
        return [Gaussian(mean.double() / math.sqrt(self.dim), torch.diag(variance.double()) / self.dim)]


@dataclass(frozen=True)
class Sparse(_Weighted):
    """Weights of which only `nonzero` are not 0, those standard normal, divided by their root."""

    dim: int = 20
    nonzero: int = 3

    def __post_init__(self) -> None:
        if not 1 <= self.nonzero <= self.dim:
            raise InputError(f"nonzero must lie between 1 and dim={self.dim}, not {self.nonzero}")

    def weights(self, rng: np.random.Generator, rows: int) -> np.ndarray:
        chosen = rng.random((rows, self.dim)).argsort(1) < self.nonzero
        return chosen * rng.standard_normal((rows, self.dim)) / math.sqrt(self.nonzero)

    def priors(self) -> list[Gaussian]:
        """One Gaussian a support.  `InputError` if there are more than 5000: compare with the LASSO then."""
        if math.comb(self.dim, self.nonzero) > _MOST_SUPPORTS:
            raise InputError(
                f"{math.comb(self.dim, self.nonzero)} supports ({self.nonzero} of {self.dim}) are too many to enumerate"
            )
        zero = torch.zeros(self.dim, dtype=torch.float64)
        supports = itertools.combinations(range(self.dim), self.nonzero)
        return [
            Gaussian(zero, torch.diag(zero.index_fill(0, torch.tensor(support), 1.0)) / self.nonzero)
            for support in supports
        ]


@dataclass(frozen=True)
class Signs(_Weighted):
    """Weights of +1 and -1, divided by the root of their number."""

    dim: int = 20

    def weights(self, rng: np.random.Generator, rows: int) -> np.ndarray:
        return rng.choice([-1.0, 1.0], (rows, self.dim)) / math.sqrt(self.dim)

    def candidates(self) -> Tensor:
        """(2^X, X): all weights there are, for `bayes.predict_discrete`."""
        if self.dim > 16:
            raise InputError(f"2^{self.dim} sign vectors are too many to enumerate")
        return torch.tensor(list(itertools.product([-1.0, 1.0], repeat=self.dim))).double() / math.sqrt(self.dim)


@dataclass(frozen=True)
class Fourier(_Weighted):
    """Sums of cosines and sines of frequencies `low` to `high` over one period, x uniform in it.

    Features: the constant, then cosine and sine of each frequency from 1 to `high`.
    """

    high: int = 10
    low: int = 1
    half_period: float = 5.0
    constant: bool = False
    dim = 1

    def __post_init__(self) -> None:
        if not 1 <= self.low <= self.high:
            raise InputError(f"frequencies from {self.low} to {self.high}: there is none")

    def inputs(self, rng: np.random.Generator, shape: tuple[int, int]) -> np.ndarray:
        return rng.uniform(-self.half_period, self.half_period, (*shape, 1))

    def features(self, x: np.ndarray) -> np.ndarray:
        angle = x * (np.arange(1, self.high + 1) * np.pi / self.half_period)
        waves = np.stack([np.cos(angle), np.sin(angle)], axis=-1).reshape(*x.shape[:-1], 2 * self.high)
        return np.concatenate([np.ones((*x.shape[:-1], 1)), waves], axis=-1)

    @cached_property
    def _spread(self) -> np.ndarray:
        frequency = np.concatenate([[0], np.repeat(np.arange(1, self.high + 1), 2)])
        used = (frequency >= self.low) | ((frequency == 0) & self.constant)
        return used / math.sqrt(self.high - self.low + 1)

    def weights(self, rng: np.random.Generator, rows: int) -> np.ndarray:
        return rng.standard_normal((rows, 2 * self.high + 1)) * self._spread

    def priors(self) -> list[Gaussian]:
        spread = torch.from_numpy(self._spread)
        return [Gaussian(torch.zeros_like(spread), torch.diag(spread**2))]


@dataclass(frozen=True)
class Monomials(_Weighted):
    """Sums of `terms` products of two inputs with standard normal weights; the terms fresh for each function."""

    dim: int = 10
    terms: int = 10

    def features(self, x: np.ndarray) -> np.ndarray:
        first, second = np.triu_indices(self.dim)
        return x[..., first] * x[..., second]

    def weights(self, rng: np.random.Generator, rows: int) -> np.ndarray:
        count = self.dim * (self.dim + 1) // 2
        chosen = rng.random((rows, count)).argsort(1) < self.terms
        return chosen * rng.standard_normal((rows, count)) / math.sqrt(self.terms)


@dataclass(frozen=True)
class Finite(_Weighted):
    """Only `count` functions, drawn once from another family of weighted features: what a small training set offers."""

    of: Dense | Sparse | Signs
    count: int
    seed: int = 0

    @property
    def dim(self) -> int:
        return self.of.dim

    @cached_property
    def _known(self) -> np.ndarray:
        return self.of.weights(numpy_rng(self.seed, "finite"), self.count)

    def weights(self, rng: np.random.Generator, rows: int) -> np.ndarray:
        return self._known[rng.integers(self.count, size=rows)]

    def candidates(self) -> Tensor:
        """(count, D) weights, for `bayes.predict_discrete`."""
        return torch.from_numpy(self._known)


@dataclass(frozen=True)
class DecisionTrees:
    """Complete trees that ask for the sign of a random input at each node; standard normal leaves."""

    dim: int = 20
    depth: int = 4

    def inputs(self, rng: np.random.Generator, shape: tuple[int, int]) -> np.ndarray:
        return rng.standard_normal((*shape, self.dim))

    def values(self, rng: np.random.Generator, x: np.ndarray) -> np.ndarray:
        rows = np.arange(len(x))[:, None]
        asked = rng.integers(self.dim, size=(len(x), 2**self.depth - 1))
        leaves = rng.standard_normal((len(x), 2**self.depth))
        node = np.zeros(x.shape[:2], dtype=np.int64)
        for _ in range(self.depth):
            right = np.take_along_axis(x, asked[rows, node][..., None], axis=2)[..., 0] > 0
            node = 2 * node + 1 + right
        return leaves[rows, node - (2**self.depth - 1)]


@dataclass(frozen=True)
class ReluNets:
    """Networks with one hidden layer of rectified units and standard normal weights, scaled to unit variance."""

    dim: int = 20
    hidden: int = 100

    def inputs(self, rng: np.random.Generator, shape: tuple[int, int]) -> np.ndarray:
        return rng.standard_normal((*shape, self.dim))

    def values(self, rng: np.random.Generator, x: np.ndarray) -> np.ndarray:
        first = rng.standard_normal((len(x), self.dim, self.hidden))
        second = rng.standard_normal((len(x), self.hidden, 1))
        return (np.maximum(x @ first, 0) @ second)[..., 0] * math.sqrt(2 / (self.hidden * self.dim))


@dataclass(frozen=True)
class Mixture:
    """A family is drawn by its weight for each prompt, then a function of it.  All must have the same inputs."""

    families: tuple[Family, ...]
    weights: tuple[float, ...] = ()  # none: all alike

    def __post_init__(self) -> None:
        if not self.families or len({family.dim for family in self.families}) != 1:
            raise InputError("a mixture needs families, all with inputs of the same dimension")
        if self.weights and (len(self.weights) != len(self.families) or min(self.weights) < 0 or not sum(self.weights)):
            raise InputError(f"{len(self.families)} families need as many weights, not negative and not all 0")

    @property
    def dim(self) -> int:
        return self.families[0].dim

    @cached_property
    def shares(self) -> np.ndarray:
        weights = np.array(self.weights or [1.0] * len(self.families))
        return weights / weights.sum()

    def inputs(self, rng: np.random.Generator, shape: tuple[int, int]) -> np.ndarray:
        return self.families[0].inputs(rng, shape)

    def values(self, rng: np.random.Generator, x: np.ndarray) -> np.ndarray:
        drawn = rng.choice(len(self.families), size=len(x), p=self.shares)
        found = np.empty(x.shape[:2])
        for number, family in enumerate(self.families):
            found[drawn == number] = family.values(rng, x[drawn == number])
        return found

    def basis(self, x: Tensor) -> Tensor:
        """That of the family with most features; the others' are its first ones."""
        return max((family.basis(x) for family in self._linear()), key=lambda phi: phi.shape[-1])

    def priors(self) -> list[Gaussian]:
        found = [
            Gaussian(prior.mean, prior.covariance, share * prior.weight / sum(one.weight for one in priors))
            for share, priors in zip(self.shares, [family.priors() for family in self._linear()], strict=True)
            for prior in priors
        ]
        most = max(len(prior.mean) for prior in found)
        return [_widened(prior, most) for prior in found]

    def _linear(self) -> Sequence[Linear]:
        kinds = {type(family) for family in self.families}
        if len(kinds) > 1 and not kinds <= {Dense, Sparse}:
            raise InputError("only families with the same features have an exact predictor as a mixture")
        if not all(isinstance(family, Linear) for family in self.families):
            raise InputError("not every family of the mixture is linear in known features")
        return cast(Sequence[Linear], self.families)


def _widened(prior: Gaussian, features: int) -> Gaussian:
    more = features - len(prior.mean)
    mean = torch.nn.functional.pad(prior.mean, (0, more))
    return Gaussian(mean, torch.nn.functional.pad(prior.covariance, (0, more, 0, more)), prior.weight)


@dataclass(frozen=True)
class FunctionStream:
    """``stream(step)`` gives x (B, P, X), y (B, P) with noise, and the function's own values (B, P), as float32."""

    family: Family
    points: int
    batch_size: int = 64
    noise: float = 0.0
    seed: int = 0

    def __post_init__(self) -> None:
        if self.points < 1 or self.batch_size < 1 or self.noise < 0:
            raise InputError("points and batch_size must be at least 1, noise at least 0")

    def __call__(self, step: int) -> dict[str, Tensor]:
        rng = numpy_rng(self.seed, "functions", step)
        x = self.family.inputs(rng, (self.batch_size, self.points))
        values = self.family.values(rng, x)
        y = values + self.noise * rng.standard_normal(values.shape)
        return {
            name: torch.from_numpy(one.astype(np.float32)) for name, one in (("x", x), ("y", y), ("function", values))
        }
