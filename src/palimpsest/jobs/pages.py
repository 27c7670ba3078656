"""``palimpsest site`` and ``palimpsest digest``: the catalogue as files, and what changed in it."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path

from palimpsest.core.errors import InputError
from palimpsest.core.files import write_text


@dataclass(frozen=True, kw_only=True)
class Site:
    """Write the catalogue and all claim pages as plain HTML, to be opened from disk or served by anything."""

    out: str = "palimpsest-site"  # folder for the pages: new, empty, or one that this command wrote
    results: str | None = None  # what 'palimpsest reproduce' wrote; default: results/claims.jsonl, if it is there


@dataclass(frozen=True, kw_only=True)
class Digest:
    """Say what changed since a day: new results, changed verdicts, new papers.  To the terminal or into a file."""

    since: str  # a day, e.g. 2026-11-01
    html: bool = False  # the body of an e-mail instead of plain text
    out: str | None = None  # file to write; default: print it
    results: str | None = None  # what 'palimpsest reproduce' wrote; default: results/claims.jsonl, if it is there


def site(options: Site) -> int:
    """Write the site; 0."""
    from palimpsest.app import site as pages

    print(f"{pages.write(options.out, options.results)}: written", file=sys.stderr)
    return 0


def digest(options: Digest) -> int:
    """Print or write the digest; 0."""
    from datetime import date

    from palimpsest.app.digest import digest as changes
    from palimpsest.app.standing import standings

    try:
        since = date.fromisoformat(options.since)
    except ValueError:
        raise InputError(f"--since {options.since}: wanted a day as YYYY-MM-DD, e.g. 2026-11-01") from None
    found = changes(standings(options.results), since)
    text = found.html() if options.html else found.text()
    if options.out is None:
        print(text, end="")
    else:
        write_text(Path(options.out), text)
    return 0
