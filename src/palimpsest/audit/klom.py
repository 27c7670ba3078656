"""KLOM: do unlearned models and models never trained on the forgotten rows give the same margins, point by point?

Georgiev et al. 2024 (arXiv:2410.23232): for each point, the KL divergence between the margins of N unlearned models and
those of N oracles (trained without the forget set), over the randomness of training.  It needs tens of models on each
side, so it is a function of margins, brought along or made with `core.many`, and no audit of one language model.
A histogram of few models differs from another by chance alone: the same score between two pools of oracles, the null
floor, belongs beside every KLOM.  Seeds and data orders of the two pools must not be paired.
Shapes: N models, P points.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np

from palimpsest.core.errors import InputError

Direction = Literal["unlearned", "oracle"]

FEWEST = 30  # models: with 20 bins, below that the score of two equal pools is nearly 2 nats
BINS, CLIP, LEAST = 20, 100.0, 1e-5  # of the published benchmark code


@dataclass(frozen=True, eq=False)
class Klom:
    """The score over a group of points, beside its null floor.  All in nats, 0 to ln(1 / 1e-5) = 11.5."""

    values: np.ndarray  # (P,)
    floor: np.ndarray  # (P,): the same between oracles and oracles
    models: int
    split: bool  # the floor is between halves of one pool: of half as many models, so it lies too high

    @property
    def mean(self) -> float:
        return float(self.values.mean())

    @property
    def p95(self) -> float:
        return float(np.percentile(self.values, 95))

    @property
    def floor_mean(self) -> float:
        return float(self.floor.mean())

    @property
    def floor_p95(self) -> float:
        return float(np.percentile(self.floor, 95))

    @property
    def excess(self) -> float:
        """The mean above the floor's; near 0 the pools cannot be told apart."""
        return self.mean - self.floor_mean

    def __str__(self) -> str:
        halves = ", between halves: too high" if self.split else ""
        return (
            f"KLOM {self.mean:.3f} (p95 {self.p95:.3f}) of {len(self.values)} points and {self.models} models; "
            f"null floor {self.floor_mean:.3f} (p95 {self.floor_p95:.3f}{halves})"
        )


def klom(
    unlearned: np.ndarray,
    oracle: np.ndarray,
    null: np.ndarray | None = None,
    *,
    bins: int = BINS,
    direction: Direction = "unlearned",
) -> Klom:
    """The score of a group of points from margins (N, P) of N unlearned models and N oracles.

    `null` is a second pool of oracles, (N, P), for the floor; without one the oracles are split into halves.  `bins=5`
    lowers the floor from 0.9 to 0.1 at N = 50.  `direction` is the side that the expectation is under: the published
    code's KL(unlearned || oracle), or the other way round.  `InputError` for pools of other shapes or under 30 models.
    """
    unlearned, oracle = np.asarray(unlearned, np.float64), np.asarray(oracle, np.float64)
    pools = {"unlearned": unlearned, "oracle": oracle}
    if null is not None:
        pools["null"] = np.asarray(null, np.float64)
    for name, pool in pools.items():
        if pool.shape != oracle.shape or pool.ndim != 2 or not pool.size:
            shapes = ", ".join(f"{which} {one.shape}" for which, one in pools.items())
            raise InputError(f"KLOM wants margins (models, points) of one shape, not {shapes}")
        if np.isnan(pool).any():
            model, point = np.argwhere(np.isnan(pool))[0]
            raise InputError(f"the margin of {name} model {model} at point {point} is not a number")
    if len(oracle) < FEWEST:
        raise InputError(
            f"KLOM of {len(oracle)} models is mostly chance: wanted at least {FEWEST} unlearned models and as many "
            "oracles, better 100"
        )
    if bins < 2 or direction not in ("unlearned", "oracle"):
        raise InputError(f"bins must be at least 2 and direction 'unlearned' or 'oracle', not {bins} and '{direction}'")
    half = len(oracle) // 2
    pair = (oracle, pools["null"]) if null is not None else (oracle[:half], oracle[half : 2 * half])
    sides = (unlearned, oracle) if direction == "unlearned" else (oracle, unlearned)
    return Klom(divergence(*sides, bins=bins), divergence(*pair, bins=bins), len(oracle), null is None)


def divergence(first: np.ndarray, second: np.ndarray, *, bins: int = BINS) -> np.ndarray:
    """(P,) KL(first || second) in nats of two samples of margins a point, (N, P), each in `bins` equal bins over both.

    Margins are clipped to +-100; a bin that `second` leaves empty counts 1e-5.
    """
    first, second = (np.clip(values, -CLIP, CLIP) for values in (first, second))
    low = np.minimum(first.min(0), second.min(0))
    width = np.maximum(first.max(0), second.max(0)) - low
    p, q = (_shares(values, low, width, bins) for values in (first, second))
    logs = np.log(p, out=np.zeros_like(p), where=p > 0) - np.log(np.maximum(q, LEAST))
    return (p * logs).sum(0)


def _shares(values: np.ndarray, low: np.ndarray, width: np.ndarray, bins: int) -> np.ndarray:
    """(bins, P): the share of models in each bin; the last one is closed on both sides."""
    places = np.zeros(values.shape) if not width.any() else (values - low) / np.where(width > 0, width, 1) * bins
    rows: np.ndarray = np.minimum(places.astype(np.int64), bins - 1)
    counts = np.zeros((bins, values.shape[1]))
    np.add.at(counts, (rows, np.arange(values.shape[1])), 1)
    return counts / len(values)
