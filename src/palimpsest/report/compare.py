"""Is one method better than another?  Paired tests over the same records, corrected for looking at many pairs.

`compare` gives every pair of methods a `Finding` on every measurement; `write` puts them into ``compare.html`` and
``compare.csv``.  A difference is only called one when its 95% interval leaves out zero and Holm's correction (over all
pairs of methods on that measurement) leaves p below 0.05.  Knows nothing of how anything was measured.
"""

from __future__ import annotations

import csv
import itertools
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from palimpsest.audit.cards import card
from palimpsest.core.errors import InputError
from palimpsest.core.files import atomic_file
from palimpsest.core.records import Evidence, Measurement
from palimpsest.core.statistics import holm, paired_difference, paired_p
from palimpsest.report.words import given, interval, is_mean, lower_first, method_label, number, places_of

LEVEL = 0.05
_BETTER_BY = {
    "lower": "lower by",
    "higher": "higher by",
    "zero": "closer to zero by",
    "reference": "closer to the reference by",
}


@dataclass(frozen=True)
class Finding:
    """How methods `a` and `b` differ on one measurement.

    `difference` is how much better `a` is than `b` (negative: worse), in the measurement's unit, with its 95% interval.
    """

    measurement: str
    a: str
    b: str
    difference: float | None
    low: float | None
    high: float | None
    p: float | None
    p_corrected: float | None  # Holm, over all pairs on this measurement
    n: int  # paired records
    better: str  # the label of the better method, or "" where no difference is shown
    why: str = ""  # no test was possible because ...
    sentence: str = ""


def labels(evidences: Sequence[Evidence]) -> list[str]:
    """One label a method; where a name comes twice, the settings that differ are added."""
    names = [method_label(evidence) for evidence in evidences]
    labelled = []
    for place, (name, evidence) in enumerate(zip(names, evidences, strict=True)):
        twins = [other for other, twin in zip(evidences, names, strict=True) if twin == name]
        own: dict[str, Any] = evidence.method.get("config") or {}
        differing = [
            key for key in own if any((twin.method.get("config") or {}).get(key) != own[key] for twin in twins)
        ]
        inside = ", ".join(f"{key}={own[key]}" for key in differing)
        label = f"{name} ({inside})" if inside else name
        labelled.append(f"{label} [{place + 1}]" if label in labelled else label)
    return labelled


def compare(evidences: Sequence[Evidence]) -> list[Finding]:
    """A `Finding` for every measurement that two methods share and every pair of them.

    Raises InputError when there are fewer than two, or when they were not measured on the same data.
    """
    if len(evidences) < 2:
        raise InputError(f"a comparison needs at least two methods, found {len(evidences)}")
    names = labels(evidences)
    _refuse_different_data(evidences, names)
    findings: list[Finding] = []
    for measurement in measurement_names(evidences):
        pairs = [
            _pair(names[i], evidences[i][measurement], names[j], evidences[j][measurement])
            for i, j in itertools.combinations(range(len(evidences)), 2)
            if _has(evidences[i], measurement) and _has(evidences[j], measurement)
        ]
        findings += _corrected(pairs, evidences)
    return findings


def measurement_names(evidences: Sequence[Evidence]) -> list[str]:
    """Every measurement of any of them, in the order in which they first come."""
    return list(dict.fromkeys(m.name for evidence in evidences for m in evidence.measurements))


def identical(evidences: Sequence[Evidence]) -> list[tuple[str, str]]:
    """Pairs of methods that left the very same weights: one of them did nothing, or both did the same."""
    names = labels(evidences)
    hashes = [(evidence.model.get("after") or {}).get("sha256") for evidence in evidences]
    return [
        (names[i], names[j])
        for i, j in itertools.combinations(range(len(names)), 2)
        if hashes[i] and hashes[i] == hashes[j]
    ]


def unbeaten(findings: Sequence[Finding], measurement: str, label: str) -> bool:
    """Was `label` tested on `measurement`, and no other method shown to be better?"""
    own = [f for f in findings if f.measurement == measurement and label in (f.a, f.b) and f.p is not None]
    return bool(own) and all(f.better in ("", label) for f in own)


def write(evidences: Sequence[Evidence], folder: str | Path, headline: str | None = None) -> Path:
    """Write ``compare.html`` and ``compare.csv`` into `folder`; returns the path of the page."""
    from palimpsest.report.html import compare_page

    findings = compare(evidences)
    page = Path(folder) / "compare.html"
    compare_page(evidences, findings, page, headline)
    with (
        atomic_file(page.with_suffix(".csv")) as temporary,
        temporary.open("w", newline="", encoding="utf-8") as handle,
    ):
        writer = csv.DictWriter(handle, fieldnames=list(Finding.__dataclass_fields__))
        writer.writeheader()
        writer.writerows(asdict(finding) for finding in findings)
    return page


