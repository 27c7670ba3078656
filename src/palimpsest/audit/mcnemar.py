"""The paired test of two sets of right and wrong answers to the same items, with its effect sizes and its power.

McNemar 1947 without continuity correction, as C-BOD has it (arXiv:2502.07445, section 3.2), and the exact binomial test
where few items changed.  `b` counts items that the first side does better, `c` those that the second does.
Knows nothing of models or wordings.  Shapes: N items.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from palimpsest.core.errors import InputError
from palimpsest.core.statistics import Interval, bootstrap, paired_difference

EXACT_BELOW = 25  # changed items: fewer make the chi-squared distribution a bad approximation
_CONFIDENCE = 0.95


@dataclass(frozen=True, eq=False)
class Paired:
    """Scores of the same N items on two sides, each from 0 to 1."""

    first: np.ndarray
    second: np.ndarray

    def __post_init__(self) -> None:
        if self.first.shape != self.second.shape or self.first.ndim != 1 or len(self.first) == 0:
            raise InputError(
                f"a paired test needs as many scores on each side, not {len(self.first)} and {len(self.second)}"
            )

    @property
    def n(self) -> int:
        return len(self.first)

    @property
    def b(self) -> int:
        return int((self.first > self.second).sum())

    @property
    def c(self) -> int:
        return int((self.second > self.first).sum())

    @property
    def drop(self) -> float:
        """How much lower the second side's mean is."""
        return float(self.first.mean() - self.second.mean())

    @property
    def chi2(self) -> float:
        """(b - c)^2 / (b + c), one degree of freedom; 0 where nothing changed."""
        return (self.b - self.c) ** 2 / (self.b + self.c) if self.b + self.c else 0.0

    @property
    def p_chi2(self) -> float:
        from scipy import stats

        return float(stats.chi2.sf(self.chi2, 1))

    @property
    def p_exact(self) -> float:
        """Two-sided binomial test that a changed item is as likely to change one way as the other."""
        from scipy import stats

        return float(stats.binomtest(self.b, self.b + self.c).pvalue) if self.b + self.c else 1.0

    @property
    def exact(self) -> bool:
        return self.b + self.c < EXACT_BELOW

    @property
    def p(self) -> float:
        return self.p_exact if self.exact else self.p_chi2

    def drop_interval(self) -> Interval:
        """Newcombe's interval of `drop` for paired shares (1998, method 10); bootstrap where scores lie between.

        Unlike the bootstrap it does not collapse to a point where no item changed.
        """
        if not np.isin(np.concatenate([self.first, self.second]), (0.0, 1.0)).all():
            return paired_difference(self.first, self.second)
        n, both = self.n, int((self.first * self.second).sum())
        sides = (both + self.b, both + self.c)
        (low1, high1), (low2, high2) = (wilson(side, n) for side in sides)
        p1, p2 = (side / n for side in sides)
        phi = _phi(both, self.b, self.c, n - both - self.b - self.c)
        below = (p1 - low1) ** 2 - 2 * phi * (p1 - low1) * (high2 - p2) + (high2 - p2) ** 2
        above = (high1 - p1) ** 2 - 2 * phi * (high1 - p1) * (p2 - low2) + (p2 - low2) ** 2
        low, high = self.drop - math.sqrt(max(below, 0.0)), self.drop + math.sqrt(max(above, 0.0))
        return Interval(self.drop, low, high, "Newcombe, method 10")

    def g(self) -> Interval:
        """Cohen's g: b / (b + c) - 1/2, from -0.5 to 0.5 (0.05 small, 0.15 medium, 0.25 large), Clopper-Pearson."""
        from scipy import stats

        changed = self.b + self.c
        if not changed:
            return Interval(0.0, -0.5, 0.5, "none changed: anything is possible")
        found = stats.binomtest(self.b, changed).proportion_ci(_CONFIDENCE, method="exact")
        return Interval(self.b / changed - 0.5, float(found.low) - 0.5, float(found.high) - 0.5, "Clopper-Pearson")

    def relative(self, seed: int = 0) -> Interval:
        """`drop` as a share of the first side's mean (the paper's main number); the items are resampled."""
        if self.first.sum() == 0:
            return Interval(0.0, None, None, "none: no item is right on the first side")
        rows = np.random.default_rng(seed).integers(self.n, size=(2000, self.n))
        first, second = self.first[rows].mean(1), self.second[rows].mean(1)
        shares = 1 - second[first > 0] / first[first > 0]
        low, high = np.quantile(shares, [0.025, 0.975])
        return Interval(1 - float(self.second.mean() / self.first.mean()), float(low), float(high), "percentile")

    def beyond_chance(self) -> float:
        """b / (right on the first side) - c / (wrong on it): only right items can be lost, only wrong ones won."""
        right = float(self.first.sum())
        lost = self.b / right if right else 0.0
        won = self.c / (self.n - right) if self.n > right else 0.0
        return lost - won

    def power(self, drop: float, alpha: float = 0.05) -> float:
        """The chance that the test sees a true drop of `drop` (0 to 1) on so many items, of which as many change."""
        return power(self.n, drop, self._changing(drop), alpha)

    def needed(self, drop: float, alpha: float = 0.05, wanted: float = 0.8) -> int:
        """Items that make `power` reach `wanted`."""
        return needed(drop, self._changing(drop), alpha, wanted)

    def _changing(self, drop: float) -> float:
        """The share of items that change: as measured (of an unmeasured item, half), and no less than the drop."""
        return min(1.0, max((self.b + self.c + 0.5) / (self.n + 0.5), drop))


