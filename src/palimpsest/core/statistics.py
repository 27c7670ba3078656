"""How sure a number is: bootstrap intervals, paired differences and tests, AUC, correction for many tests.

Everything is deterministic: the resampling generator is seeded by `seed` alone.  Knows nothing of models or claims.
Shapes: N values; P positive and Q negative scores.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

Values = Sequence[float] | np.ndarray
Statistic = Literal["mean", "median"] | Callable[..., Any]

_BLOCK = 4_000_000  # resampled values in memory at once


@dataclass(frozen=True)
class Interval:
    """A value with the interval it lies in; `low` and `high` are None where there are too few values to tell."""

    value: float
    low: float | None
    high: float | None
    method: str  # how it was computed, with the reason where that is not the usual way

    def __iter__(self) -> Iterator[float | None]:
        """Unpacks as ``value, low, high``."""
        return iter((self.value, self.low, self.high))


def bootstrap(
    values: Values, statistic: Statistic = "mean", *, confidence: float = 0.95, resamples: int = 5000, seed: int = 0
) -> Interval:
    """The statistic of (N,) `values` with its bootstrap interval (scipy; BCa, Efron 1987).

    Falls back to the percentile interval where BCa is undefined (the statistic of every resample lies on one side), and
    to the point itself where all values are equal; `Interval.method` then says why.  With N < 2 there is no interval.
    A callable `statistic` takes ``axis`` like `numpy.mean`.

    With a handful of values any bootstrap interval is too narrow: of 95% intervals of the mean of N normal values,
    about 50% hold the true mean at N = 2, 84% at N = 5, 90% at N = 10 (400 draws each).  More values are the only cure.
    Raises ValueError for an empty sequence or values that are not finite.
    """
    sample = _finite(values, "values")
    if sample.size == 0:
        raise ValueError("no values")
    function: Callable[..., Any] = getattr(np, statistic) if isinstance(statistic, str) else statistic
    point = float(function(sample, axis=-1))
    if sample.size < 2:
        return Interval(point, None, None, "none: one value")
    if np.ptp(sample) <= 1e-12 * max(1.0, abs(point)):  # equal but for rounding
        return Interval(point, point, point, f"point: all {sample.size} values are equal")
    low, high = _resampled(sample, function, confidence, resamples, seed, "BCa")
    if np.isfinite([low, high]).all():
        return Interval(point, low, high, "BCa")
    low, high = _resampled(sample, function, confidence, resamples, seed, "percentile")
    return Interval(point, low, high, "percentile: BCa is undefined for these values")


def bootstrap_interval(
    values: Values, statistic: Statistic = "mean", *, confidence: float = 0.95, resamples: int = 5000, seed: int = 0
) -> tuple[float | None, float | None]:
    """``(low, high)`` of `bootstrap`; ``(None, None)`` for fewer than two values."""
    if len(values) < 2:
        return None, None
    interval = bootstrap(values, statistic, confidence=confidence, resamples=resamples, seed=seed)
    return interval.low, interval.high


def paired_difference(
    values: Values, others: Values, statistic: Statistic = "mean", *, confidence: float = 0.95, seed: int = 0
) -> Interval:
    """The statistic of ``values - others``, both (N,) in the same order of records or seeds, with its interval."""
    return bootstrap(_differences(values, others), statistic, confidence=confidence, seed=seed)


def paired_p(values: Values, others: Values, *, resamples: int = 9999, seed: int = 0) -> float:
    """Two-sided p that two (N,) paired samples have the same mean: signs of the differences flipped at random.

    Exact (all 2^N flips) where 2^N <= `resamples`.  N pairs can give no p below 2 / 2^N: five never reach 0.05.
    """
    from scipy import stats

    differences = _differences(values, others)
    if not differences.any():
        return 1.0
    test = stats.permutation_test(
        (differences,),
        lambda x, axis: np.mean(x, axis=axis),
        permutation_type="samples",
        vectorized=True,
        n_resamples=resamples,
        batch=max(1, _BLOCK // differences.size),
        rng=np.random.default_rng(seed),
    )
    return float(test.pvalue)


def holm(p_values: Values) -> np.ndarray:
    """(N,) p-values corrected for N tests (Holm 1979), in input order.  Each may be compared with the level itself."""
    p = _finite(p_values, "p-values")
    order = np.argsort(p, kind="stable")
    stepped = np.maximum.accumulate(p[order] * (p.size - np.arange(p.size)))
    adjusted = np.empty_like(p)
    adjusted[order] = np.minimum(stepped, 1.0)
    return adjusted


def auc(positive: Values, negative: Values) -> float:
    """The chance that a positive's score is above a negative's, a tie counting half: exact, O((P+Q) log(P+Q)).

    Raises ValueError if either side is empty or not finite.
    """
    above, _ = _placements(positive, negative)
    return float(above.mean())


def auc_interval(positive: Values, negative: Values, *, confidence: float = 0.95) -> Interval:
    """`auc` with its interval: DeLong's variance (1988) on the logit scale, which keeps the interval inside (0, 1).

    Where that variance is zero (perfect separation) or unknown (one value on a side) Newcombe's score interval (2006,
    method 5) is used: it needs only the AUC and the two sizes, and does not collapse to a point.
    """
    from scipy import stats

    above, below = _placements(positive, negative)
    value = float(above.mean())
    z = float(stats.norm.ppf((1 + confidence) / 2))
    if above.size > 1 and below.size > 1 and 0 < value < 1:
        error = float(np.sqrt(above.var(ddof=1) / above.size + below.var(ddof=1) / below.size))
        if error > 0:
            centre, spread = np.log(value / (1 - value)), z * error / (value * (1 - value))
            low, high = 1 / (1 + np.exp(-(centre + np.array([-spread, spread]))))
            return Interval(value, float(low), float(high), "DeLong")
    low, high = _score_interval(value, above.size, below.size, z)
    return Interval(value, low, high, "Newcombe: DeLong's variance is zero")


def _score_interval(value: float, positives: int, negatives: int, z: float) -> tuple[float, float]:
    """The AUCs t for which ``(t - value)^2 <= z^2 V(t)``, V being Hanley and McNeil's variance with balanced sizes."""
    from scipy import optimize

    half = (positives + negatives) / 2 - 1

    def excess(t: float) -> float:
        variance = t * (1 - t) / (positives * negatives) * (1 + half * ((1 - t) / (2 - t) + t / (1 + t)))
        return (t - value) ** 2 - z**2 * variance

    edge = 1e-9  # the variance is zero at 0 and 1 themselves
    low, high = 0.0, 1.0
    if value > 2 * edge and excess(edge) > 0:
        low = float(optimize.brentq(excess, edge, min(value, 1 - edge)))
    if value < 1 - 2 * edge and excess(1 - edge) > 0:
        high = float(optimize.brentq(excess, max(value, edge), 1 - edge))
    return low, high


