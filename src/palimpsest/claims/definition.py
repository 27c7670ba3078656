"""A claim: what a paper says, what we expect to see at our scale, and the function that measures it.

A claim's module holds one function under the decorator::

    @claim(
        paper="muse",
        statement="NPO keeps more utility than gradient ascent at equal forgetting.",
        paper_says={"utility NPO, News": 0.40, "utility GA, News": 0.0},
        expectations=(Expect("utility_npo", minus="utility_ga", at_least=0.2),),
        minutes=2,
        data="generated: 160 fictional people",
    )
    def measure(seed: int, mechanism: bool = True, scale: float = 1.0) -> dict[str, float]: ...

Expectations are fixed before anything is tuned.  ``mechanism=False`` is the negative control: it switches off exactly
the paper's idea and leaves data, budget and baselines alone.  ``scale`` shrinks the experiment for a unit test; only
1.0 counts.
Knows nothing of processes, caches or files.
"""

from __future__ import annotations

import inspect
import math
import numbers
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal, Protocol

from palimpsest.core.statistics import Interval, bootstrap, paired_difference

Verdict = Literal["holds", "fails", "unclear", "untested"]

_ROUNDING = 1e-9  # 0.3 - 0.1 must count as "at least 0.2"


class ClaimError(RuntimeError):
    """A claim could not be measured as it says: a programming error in the claim, not a result."""


class NotFinite(ClaimError):
    """A measured value is NaN or infinite: the experiment broke down, which is a result (fails, with words)."""


class Measure(Protocol):
    def __call__(self, seed: int, mechanism: bool = True, scale: float = 1.0) -> Mapping[str, float]: ...


@dataclass(frozen=True)
class Expect:
    """A direction and a size: the mean over seeds of `value` (minus that of `minus`, seed by seed) lies within bounds.

    Exactly one of `at_least`, `at_most` and `within` is given.
    """

    value: str
    minus: str | None = None
    at_least: float | None = None
    at_most: float | None = None
    within: tuple[float, float] | None = None

    def __post_init__(self) -> None:
        if sum(bound is not None for bound in (self.at_least, self.at_most, self.within)) != 1:
            raise ValueError(f"{self.name}: give exactly one of at_least, at_most and within")
        low, high = self.bounds
        if math.isnan(low) or math.isnan(high) or low >= high:
            raise ValueError(f"{self.name}: no value lies within ({low}, {high})")

    @property
    def name(self) -> str:
        return self.value if self.minus is None else f"{self.value} - {self.minus}"

    @property
    def bounds(self) -> tuple[float, float]:
        if self.within is not None:
            return self.within
        return (
            -math.inf if self.at_least is None else self.at_least,
            math.inf if self.at_most is None else self.at_most,
        )

    def __str__(self) -> str:
        if self.within is not None:
            return f"{self.name} within {self.within[0]:g} to {self.within[1]:g}"
        return f"{self.name} >= {self.at_least:g}" if self.at_most is None else f"{self.name} <= {self.at_most:g}"

    def interval(self, values: Mapping[str, Sequence[float]]) -> Interval:
        """The expected quantity with its 95% interval; `values` holds one number a seed, in the same order of seeds."""
        if self.minus is None:
            return bootstrap(values[self.value])
        return paired_difference(values[self.value], values[self.minus])

    def verdict(self, interval: Interval) -> Verdict:
        """``holds`` if the whole interval lies within the bounds, ``fails`` if all of it is outside."""
        if interval.low is None or interval.high is None:
            return "unclear"
        low, high = self.bounds
        if interval.low >= low - _ROUNDING and interval.high <= high + _ROUNDING:
            return "holds"
        if interval.high < low - _ROUNDING or interval.low > high + _ROUNDING:
            return "fails"
        return "unclear"


def overall(verdicts: Sequence[Verdict]) -> Verdict:
    """The verdict over all expectations: one that fails decides, then one that is unclear."""
    if "fails" in verdicts:
        return "fails"
    return "holds" if all(verdict == "holds" for verdict in verdicts) else "unclear"


@dataclass(frozen=True)
class Claim:
    """One paper's claim.  Call it to measure one seed; the values come back checked: all are there and finite."""

    paper: str  # slug
    statement: str
    paper_says: Mapping[str, float | str]  # the paper's own numbers, with their units and where they stand
    expectations: tuple[Expect, ...]
    minutes: float  # what 5 seeds with their controls should take on 2 cores
    data: str  # "generated: ..." or "real: ..."
    note: str
    measure: Measure = field(repr=False)

    def __post_init__(self) -> None:
        if not self.expectations:
            raise ValueError(f"the claim of {self.paper} expects nothing")
        if not self.data.startswith(("generated: ", "real: ")):
            raise ValueError(
                f"the claim of {self.paper}: data begins with 'generated: ' or 'real: ', not {self.data!r}"
            )
        if self.minutes <= 0:
            raise ValueError(f"the claim of {self.paper}: minutes must be positive, not {self.minutes}")
        parameters = list(inspect.signature(self.measure).parameters)
        if parameters != ["seed", "mechanism", "scale"]:
            found = ", ".join(parameters)
            raise TypeError(f"the claim of {self.paper}: measure takes (seed, mechanism, scale), not ({found})")

    @property
    def names(self) -> list[str]:
        """The values that the expectations speak of, in the order they are first named."""
        named = [name for expect in self.expectations for name in (expect.value, expect.minus) if name is not None]
        return list(dict.fromkeys(named))

    def __call__(self, seed: int, mechanism: bool = True, scale: float = 1.0) -> dict[str, float]:
        """Measure one seed.

        Raises ClaimError if an expected value is missing or one is not a number, NotFinite if one is NaN or infinite.
        """
        run = f"{self.paper}, seed {seed}{'' if mechanism else ', control'}"
        measured = dict(self.measure(seed, mechanism=mechanism, scale=scale))
        missing = [name for name in self.names if name not in measured]
        if missing:
            raise ClaimError(
                f"{run}: measure returned no {', '.join(missing)} (it returned {', '.join(measured) or 'nothing'})"
            )
        for name, value in measured.items():
            if not isinstance(value, numbers.Real):
                raise ClaimError(f"{run}: {name} must be a number, not {type(value).__name__}")
            if not math.isfinite(value):
                raise NotFinite(f"{run}: {name} is {float(value)}")
        return {name: float(value) for name, value in measured.items()}


def claim(
    *,
    paper: str,
    statement: str,
    paper_says: Mapping[str, float | str],
    expectations: Sequence[Expect],
    minutes: float,
    data: str,
    note: str = "",
) -> Callable[[Measure], Claim]:
    """Turn ``measure(seed, mechanism=True, scale=1.0) -> {name: value}`` into the `Claim` of a paper.

    Values of which nothing is expected are reported all the same.
    """

    def wrap(measure: Measure) -> Claim:
        return Claim(paper, statement, dict(paper_says), tuple(expectations), minutes, data, note, measure)

    return wrap
