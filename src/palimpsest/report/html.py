"""The report: one self-contained page that says in words what the measurements say, and shows everything behind it.

No script, no request, no font to fetch: style and pictures are inside, and texts from models and data are escaped by
the templates.  The same page serves light, dark, phone and paper.  Knows the shape of `Evidence` and nothing of how it
came about.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import palimpsest
from palimpsest.audit.cards import MetricCard, card
from palimpsest.core.errors import InputError
from palimpsest.core.files import sha256_of, write_text
from palimpsest.core.records import Evidence, Measurement
from palimpsest.report import parts, plots
from palimpsest.report.compare import Finding, identical, labels, measurement_names, probability, unbeaten
from palimpsest.report.intruder import intruder
from palimpsest.report.verdict import Level, verdict
from palimpsest.report.words import (
    DIRECTIONS,
    duration,
    given,
    interval,
    method_label,
    missing,
    number,
    places_of,
    reference_interval,
)

if TYPE_CHECKING:
    from jinja2 import Environment

SIX_WAYS = ("verbatim", "knowledge", "privacy_leakage", "utility", "scalability", "sustainability")
LEVEL_WORDS: dict[Level, str] = {
    "good": "Holds up",
    "mixed": "In part",
    "bad": "Does not hold up",
    "unknown": "Cannot be said",
}


def write(evidence: Evidence, folder: str | Path) -> Path:
    """Write ``report.html`` into `folder`; returns its path."""
    path = Path(folder) / "report.html"
    found = verdict(evidence)
    runs = [_evidence_of(run) for run in evidence.extras.get("runs") or ()]
    context = {
        "title": f"{found.headline} \N{MIDDLE DOT} {method_label(evidence)}",
        "kicker": f"{evidence.kind} report",
        "verdict": found,
        "level": LEVEL_WORDS[found.level],
        "note": evidence.extras.get("verdict") or "",
        "undertext": str((evidence.model.get("before") or {}).get("sha256") or sha256_of(evidence.to_json())),
        "facts": _facts(evidence),
        "panels": _panels(evidence),
        "rows": [parts.row(m) for m in evidence.measurements],
        "examples": parts.examples(evidence.extras.get("examples") or ()),
        "asked": evidence.extras.get("asked") or "",
        "courses": parts.courses(evidence),
        "attacks": parts.attacks(evidence),
        "intruder": intruder(evidence),
        "curves": parts.curves(evidence.extras.get("curves") or {}),
        "tables": _tables(evidence),
        "matrix": _matrix(runs, []) if runs else None,
        "config": parts.flat(evidence.method.get("config") or {}),
        "models": parts.hashed(evidence.model),
        "data": parts.hashed(evidence.data),
        "environment": parts.flat(evidence.environment),
    }
    render("report.html", context, path)
    return path


_SHOWN_PAIRWISE = 10  # methods; with more, a page of all pairs is no longer read


def compare_page(
    evidences: Sequence[Evidence], findings: Sequence[Finding], path: Path, headline: str | None = None
) -> None:
    """Write the page that holds several methods against each other.  `findings` as from `compare.compare`.

    `headline`: by default how many of the verdicts are good.
    """
    names = labels(evidences)
    verdicts = [verdict(evidence) for evidence in evidences]
    tested = [f for f in findings if f.p is not None]
    shown = sum(1 for f in tested if f.better)
    holding = sum(1 for found in verdicts if found.level == "good")
    verb = "holds" if holding <= 1 else "hold"
    seen = dict.fromkeys(f.measurement for f in findings)
    groups = [(card(name).title, [f for f in findings if f.measurement == name]) for name in seen]
    many = len(names) > _SHOWN_PAIRWISE
    context = {
        "title": f"Comparison \N{MIDDLE DOT} {', '.join(names)}",
        "kicker": "comparison",
        "headline": headline or f"{holding or 'None'} of {len(names)} methods {verb} up",
        "tests_shown": f"{shown} of {len(tested)} paired tests show a difference." if tested else "",
        "identical": identical(evidences),
        "undertext": sha256_of(names),
        "methods": [(name, found, LEVEL_WORDS[found.level]) for name, found in zip(names, verdicts, strict=True)],
        "panels": _comparison_panels(evidences, names),
        "matrix": _matrix(evidences, findings),
        "groups": [(title, _standings(found) if many else _sentences(found)) for title, found in groups],
        "costs": _costs(evidences, names),
        "tests": [] if many else [_test_row(finding) for finding in findings],
        "data": parts.hashed(evidences[0].data),
        "environment": parts.flat(evidences[0].environment),
    }
    render("compare.html", context, path)


def _sentences(findings: Sequence[Finding]) -> list[tuple[str, bool]]:
    """A sentence for each pair, and whether a difference was shown; one for all where none could be tested."""
    if all(finding.p is None for finding in findings):
        return [(f"No paired test was possible ({findings[0].why}). Compare the intervals.", False)]
    return [(finding.sentence, bool(finding.better)) for finding in findings]


def _standings(findings: Sequence[Finding]) -> list[tuple[str, bool]]:
    """A sentence for each method: how many others it was shown to be better and worse than, the best first."""
    tested = [finding for finding in findings if finding.p is not None]
    if not tested:
        return _sentences(findings)
    won: Counter[str] = Counter()
    lost: Counter[str] = Counter()
    for finding in tested:
        won.update({finding.a: 0, finding.b: 0})
        if finding.better:
            won[finding.better] += 1
            lost[finding.b if finding.better == finding.a else finding.a] += 1
    ranked = sorted(won, key=lambda name: (lost[name] - won[name], name))
    return [
        (f"{name}: better than {won[name] or 'none'}, worse than {lost[name] or 'none'} of the others.", not lost[name])
        for name in ranked
    ]


_LEFT, _RIGHT = "\N{LEFTWARDS ARROW}", "\N{RIGHTWARDS ARROW}"
_ARROWS = {"lower": _LEFT, "higher": _RIGHT, "zero": _RIGHT + _LEFT, "reference": _RIGHT + _LEFT}


@dataclass(frozen=True)
class Panel:
    key: str
    card: MetricCard
    direction: str
    arrow: str
    svg: Any  # markup; empty where there is nothing to draw
    needs: str


def _panels(evidence: Evidence) -> list[Panel]:
    """The six ways, the missing ones with what they need; or every measurement, where none of the six is there."""
    by_name = {m.name: m for m in evidence.measurements}
    six = any(name in by_name for name in SIX_WAYS)
    panels = []
    for place, name in enumerate(SIX_WAYS if six else by_name):
        m = by_name.get(name)
        key = f"panel{place}"
        better = m.better if m else card(name).better or "lower"
        drawn = m is not None and (given(m.after) or given(m.before))
        svg = parts.markup(plots.panel(m, key)) if m is not None and drawn else ""
        needs = "" if m is not None and given(m.after) else missing(m, name)
        panels.append(Panel(key, card(name), DIRECTIONS[better], _ARROWS[better], svg, needs))
    return panels


def _costs(evidences: Sequence[Evidence], names: Sequence[str]) -> dict[str, Any] | None:
    """What each method took, and whether it changed weights or put a guard before them; None where nothing is known."""
    found = [evidence.extras.get("cost") for evidence in evidences]
    if not any(found):
        return None
    keys = ("changed", "seconds", "steps", "extra_parameters")
    rows = []
    for name, cost in zip(names, found, strict=True):
        cells = ((cost or {}).get(key) for key in keys)
        rows.append([name, *("" if cell is None else f"{cell:,}" if isinstance(cell, int) else cell for cell in cells)])
    return {"heads": ["Method", "What it changed", "Seconds", "Optimiser steps", "Parameters added"], "rows": rows}


def _comparison_panels(evidences: Sequence[Evidence], names: list[str]) -> list[Panel]:
    panels = []
    for place, name in enumerate(measurement_names(evidences)):
        measured = ((label, _after(evidence, name)) for label, evidence in zip(names, evidences, strict=True))
        found = [(label, m) for label, m in measured if m is not None]
        if not found:
            continue
        first = found[0][1]
        lanes = [plots.Lane(label, m.after, m.low, m.high) for label, m in found]
        svg = plots.lanes_figure(first, lanes, f"panel{place}", bounds=reference_interval(first), margin=112)
        panels.append(
            Panel(f"panel{place}", card(name), DIRECTIONS[first.better], _ARROWS[first.better], parts.markup(svg), "")
        )
    return panels


def _tables(evidence: Evidence) -> list[dict[str, Any]]:
    """What the run recorded as rows, each under its heading."""
    heads = {"table": "Side by side", "filters": "Prompts stopped by each screen of the filter alone, in percent"}
    found = {name: parts.table(evidence.extras.get(name) or ()) for name in heads}
    return [{"id": name, "title": heads[name], **table} for name, table in found.items() if table]


def _facts(evidence: Evidence) -> list[tuple[str, str]]:
    facts = [("Method", method_label(evidence))]
    source = (evidence.model.get("before") or {}).get("source")
    if source:
        facts.append(("Model", parts.cut(str(source), 80)))
    for name, found in evidence.data.items():
        if isinstance(found, Mapping) and "rows" in found:
            facts.append((f"{name.replace('_', ' ').capitalize()} records", f"{found['rows']:,}"))
    if evidence.seconds:
        facts.append(("Time", duration(evidence.seconds)))
    return facts


def _matrix(evidences: Sequence[Evidence], findings: Sequence[Finding]) -> dict[str, Any]:
    """Methods down, measurements across.  A cell is strong where no other method was shown to be better."""
    names = labels(evidences)
    columns = [name for name in measurement_names(evidences) if any(_after(e, name) for e in evidences)]
    rows = []
    for label, evidence in zip(names, evidences, strict=True):
        cells = []
        for name in columns:
            m = _after(evidence, name)
            cells.append(
                {
                    "value": number(m.after, places_of(m)) if m else "\N{EM DASH}",
                    "interval": interval(m.low, m.high, places_of(m)) if m else "",
                    "strong": bool(m) and unbeaten(findings, name, label),
                }
            )
        rows.append((label, cells, duration(evidence.seconds) if evidence.seconds else ""))
    firsts = [next(m for e in evidences if (m := _after(e, name))) for name in columns]
    reference = ["0" if m.better == "zero" else number(m.reference, places_of(m)) for m in firsts]
    heads = [(card(m.name).title, DIRECTIONS[m.better].removesuffix(" is better")) for m in firsts]
    return {"heads": heads, "rows": rows, "reference": reference, "tested": any(f.p is not None for f in findings)}


def _after(evidence: Evidence, name: str) -> Measurement | None:
    return next((m for m in evidence.measurements if m.name == name and given(m.after)), None)


def _test_row(finding: Finding) -> list[str]:
    dash = "\N{EM DASH}"
    places = 3 if finding.difference is not None and abs(finding.difference) < 1 else 1
    unshown = f"no test: {finding.why}" if finding.why else "no difference shown"
    return [
        card(finding.measurement).title,
        finding.a,
        finding.b,
        number(finding.difference, places, sign=True),
        interval(finding.low, finding.high, places) or dash,
        probability(finding.p) or dash,
        probability(finding.p_corrected) or dash,
        str(finding.n or dash),
        f"{finding.better} is better" if finding.better else unshown,
    ]


def _evidence_of(value: Mapping[str, Any]) -> Evidence:
    """Evidence from its JSON form, without per-record values."""
    try:
        measurements = tuple(Measurement(**row) for row in value["measurements"])
        names = ("kind", "method", "model", "data")
        return Evidence(
            measurements=measurements,
            **{name: value[name] for name in names},
            environment=value.get("environment") or {},
            seconds=value.get("seconds") or 0.0,
        )
    except (KeyError, TypeError) as error:
        raise InputError(f"extras.runs holds something that is not evidence ({error!r})") from None


def environment() -> Environment:
    """The templates; every value put into one is escaped."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    folder = Path(__file__).with_name("templates")
    return Environment(
        loader=FileSystemLoader(folder),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )


def render(template: str, context: dict[str, Any], path: Path) -> None:
    templates = environment()
    style = parts.markup((Path(__file__).with_name("templates") / "style.css").read_text(encoding="utf-8"))
    page = templates.get_template(template).render(style=style, version=palimpsest.__version__, **context)
    # a model can write half a surrogate pair, which no file can hold
    write_text(path, page.encode("utf-8", "replace").decode("utf-8"))
