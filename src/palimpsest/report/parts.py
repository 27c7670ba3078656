"""The parts of a report page as plain values for the templates: rows, examples, curves, tables; all cut to a size.

Texts stay as they are: escaping is the templates' work.
"""

from __future__ import annotations

import difflib
import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

from palimpsest.audit.cards import card
from palimpsest.core.records import Evidence, Measurement
from palimpsest.report import plots
from palimpsest.report.verdict import reading
from palimpsest.report.words import (
    DIRECTIONS,
    given,
    interval,
    missing,
    number,
    places_of,
    reference_interval,
)

# so that a page stays under 1 MB whatever the evidence holds
_EXAMPLES, _EXAMPLES_SHOWN, _EXAMPLE_CHARACTERS, _PROMPT_CHARACTERS = 40, 6, 700, 360
_CURVES, _CURVE_ROWS, _TABLE_ROWS, _CELL_CHARACTERS = 12, 12, 200, 300

Pieces = list[tuple[str, bool]]  # of a text, each with whether it also stands in the truth


def row(m: Measurement) -> dict[str, Any]:
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


def examples(examples: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Examples by set, at most `_EXAMPLES`, the sets taking turns so that none is crowded out."""
    sets: dict[str, list[dict[str, Any]]] = {}
    for example in examples:
        sets.setdefault(str(example.get("set") or "examples"), []).append(dict(example))
    each = max(1, _EXAMPLES // max(1, len(sets)))
    sets = dict(list(sets.items())[:_EXAMPLES])
    kept = {name: [_example(example) for example in found[:each]] for name, found in sets.items()}
    return {"sets": kept, "shown": _EXAMPLES_SHOWN, "left_out": len(examples) - sum(map(len, kept.values()))}


def _example(example: Mapping[str, Any]) -> dict[str, Any]:
    truth = cut(_text(example.get("truth")), _EXAMPLE_CHARACTERS)
    prompt = _text(example.get("prompt"))
    if len(prompt) > _PROMPT_CHARACTERS:  # the end of a prompt is what is continued
        prompt = f"\N{HORIZONTAL ELLIPSIS}{prompt[-_PROMPT_CHARACTERS:]}"
    answers = [
        (name, overlap(cut(_text(example[name]), _EXAMPLE_CHARACTERS), truth))
        for name in ("before", "after", "reference")
        if example.get(name) is not None
    ]
    return {"prompt": prompt, "truth": truth, "answers": answers}


def overlap(text: str, truth: str) -> Pieces:
    """`text` in pieces, each with whether its words also stand in `truth` in the same order (ROUGE-L's idea)."""
    words, wanted = re.findall(r"\S+\s*", text), re.findall(r"\S+", truth)
    bare = [_bare(word) for word in words]
    matcher = difflib.SequenceMatcher(None, bare, [_bare(word) for word in wanted], autojunk=False)
    shared = {i for block in matcher.get_matching_blocks() for i in range(block.a, block.a + block.size) if bare[i]}
    pieces: Pieces = []
    for place, word in enumerate(words):
        if pieces and pieces[-1][1] == (place in shared):
            pieces[-1] = (pieces[-1][0] + word, pieces[-1][1])
        elif pieces and pieces[-1][1]:  # the space behind a mark is not marked
            marked = pieces[-1][0].rstrip()
            pieces[-1:] = [(marked, True), (pieces[-1][0][len(marked) :] + word, False)]
        else:
            pieces.append((word, place in shared))
    return pieces


def _bare(word: str) -> str:
    return re.sub(r"\W+", "", word.lower())


def curves(curves: Mapping[str, Sequence[float]]) -> list[dict[str, Any]]:
    found = []
    for place, (name, values) in enumerate(list(curves.items())[:_CURVES]):
        loss = [float(v) for v in values if v is not None]
        if not loss:
            continue
        stride = max(1, math.ceil(len(loss) / _CURVE_ROWS))
        steps = sorted({*range(0, len(loss), stride), len(loss) - 1})
        found.append(
            {
                "name": cut(str(name), 80),
                "svg": markup(plots.curve(loss, f"curve{place}", str(name))),
                "points": [(step + 1, f"{loss[step]:.4g}".replace("-", "\N{MINUS SIGN}")) for step in steps],
            }
        )
    return found


def courses(evidence: Evidence) -> dict[str, dict[str, Any]]:
    """Request by request (``extras["requests"]``: rows forgotten so far, and scores after): pictures and tables."""
    found: dict[str, dict[str, Any]] = {}
    for name, course in (evidence.extras.get("requests") or {}).items():
        lines = {score: list(values) for score, values in course.items() if score != "rows"}
        if len(course.get("rows") or ()) < 2 or not lines:
            continue
        rows = [f"{value:,.0f}" for value in course["rows"]]
        found[str(name)] = {
            "title": card(str(name)).title,
            "svg": markup(plots.course(course["rows"], lines, f"course{len(found)}", card(str(name)).title)),
            "heads": ["Records forgotten", *(card(score).title for score in lines)],
            "rows": [[row, *(number(line[place]) for line in lines.values())] for place, row in enumerate(rows)],
        }
    return found


def attacks(evidence: Evidence) -> dict[str, Any] | None:
    """Every membership attack's AUC on every model (``extras["membership"]``)."""
    aucs = (evidence.extras.get("membership") or {}).get("auc") or {}
    models = list(dict.fromkeys(model for by_model in aucs.values() for model in by_model))
    if not aucs:
        return None
    rows = [[str(name), *(number(by_model.get(model), 3) for model in models)] for name, by_model in aucs.items()]
    return {"heads": ["Attack", *(model.capitalize() for model in models)], "rows": rows}


def table(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any] | None:
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
    return cut(str(value), _CELL_CHARACTERS)


def flat(values: Mapping[str, Any], prefix: str = "") -> list[tuple[str, str]]:
    rows: list[tuple[str, str]] = []
    for key, value in values.items():
        if isinstance(value, Mapping):
            rows += flat(value, f"{prefix}{key}.")
        else:
            rows.append((f"{prefix}{key}", cut(str(value), _CELL_CHARACTERS)))
    return rows


def hashed(entries: Mapping[str, Any]) -> list[tuple[str, str, str]]:
    """(name, what it is, sha256) of models or data sets."""
    rows = []
    for name, found in entries.items():
        if not isinstance(found, Mapping):
            rows.append((str(name), cut(str(found), _CELL_CHARACTERS), ""))
            continue
        values = {key: value for key, value in found.items() if key != "sha256" and value}
        told = [f"{value:,} rows" if key == "rows" else str(value) for key, value in values.items()]
        rows.append((str(name), cut(", ".join(told), _CELL_CHARACTERS), str(found.get("sha256") or "")))
    return rows


def _text(value: Any) -> str:
    return "" if value is None else str(value).strip()


def cut(text: str, length: int) -> str:
    return text if len(text) <= length else f"{text[: length - 1].rstrip()}\N{HORIZONTAL ELLIPSIS}"


def markup(svg: str) -> Any:
    from markupsafe import Markup

    return Markup(svg)
