"""The catalogue of papers: what each one is, where it stands in this package, and the number that it is known for.

One table, ``papers.toml``; `search` finds papers by meaning.  Knows nothing of methods or claims.
"""

from __future__ import annotations

import tomllib
from dataclasses import dataclass
from functools import cache
from importlib.resources import files

from palimpsest.core.errors import unknown


@dataclass(frozen=True)
class Paper:
    """One paper.  Fields that nobody has checked are empty (None or ""), never guessed."""

    slug: str  # its name everywhere: module, claim, command, docs page
    title: str
    short: str  # as people say it
    arxiv: str  # "2407.06460"
    year: int
    month: int  # year and month are those of the arXiv number
    venue: str  # where it was accepted, "" if unknown
    verb: str
    modules: tuple[str, ...]  # below src/palimpsest/
    claim: str  # in one sentence
    headline: str  # the paper's own number, its unit and where it stands; says so where there is none
    tags: tuple[str, ...]
    authors: int | None = None  # how many

    @property
    def url(self) -> str:
        return f"https://arxiv.org/abs/{self.arxiv}"


@cache
def _table() -> tuple[Paper, ...]:
    table = tomllib.loads((files("palimpsest.catalog") / "papers.toml").read_text(encoding="utf-8"))
    lists = ("modules", "tags")
    return tuple(Paper(**row | {name: tuple(row[name]) for name in lists}) for row in table["paper"])


def papers() -> list[Paper]:
    """All papers, in the order of the table."""
    return list(_table())


def get(slug: str) -> Paper:
    """The paper with this slug; an `InputError` with the nearest slugs if there is none."""
    found = {paper.slug: paper for paper in _table()}
    name = slug.lower().replace("-", "_")
    if name not in found:
        raise unknown("paper", slug, found)
    return found[name]


def search(query: str, k: int = 10) -> list[tuple[Paper, float]]:
    """The `k` papers nearest to `query`, best first, each with its score: see `palimpsest.catalog.ranking`."""
    from palimpsest.catalog.ranking import rank

    return rank(query, k)
