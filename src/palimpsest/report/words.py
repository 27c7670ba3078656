"""Numbers and measurements in words, the same everywhere a result is shown: report, comparison, model card."""

from __future__ import annotations

import math
from collections.abc import Iterable

from palimpsest.audit.cards import card
from palimpsest.core.records import Evidence, Measurement
from palimpsest.core.statistics import bootstrap_interval

DIRECTIONS = {
    "lower": "lower is better",
    "higher": "higher is better",
    "zero": "closer to zero is better",
    "reference": "closer to the reference is better",
}
MINUS = "\N{MINUS SIGN}"


def given(value: float | None) -> bool:
    """Is there a number?  NaN and infinities are none."""
    return value is not None and math.isfinite(value)


def decimals(values: Iterable[float | None]) -> int:
    """How many decimals to show so that numbers of one measurement read alike: three digits of the largest, or one."""
    largest = max((abs(v) for v in values if v is not None and math.isfinite(v)), default=0.0)
    return min(max(2 - math.floor(math.log10(largest)), 1), 9) if largest > 0 else 1


def number(value: float | None, places: int = 1, *, sign: bool = False) -> str:
    """``-3.14`` with a real minus sign; an em dash where there is no number."""
    if value is None or not math.isfinite(value):
        return "\N{EM DASH}"
    text = f"{value:.2e}" if abs(value) >= 1e7 else f"{value:{'+' if sign else ''}.{places}f}"
    if float(text) == 0:
        text = text.lstrip("+-")
    return text.replace("-", MINUS)


def interval(low: float | None, high: float | None, places: int = 1) -> str:
    """``14.0 to 25.7``, or nothing where there is no interval."""
    return f"{number(low, places)} to {number(high, places)}" if given(low) and given(high) else ""


def percent(share: float) -> str:
    return f"{share:.0%}".replace("-", MINUS)


def lower_first(title: str) -> str:
    """A title inside a sentence."""
    return title[:1].lower() + title[1:]


def places_of(m: Measurement) -> int:
    return decimals((m.before, m.after, m.reference, m.low, m.high))


def is_mean(values: tuple[float, ...], value: float | None) -> bool:
    """Are `values` scores of records whose mean is the measurement?  (Those behind an AUC are not.)"""
    if value is None or not values or not all(math.isfinite(v) for v in values):
        return False
    return math.isclose(math.fsum(values) / len(values), value, rel_tol=1e-4, abs_tol=1e-4)


def reference_interval(m: Measurement) -> tuple[float, float] | None:
    """The 95% interval of the reference's mean over records, where its per-record scores are known."""
    if not is_mean(m.reference_values, m.reference):
        return None
    low, high = bootstrap_interval(m.reference_values)
    return None if low is None or high is None else (low, high)


def missing(m: Measurement | None, name: str = "") -> str:
    """Why there is no number (of the measurement `m`, or of `name` where there is not even that), and what it needs."""
    if m is not None and m.note:
        return m.note
    return f"Needs {card(m.name if m else name).needs or 'data that this run was not given'}."


def method_label(evidence: Evidence) -> str:
    return str(evidence.method.get("name") or evidence.kind)


def duration(seconds: float) -> str:
    """``8.2 s``, ``3 min 20 s``, ``2 h 5 min``."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"