def _placements(positive: Values, negative: Values) -> tuple[np.ndarray, np.ndarray]:
    """(P,) share of negatives below each positive and (Q,) share of positives above each negative; ties count half."""
    from scipy import stats

    p, q = _finite(positive, "positive scores"), _finite(negative, "negative scores")
    if p.size == 0 or q.size == 0:
        raise ValueError(f"an AUC needs scores of both kinds, not {p.size} positive and {q.size} negative")
    ranks = stats.rankdata(np.concatenate([p, q]))
    above = (ranks[: p.size] - stats.rankdata(p)) / q.size
    below = 1 - (ranks[p.size :] - stats.rankdata(q)) / p.size
    return above, below


def _resampled(
    sample: np.ndarray, function: Callable[..., Any], confidence: float, resamples: int, seed: int, method: str
) -> tuple[float, float]:
    from scipy import stats

    with warnings.catch_warnings():  # a degenerate distribution comes back as NaN, which the caller answers
        warnings.simplefilter("ignore", stats.DegenerateDataWarning)
        warnings.filterwarnings("ignore", category=RuntimeWarning, module="scipy")
        found = stats.bootstrap(
            (sample,),
            function,
            vectorized=True,
            confidence_level=confidence,
            n_resamples=resamples,
            batch=max(1, _BLOCK // sample.size),
            method=method,
            rng=np.random.default_rng(seed),
        ).confidence_interval
    return float(found.low), float(found.high)


def _differences(values: Values, others: Values) -> np.ndarray:
    a, b = _finite(values, "values"), _finite(others, "values")
    if a.shape != b.shape:
        raise ValueError(f"paired values must be equally many, not {a.size} and {b.size}")
    return a - b


def _finite(values: Values, what: str) -> np.ndarray:
    array = np.asarray(values, dtype=np.float64).reshape(-1)
    if not np.isfinite(array).all():
        bad = int(np.flatnonzero(~np.isfinite(array))[0])
        raise ValueError(f"{what} must be finite, but number {bad} of {array.size} is {array[bad]}")
    return array
