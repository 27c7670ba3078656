"""The report: one self-contained page that says in words what the measurements say, and shows everything behind it.

No script, no request, no font to fetch: style and pictures are inside, and texts from models and data are escaped by
the templates.  The same page serves light, dark, phone and paper.  Knows the shape of `Evidence` and nothing of how it
came about.
"""

from __future__ import annotations

import difflib
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import palimpsest
from palimpsest.audit.cards import MetricCard, card
from palimpsest.core.errors import InputError
from palimpsest.core.files import sha256_of, write_text
from palimpsest.core.records import Evidence, Measurement
from palimpsest.report import plots
from palimpsest.report.compare import Finding, identical, labels, measurement_names, probability, unbeaten
from palimpsest.report.verdict import Level, reading, verdict
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

# so that a page stays under 1 MB whatever the evidence holds
_EXAMPLES, _EXAMPLES_SHOWN, _EXAMPLE_CHARACTERS, _PROMPT_CHARACTERS = 40, 6, 700, 360
_CURVES, _CURVE_ROWS, _TABLE_ROWS, _CELL_CHARACTERS = 12, 12, 200, 300

Parts = list[tuple[str, bool]]  # pieces of a text, each with whether it also stands in the truth


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
        "rows": [_row(m) for m in evidence.measurements],
        "examples": _examples(evidence.extras.get("examples") or ()),
        "curves": _curves(evidence.extras.get("curves") or {}),
        "table": _table(evidence.extras.get("table") or ()),
        "matrix": _matrix(runs, []) if runs else None,
        "config": _flat(evidence.method.get("config") or {}),
        "models": _hashed(evidence.model),
        "data": _hashed(evidence.data),
        "environment": _flat(evidence.environment),
    }
    _render("report.html", context, path)
    return path


def compare_page(evidences: Sequence[Evidence], findings: Sequence[Finding], path: Path) -> None:
    """Write the page that holds several methods against each other.  `findings` as from `compare.compare`."""
    names = labels(evidences)
    verdicts = [verdict(evidence) for evidence in evidences]
    tested = [f for f in findings if f.p is not None]
    shown = sum(1 for f in tested if f.better)
    holding = sum(1 for found in verdicts if found.level == "good")
    verb = "holds" if holding <= 1 else "hold"
    seen = dict.fromkeys(f.measurement for f in findings)
    groups = [(card(name).title, [f for f in findings if f.measurement == name]) for name in seen]
    context = {
        "title": f"Comparison \N{MIDDLE DOT} {', '.join(names)}",
        "kicker": "comparison",
        "headline": f"{holding or 'None'} of {len(names)} methods {verb} up",
        "tests_shown": f"{shown} of {len(tested)} paired tests show a difference." if tested else "",
        "identical": identical(evidences),
        "undertext": sha256_of(names),
        "methods": [(name, found, LEVEL_WORDS[found.level]) for name, found in zip(names, verdicts, strict=True)],
        "panels": _comparison_panels(evidences, names),
        "matrix": _matrix(evidences, findings),
        "groups": groups,
        "tests": [_test_row(finding) for finding in findings],
        "data": _hashed(evidences[0].data),
        "environment": _flat(evidences[0].environment),
    }
    _render("compare.html", context, path)


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
        svg = _markup(plots.panel(m, key)) if m is not None and drawn else ""
        needs = "" if m is not None and given(m.after) else missing(m, name)
        panels.append(Panel(key, card(name), DIRECTIONS[better], _ARROWS[better], svg, needs))
    return panels


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
            Panel(f"panel{place}", card(name), DIRECTIONS[first.better], _ARROWS[first.better], _markup(svg), "")
        )
    return panels


def _row(m: Measurement) -> dict[str, Any]:
    places, bounds = places_of(m), reference_interval(m)
    entry = card(m.name)
    few = bool(m.n and m.n < entry.needs_records)
    return {
        "name": m.name,
        "group": m.group,
        "card": entry,
        "direction": DIRECTIONS[m.better],
        "before": number(m.before, places),
        "after": number(m.after, places),
        "interval": interval(m.low, m.high, places),
        "reference": number(m.reference, places),
        "reference_interval": interval(*bounds, places) if bounds else "",
        "reading": reading(m),
        "n": m.n,
        "few": few,
        "missing": "" if given(m.after) else missing(m),
        "note": m.note if given(m.after) else "",
    }


def _facts(evidence: Evidence) -> list[tuple[str, str]]:
    facts = [("Method", method_label(evidence))]
    source = (evidence.model.get("before") or {}).get("source")
    if source:
        facts.append(("Model", _cut(str(source), 80)))
    for name, found in evidence.data.items():
        if isinstance(found, Mapping) and "rows" in found:
            facts.append((f"{name.replace('_', ' ').capitalize()} records", f"{found['rows']:,}"))
    if evidence.seconds:
        facts.append(("Time", duration(evidence.seconds)))
    return facts


