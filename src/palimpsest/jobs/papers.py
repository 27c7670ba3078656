"""``palimpsest papers``: the catalogue, searched by meaning."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass

from palimpsest.core.methods import VERBS


@dataclass(frozen=True, kw_only=True)
class Papers:
    """List the papers that palimpsest implements, or those nearest in meaning to a query."""

    verb: str | None = None  # only papers of this verb
    k: int = 10  # how many to show for a query
    json: bool = False  # one JSON object a line instead of a table


def papers(query: str, options: Papers) -> int:
    """Print the papers found; 0."""
    from rich.console import Console
    from rich.table import Table

    from palimpsest import catalog
    from palimpsest.core.errors import unknown

    if options.verb is not None and options.verb not in VERBS:
        raise unknown("verb", options.verb, VERBS)
    every = catalog.papers()
    ranked = (
        [(paper, score) for paper, score in catalog.search(query, k=len(every))]
        if query
        else [(p, None) for p in every]
    )
    chosen = [(paper, score) for paper, score in ranked if options.verb in (None, paper.verb)]
    if query:
        chosen = chosen[: options.k]
    if options.json:
        for paper, score in chosen:
            print(json.dumps({**asdict(paper), "score": score}, ensure_ascii=False))
        return 0
    table = Table(box=None, pad_edge=False, header_style="bold")
    for column in ("slug", "verb", "year", "claim"):
        table.add_column(column, overflow="fold", no_wrap=column == "slug")
    for paper, _ in chosen:
        table.add_row(paper.slug, paper.verb, str(paper.year), f"{paper.short}: {paper.claim}")
    Console().print(table)
    return 0
