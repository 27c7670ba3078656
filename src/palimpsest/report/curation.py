"""The page of a curated pool: how much was kept and why, distributions, and examples on both sides of the line.

Reads ``curation.json`` as the curation engine writes it, and knows nothing of any method: what only one method can tell
comes as sentences, curves and tables in its ``notes``.  Like every report it is one file that asks nothing of the
network.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from palimpsest.core.errors import InputError
from palimpsest.core.files import sha256_of
from palimpsest.report.html import render
from palimpsest.report.words import duration

_BINS, _WIDTH, _HEIGHT = 24, 480, 160
_EXAMPLES = 6  # of each reason and side
_CHARACTERS = 300


def write(folder: str | Path) -> Path:
    """Write ``report.html`` beside the ``curation.json`` in `folder`; returns its path.  Raises `InputError`."""
    folder = Path(folder)
    try:
        found = json.loads((folder / "curation.json").read_text(encoding="utf-8"))
        context = _context(found)
    except FileNotFoundError:
        raise InputError(f"{folder / 'curation.json'}: no such file; wanted a folder written by curate") from None
    except (KeyError, TypeError, ValueError) as error:
        raise InputError(f"{folder / 'curation.json'}: not the result of a curation ({error})") from None
    render("curation.html", context, folder / "report.html")
    return folder / "report.html"


def _context(found: Mapping[str, Any]) -> dict[str, Any]:
    rows, kept, notes = found["rows"], found["kept"], found["notes"]
    judged = any("left out" in counts for counts in found["reasons"].values()) or kept < rows
    share = f" ({kept / rows:.1%})" if rows else ""
    headline = f"{kept:,} of {rows:,} rows kept{share}" if judged else f"{rows:,} rows weighed"
    return {
        "title": f"{headline} \N{MIDDLE DOT} {found['method']['name']}",
        "kicker": "curate report",
        "undertext": sha256_of(found["method"]),
        "headline": headline,
        "sentences": notes.get("sentences", []),
        "warnings": notes.get("warnings", []),
        "broken": found["broken"],
        "facts": [
            ("Method", found["method"]["name"]),
            ("Shards", f"{found['shards']:,}"),
            ("Rows", f"{rows:,}"),
            ("Time", duration(found["seconds"])),
        ],
        "reasons": [_reason(why, counts, rows) for why, counts in found["reasons"].items()] if judged else [],
        "histograms": _histograms(found["samples"]),
        "curves": [_curve(curve) for curve in notes.get("curves", [])],
        "tables": notes.get("tables", []),
        "sides": _sides(found["samples"]) if judged else {},
        "sampled": len(found["samples"]),
        "config": [(name, str(value)) for name, value in found["method"]["config"].items()],
        "width": _WIDTH,
        "height": _HEIGHT,
    }


def _reason(why: str, counts: Mapping[str, int], rows: int) -> dict[str, Any]:
    kept, left = counts.get("kept", 0), counts.get("left out", 0)
    return {
        "why": why or "\N{EM DASH}",
        "kept": kept,
        "left": left,
        "share": (kept + left) / rows,
        "bar": kept / (kept + left),
    }


def _histograms(samples: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Of every added number that varies: bars of the kept rows with those of the rows left out on top."""
    names = [name for name in (samples[0] if samples else {}) if name not in ("keep", "reason")]
    pictures = []
    for name in names:
        rows = [(row[name], bool(row.get("keep", True))) for row in samples if _is_number(row[name])]
        values = [value for value, _ in rows]
        if len(set(values)) < 2:
            continue
        low, high = min(values), max(values)
        bins = [[0, 0] for _ in range(_BINS)]
        for value, kept in rows:
            bins[min(int((value - low) / (high - low) * _BINS), _BINS - 1)][not kept] += 1
        most = max(map(sum, bins))
        step = _WIDTH / _BINS
        bars = [
            {"x": place * step + 1, "kept": kept / most * _HEIGHT, "left": left / most * _HEIGHT, "width": step - 2}
            for place, (kept, left) in enumerate(bins)
        ]
        pictures.append({"name": name.replace("_", " "), "bars": bars, "low": f"{low:.4g}", "high": f"{high:.4g}"})
    return pictures


def _curve(curve: Mapping[str, Any]) -> dict[str, Any]:
    """Lines over two logarithmic axes; a zero lies on the floor."""
    across = [math.log10(max(value, 1)) for value in curve["x"]]
    up = {name: [math.log10(max(value, 1)) for value in values] for name, values in curve["series"].items()}
    right, top = max([*across, 1e-9]), max(max(values, default=0) for values in up.values()) or 1.0
    lines = {
        name: " ".join(
            f"{x / right * _WIDTH:.1f},{_HEIGHT - y / top * _HEIGHT:.1f}" for x, y in zip(across, values, strict=True)
        )
        for name, values in up.items()
    }
    return {"title": curve["title"], "lines": lines, "right": f"{10**right:,.0f}", "top": f"{10**top:,.0f}"}


def _sides(samples: Sequence[Mapping[str, Any]]) -> dict[str, list[tuple[str, list[dict[str, str]]]]]:
    """{side: [(reason, examples)]}: on each side, of each reason, those that lie nearest to the other side."""
    found: dict[str, dict[str, list[Mapping[str, Any]]]] = {"kept": {}, "left out": {}}
    for row in samples:
        found["kept" if row.get("keep", True) else "left out"].setdefault(row.get("reason") or "", []).append(row)
    sides = {}
    for side, reasons in found.items():
        near = [(why, sorted(rows, key=_height, reverse=side != "kept")[:_EXAMPLES]) for why, rows in reasons.items()]
        sides[side] = [(why, [_example(row) for row in rows]) for why, rows in near]
    return sides


def _height(row: Mapping[str, Any]) -> float:
    """How far up a row stands: its probability, weight or first score."""
    names = ("probability", "weight", *(name for name in row if name.startswith("score_")))
    return next((float(row[name]) for name in names if _is_number(row.get(name))), 0.0)


def _example(row: Mapping[str, Any]) -> dict[str, str]:
    told = [
        f"{name.replace('_', ' ')} {row[name]:.3g}"
        for name in row
        if name not in ("keep", "reason") and _is_number(row[name])
    ]
    text = next((value for name, value in row.items() if isinstance(value, str) and name != "reason"), "")
    return {
        "text": text if len(text) <= _CHARACTERS else f"{text[:_CHARACTERS]}\N{HORIZONTAL ELLIPSIS}",
        "told": ", ".join(told),
    }


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