def _examples(examples: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Examples by set, at most `_EXAMPLES`, the sets taking turns so that none is crowded out."""
    sets: dict[str, list[dict[str, Any]]] = {}
    for example in examples:
        sets.setdefault(str(example.get("set") or "examples"), []).append(dict(example))
    each = max(1, _EXAMPLES // max(1, len(sets)))
    sets = dict(list(sets.items())[:_EXAMPLES])
    kept = {name: [_example(example) for example in found[:each]] for name, found in sets.items()}
    return {"sets": kept, "shown": _EXAMPLES_SHOWN, "left_out": len(examples) - sum(map(len, kept.values()))}


def _example(example: Mapping[str, Any]) -> dict[str, Any]:
    truth = _cut(_text(example.get("truth")), _EXAMPLE_CHARACTERS)
    prompt = _text(example.get("prompt"))
    if len(prompt) > _PROMPT_CHARACTERS:  # the end of a prompt is what is continued
        prompt = f"\N{HORIZONTAL ELLIPSIS}{prompt[-_PROMPT_CHARACTERS:]}"
    answers = [
        (name, overlap(_cut(_text(example[name]), _EXAMPLE_CHARACTERS), truth))
        for name in ("before", "after", "reference")
        if example.get(name) is not None
    ]
    return {"prompt": prompt, "truth": truth, "answers": answers}


def overlap(text: str, truth: str) -> Parts:
    """`text` in pieces, each with whether its words also stand in `truth` in the same order (ROUGE-L's idea)."""
    words, wanted = re.findall(r"\S+\s*", text), re.findall(r"\S+", truth)
    bare = [_bare(word) for word in words]
    matcher = difflib.SequenceMatcher(None, bare, [_bare(word) for word in wanted], autojunk=False)
    shared = {i for block in matcher.get_matching_blocks() for i in range(block.a, block.a + block.size) if bare[i]}
    parts: Parts = []
    for place, word in enumerate(words):
        if parts and parts[-1][1] == (place in shared):
            parts[-1] = (parts[-1][0] + word, parts[-1][1])
        elif parts and parts[-1][1]:  # the space behind a mark is not marked
            marked = parts[-1][0].rstrip()
            parts[-1:] = [(marked, True), (parts[-1][0][len(marked) :] + word, False)]
        else:
            parts.append((word, place in shared))
    return parts


def _bare(word: str) -> str:
    return re.sub(r"\W+", "", word.lower())


def _curves(curves: Mapping[str, Sequence[float]]) -> list[dict[str, Any]]:
    found = []
    for place, (name, values) in enumerate(list(curves.items())[:_CURVES]):
        loss = [float(v) for v in values if v is not None]
        if not loss:
            continue
        stride = max(1, math.ceil(len(loss) / _CURVE_ROWS))
        steps = sorted({*range(0, len(loss), stride), len(loss) - 1})
        found.append(
            {
                "name": _cut(str(name), 80),
                "svg": _markup(plots.curve(loss, f"curve{place}", str(name))),
                "points": [(step + 1, f"{loss[step]:.4g}".replace("-", "\N{MINUS SIGN}")) for step in steps],
            }
        )
    return found


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


def _table(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any] | None:
    """Rows of any dicts: columns in the order in which they first come."""
    if not rows:
        return None
    columns = list(dict.fromkeys(key for row in rows for key in row))
    cells = [[_cell(row.get(column)) for column in columns] for row in rows[:_TABLE_ROWS]]
    heads = [str(column).replace("_", " ") for column in columns]
    return {"columns": heads, "rows": cells, "left_out": max(0, len(rows) - _TABLE_ROWS)}


def _cell(value: Any) -> str:
    if value is None:
        return "\N{EM DASH}"
    if isinstance(value, float):
        return number(value, 0 if value.is_integer() and abs(value) >= 10 else 2)
    return _cut(str(value), _CELL_CHARACTERS)


def _flat(values: Mapping[str, Any], prefix: str = "") -> list[tuple[str, str]]:
    rows: list[tuple[str, str]] = []
    for key, value in values.items():
        if isinstance(value, Mapping):
            rows += _flat(value, f"{prefix}{key}.")
        else:
            rows.append((f"{prefix}{key}", _cut(str(value), _CELL_CHARACTERS)))
    return rows


def _hashed(entries: Mapping[str, Any]) -> list[tuple[str, str, str]]:
    """(name, what it is, sha256) of models or data sets."""
    rows = []
    for name, found in entries.items():
        if not isinstance(found, Mapping):
            rows.append((str(name), _cut(str(found), _CELL_CHARACTERS), ""))
            continue
        values = {key: value for key, value in found.items() if key != "sha256" and value}
        told = [f"{value:,} rows" if key == "rows" else str(value) for key, value in values.items()]
        rows.append((str(name), _cut(", ".join(told), _CELL_CHARACTERS), str(found.get("sha256") or "")))
    return rows


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


def _text(value: Any) -> str:
    return "" if value is None else str(value).strip()


def _cut(text: str, length: int) -> str:
    return text if len(text) <= length else f"{text[: length - 1].rstrip()}\N{HORIZONTAL ELLIPSIS}"


def _markup(svg: str) -> Any:
    from markupsafe import Markup

    return Markup(svg)


def _environment() -> Environment:
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    folder = Path(__file__).with_name("templates")
    return Environment(
        loader=FileSystemLoader(folder),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )


def _render(template: str, context: dict[str, Any], path: Path) -> None:
    environment = _environment()
    style = _markup((Path(__file__).with_name("templates") / "style.css").read_text(encoding="utf-8"))
    page = environment.get_template(template).render(style=style, version=palimpsest.__version__, **context)
    # a model can write half a surrogate pair, which no file can hold
    write_text(path, page.encode("utf-8", "replace").decode("utf-8"))
