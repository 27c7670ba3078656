"""The catalogue as plain files: an index of all papers and a page for each, to be served or opened from disk.

Every page holds everything it shows; the index has one short script, without which it is the same list unfiltered.
"""

from __future__ import annotations

import calendar
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from palimpsest.app.standing import VERDICTS, Standing, by_date, by_strength, standings
from palimpsest.claims.results import interval_words
from palimpsest.core.errors import InputError
from palimpsest.core.files import atomic_folder, sha256_of
from palimpsest.core.methods import VERBS
from palimpsest.report import parts, plots
from palimpsest.report.html import render

LEVELS = {"holds": "good", "unclear": "mixed", "untested": "mixed", "fails": "bad"}  # the colour of a verdict
MARK = "palimpsest-site"  # in a folder that we wrote, and may therefore write again


def write(out: str | Path, results: str | Path | None = None) -> Path:
    """Write ``index.html`` and ``papers/<slug>.html`` into the folder `out`, all or nothing; returns the index.

    Raises `InputError` where `out` holds something else, or `results` no results.
    """
    out = Path(out)
    if out.exists() and not (out.is_dir() and ((out / MARK).exists() or not any(out.iterdir()))):
        raise InputError(f"{out}: wanted a new or empty folder, or one that 'palimpsest site' wrote")
    found = standings(results)
    with atomic_folder(out) as folder:
        (folder / MARK).touch()
        (folder / "papers").mkdir()
        render("site_index.html", index(by_date(found)), folder / "index.html")
        for one in found:
            render("site_paper.html", page(one), folder / "papers" / f"{one.paper.slug}.html")
    return out / "index.html"


def index(found: Sequence[Standing]) -> dict[str, Any]:
    """What the index shows."""
    place = {one.paper.slug: rank for rank, one in enumerate(by_strength(found))}
    counted = {verdict: sum(one.verdict == verdict for one in found) for verdict in VERDICTS}
    return {
        "title": "The papers, re-tested",
        "kicker": "catalogue",
        "undertext": sha256_of([one.paper.slug for one in found]),
        "cards": [
            {
                "paper": one.paper,
                "standing": one,
                "level": level(one),
                "words": search_words(one),
                "strength": place[one.paper.slug],
            }
            for one in found
        ],
        "counted": {verdict: count for verdict, count in counted.items() if count},
        "verbs": VERBS,
        "months": calendar.month_name,
    }


def page(one: Standing) -> dict[str, Any]:
    """What a paper's page shows: the claim with its picture and numbers, how to run it, the code."""
    slug, result = one.paper.slug, one.result or {}
    pictures = [
        parts.markup(
            plots.expectation(e.words, e.measured, e.control, f"{slug}-{place}", low=e.low, high=e.high),
        )
        for place, e in enumerate(one.expected)
    ]
    rows = [[e.words, interval_words(*e.measured), interval_words(*e.control), e.verdict] for e in one.expected]
    return {
        "title": one.paper.short,
        "kicker": "catalogue",
        "undertext": sha256_of(slug),
        "paper": one.paper,
        "date": f"{calendar.month_name[one.paper.month]} {one.paper.year}",
        "standing": one,
        "level": level(one),
        "meaning": VERDICTS[one.verdict],
        "result": result,
        "pictures": list(zip(one.expected, pictures, strict=True)),
        "table": {"heads": ["Expected", "Measured (95%)", "Control (95%)", "Verdict"], "rows": rows},
        "says": parts.flat(result.get("paper_says") or {}),
        "machine": parts.flat(result.get("machine") or {}),
        "sources": one.sources(),
    }


def level(one: Standing) -> str:
    """The style of a standing's verdict."""
    return LEVELS.get(one.verdict, "unknown")


def search_words(one: Standing) -> str:
    """What a plain search looks through."""
    paper = one.paper
    names = [info.name for info in one.methods]
    return " ".join([paper.slug, paper.short, paper.title, paper.claim, *paper.tags, *names]).lower()