def power(n: int, drop: float, changing: float, alpha: float = 0.05) -> float:
    """Power of the two-sided test on `n` items when a share `changing` changes and the mean falls by `drop` (0 to 1).

    Connor 1987 (Biometrics 43), equation 5 solved for the power; only the right side's rejection counts.
    """
    from scipy import stats

    _check(drop, changing)
    z = stats.norm.ppf(1 - alpha / 2)
    spread = math.sqrt(max(changing - drop**2, 1e-12))
    return float(stats.norm.cdf((drop * math.sqrt(n) - z * math.sqrt(changing)) / spread))


def needed(drop: float, changing: float, alpha: float = 0.05, wanted: float = 0.8) -> int:
    """The least n with `power` of at least `wanted` (and no less than `fewest`)."""
    from scipy import stats

    _check(drop, changing)
    z, beyond = stats.norm.ppf(1 - alpha / 2), stats.norm.ppf(wanted)
    root = (z * math.sqrt(changing) + beyond * math.sqrt(max(changing - drop**2, 0.0))) / drop
    return max(math.ceil(root**2), fewest(alpha))


def fewest(alpha: float = 0.05) -> int:
    """Items below which not even a change of all of them to one side is significant: 2 / 2^n < alpha."""
    return math.floor(math.log2(2 / alpha)) + 1


def wilson(right: int, n: int) -> tuple[float, float]:
    """Wilson's score interval of a share."""
    from scipy import stats

    found = stats.binomtest(right, n).proportion_ci(_CONFIDENCE, method="wilson")
    return float(found.low), float(found.high)


def share_interval(values: np.ndarray) -> tuple[float | None, float | None]:
    """The interval of the mean of right (1) and wrong (0) answers; bootstrap where values lie between."""
    if np.isin(values, (0.0, 1.0)).all():
        return wilson(int(values.sum()), len(values))
    found = bootstrap(values)
    return found.low, found.high


def _phi(both: int, b: int, c: int, neither: int) -> float:
    """The sides' correlation, with Newcombe's correction where it is positive."""
    margins = (both + b) * (c + neither) * (both + c) * (b + neither)
    if margins == 0:
        return 0.0
    cross: float = both * neither - b * c
    if cross > 0:
        cross = max(cross - (both + b + c + neither) / 2, 0.0)
    return cross / math.sqrt(margins)


def _check(drop: float, changing: float) -> None:
    if not 0 < drop <= changing <= 1:
        raise InputError(f"a drop of {drop:g} of items of which {changing:g} change is impossible")