def _pair(a: str, one: Measurement, b: str, two: Measurement) -> Finding:
    """The finding for one pair, before correction.

    For "lower" and "higher" the records' scores are compared directly.  For "zero" and "reference" a record counts by
    how far it pulls its method's mean away from the target, on the side where that mean lies; this can only understate
    the advantage of a method whose true mean is at the target.
    """
    blank = Finding(one.name, a, b, None, None, None, None, None, 0, "")
    for label, m in ((a, one), (b, two)):
        if not given(m.after):
            return replace(blank, why=f"{label} has no number")
        if not is_mean(m.values, m.after):
            return replace(blank, why=f"{label} has no per-record scores whose mean this is")
    if len(one.values) != len(two.values):
        return replace(blank, why=f"{len(one.values)} records against {len(two.values)}")
    if one.better != two.better:
        return replace(blank, why=f"{a} wants it {one.better}, {b} wants it {two.better}")
    if len(one.values) < 2:
        return replace(blank, why="one record is not enough")
    costs = _costs(one), _costs(two)
    if costs[0] is None or costs[1] is None:
        return replace(blank, why="there is no reference to be close to")
    gain = paired_difference(costs[1], costs[0])
    p = paired_p(costs[1], costs[0])
    return replace(blank, difference=gain.value, low=gain.low, high=gain.high, p=p, n=len(one.values))


def _costs(m: Measurement) -> np.ndarray | None:
    """(N,) what each record adds to how bad the measurement is; the mean is the badness."""
    values = np.asarray(m.values, dtype=np.float64)
    if m.better == "lower":
        return values
    if m.better == "higher":
        return -values
    target: np.ndarray | float = 0.0
    if m.better == "reference":
        if m.reference is None or not given(m.reference):
            return None
        paired = len(m.reference_values) == len(values) and is_mean(m.reference_values, m.reference)
        target = np.asarray(m.reference_values, dtype=np.float64) if paired else m.reference
    away = values - target
    return away if away.mean() >= 0 else -away


def _corrected(pairs: list[Finding], evidences: Sequence[Evidence]) -> list[Finding]:
    tested = [finding for finding in pairs if finding.p is not None]
    corrected = (
        dict(zip(map(id, tested), holm([f.p for f in tested if f.p is not None]), strict=True)) if tested else {}
    )
    done = []
    for finding in pairs:
        p = float(corrected[id(finding)]) if id(finding) in corrected else None
        shown = (
            p is not None and p < LEVEL and finding.low is not None and not finding.low <= 0 <= (finding.high or 0.0)
        )
        better = (finding.a if (finding.difference or 0.0) > 0 else finding.b) if shown else ""
        finding = replace(finding, p_corrected=p, better=better)
        model = next(e[finding.measurement] for e in evidences if _has(e, finding.measurement))
        done.append(replace(finding, sentence=_sentence(finding, model)))
    return done


def _sentence(finding: Finding, m: Measurement) -> str:
    title, places = lower_first(card(m.name).title), places_of(m)
    if finding.difference is None:
        return f"{finding.a} and {finding.b} on {title}: no test, because {finding.why}."
    low, high, p = finding.low, finding.high, probability(finding.p_corrected)
    if not finding.better:
        return (
            f"{finding.a} and {finding.b} on {title}: no difference shown "
            f"({number(finding.difference, places, sign=True)}, 95% interval {interval(low, high, places)}, {p})."
        )
    gain = finding.difference
    other = finding.b
    if finding.better == finding.b:
        gain, other = -gain, finding.a
        low, high = (-high if high is not None else None), (-low if low is not None else None)
    return (
        f"{finding.better} is better than {other} on {title}: {_BETTER_BY[m.better]} {number(gain, places)} "
        f"(95% interval {interval(low, high, places)}, {p})."
    )


def probability(p: float | None) -> str:
    if p is None:
        return ""
    return "p < 0.001" if p < 0.001 else f"p = {p:.3f}"


def _has(evidence: Evidence, name: str) -> bool:
    return any(m.name == name for m in evidence.measurements)


def _refuse_different_data(evidences: Sequence[Evidence], names: list[str]) -> None:
    for part in ("forget", "retain", "utility", "holdout"):
        hashes = [(evidence.data.get(part) or {}).get("sha256") for evidence in evidences]
        for other, found in enumerate(hashes):
            if found != hashes[0]:
                raise InputError(
                    f"{names[0]} and {names[other]} were not measured on the same data: the {part} sets differ "
                    f"(sha256 {str(hashes[0])[:12]} and {str(found)[:12]})"
                )
