"""``palimpsest reproduce``: re-run claims and print the table."""

from __future__ import annotations

from dataclasses import dataclass

from palimpsest.core.errors import InputError


@dataclass(frozen=True, kw_only=True)
class Reproduce:
    """Re-test papers' claims: seeds, 95% intervals, verdicts, negative control.  Exit code 1 if a claim fails."""

    all: bool = False  # every paper that has a claim
    seeds: int = 5  # seeds 0 .. N-1, the same for method, baselines and control
    json: str = "results/claims.jsonl"  # file that each result is appended to
    ray: str | None = None  # address of a Ray cluster to run on
    workers: int | None = None  # processes on this machine; default: its cores
    fresh: bool = False  # measure again what an earlier run has kept


def reproduce(slugs: list[str], options: Reproduce) -> int:
    """The exit code: 1 if any claim fails, else 0."""
    from palimpsest import claims

    if bool(slugs) == options.all:
        raise InputError("name the papers to reproduce, or give --all (not both): palimpsest reproduce SLUG ...")
    results = claims.reproduce(
        slugs or None, options.seeds, options.json, options.ray, workers=options.workers, fresh=options.fresh
    )
    from rich.console import Console

    Console().print(claims.table(results, claims.without_claim() if options.all else ()))
    return claims.exit_code(results)
