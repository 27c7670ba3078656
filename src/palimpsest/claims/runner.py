"""Runs claims: the method and its negative control on the same seeds, judged together.

Every run (one seed, with or without the mechanism) is kept in the cache as soon as it is measured, under what it
depends on: the claim's module, the package's code, library versions and processor.  So an interrupted
``reproduce --all`` goes on where it stopped.
Knows nothing of what is measured.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import palimpsest
from palimpsest.claims import discovery, keeping, results
from palimpsest.claims.definition import Claim, ClaimError, Verdict, overall
from palimpsest.claims.processes import Run, cores, measured
from palimpsest.claims.results import Numbers, Outcome, Result
from palimpsest.core.errors import InputError
from palimpsest.core.statistics import Interval, bootstrap

if TYPE_CHECKING:
    from rich.console import Console

RESULTS = Path("results/claims.jsonl")


def reproduce(
    slugs: Sequence[str] | None = None,
    seeds: int = 5,
    json_path: str | Path = RESULTS,
    ray: str | None = None,
    *,
    workers: int | None = None,
    fresh: bool = False,
) -> list[Result]:
    """Re-test the claims of the given papers (None: of all) on seeds 0 .. `seeds` - 1, in the order asked for.

    Each result is appended to `json_path` as soon as it is there.  Where the paper's last line had another verdict,
    what differs (versions, machine, threads, seeds) is printed.  `ray`: the address of a Ray cluster to run on;
    `workers`: processes on this machine (default: its cores); `fresh`: measure again what an earlier run has kept.

    A claim that cannot be measured does not stop the others: what went wrong is raised when they are done, as itself
    if it is the only thing, else as an ExceptionGroup.  Raises InputError for an unknown paper, no or one seed.
    """
    from rich.console import Console

    asked = {claim.paper: claim for claim in map(discovery.get, discovery.slugs() if slugs is None else slugs)}
    if not asked:
        raise InputError("no claims to reproduce")
    console = Console(stderr=True)
    found: dict[str, Result] = {}
    problems: list[Exception] = []
    for claim, outcome in run_all(list(asked.values()), seeds, ray=ray, workers=workers, fresh=fresh, console=console):
        if isinstance(outcome, Exception):
            problems.append(outcome)
            console.print(f"{claim.paper}: not measured: {outcome}", style="red", markup=False)
            continue
        found[claim.paper] = outcome
        before = [line for line in results.read(json_path) if line["paper"] == claim.paper]
        results.append(json_path, outcome)
        console.print(f"{claim.paper}: {outcome.verdict}", style=results.COLOURS[outcome.verdict])
        if before and before[-1]["verdict"] != outcome.verdict:
            console.print(results.difference_table(claim.paper, before[-1], outcome.to_json()))
    if problems and found:  # what could be measured is not lost with what could not
        console.print(results.table(list(found.values())))
    if len(problems) == 1:
        raise problems[0]
    if problems:
        raise ExceptionGroup(f"{len(problems)} of {len(asked)} claims could not be measured", problems)
    return [found[paper] for paper in asked]


def run(
    claim: Claim, seeds: int | Sequence[int] = 5, *, scale: float = 1.0, workers: int | None = None, fresh: bool = False
) -> Result:
    """Measure one claim and judge it; nothing is written but the cache.  `scale` below 1 is for tests."""
    ((_, outcome),) = run_all([claim], seeds, scale=scale, workers=workers, fresh=fresh)
    if isinstance(outcome, Exception):
        raise outcome
    return outcome


def run_all(
    claims: Sequence[Claim],
    seeds: int | Sequence[int] = 5,
    *,
    scale: float = 1.0,
    workers: int | None = None,
    ray: str | None = None,
    fresh: bool = False,
    console: Console | None = None,
) -> Iterator[tuple[Claim, Result | Exception]]:
    """Each claim with its result, or with the error that kept it from being measured, as soon as its last run is in."""
    numbers = tuple(range(seeds)) if isinstance(seeds, int) else tuple(seeds)
    if len(set(numbers)) < 2:
        raise InputError(f"a claim needs at least 2 different seeds to have an interval, not {len(set(numbers))}")
    runs = {claim.paper: _runs(claim, numbers, scale) for claim in claims}
    every = [one for group in runs.values() for one in group]
    kept = {} if fresh else {one: old for one in every if (old := keeping.get(one)) is not None}
    todo = [one for one in every if one not in kept]
    workers = max(1, min(workers or cores(), len(todo)))
    where = str(workers) if ray is None else "Ray"
    waiting = {claim.paper: claim for claim in claims}
    with _progress(claims, runs, list(kept), where, console) as advance:
        yield from _finished(waiting, runs, kept, numbers, where)
        for one, value in measured(todo, workers, ray) if todo else ():
            if isinstance(value, Exception):
                yield waiting.pop(one.paper), value
                continue
            kept[one] = value
            keeping.put(one, value)
            advance(one)
            yield from _finished(waiting, runs, kept, numbers, where)


def judge(
    claim: Claim,
    seeds: tuple[int, ...],
    method: Sequence[dict[str, Any]],
    control: Sequence[dict[str, Any]],
    where: str,
) -> Result:
    """The result of a claim from its runs with and without the mechanism, both in the order of `seeds`."""
    outcomes = _outcomes(claim, method, control)
    control_verdict = overall([outcome.control_verdict for outcome in outcomes])
    verdict = overall([outcome.verdict for outcome in outcomes])
    if verdict == "holds" and control_verdict == "holds":
        verdict = "untested"
    values = _by_name(method)
    every = [*method, *control]
    notes = [claim.note, *(value["broken"] for value in every if "broken" in value)]
    if any(value["machine"] != every[0]["machine"] for value in every):
        notes.append("runs come from machines or settings that differ; the first one is shown")
    return Result(
        paper=claim.paper,
        statement=claim.statement,
        paper_says=dict(claim.paper_says),
        seeds=seeds,
        measured={name: _numbers(bootstrap(numbers)) for name, numbers in (values or {}).items()},
        expectations=outcomes,
        verdict=verdict,
        control=control_verdict,
        note="; ".join(note for note in notes if note),
        seconds=sum(value["seconds"] for value in every),
        version=palimpsest.__version__,
        machine={"processes": where, **every[0]["machine"]},
        date=datetime.now(UTC).isoformat(timespec="seconds"),
    )


def _outcomes(claim: Claim, method: Sequence[dict[str, Any]], control: Sequence[dict[str, Any]]) -> tuple[Outcome, ...]:
    measured = [_by_name(method), _by_name(control)]
    found = []
    for expect in claim.expectations:
        sides: list[tuple[Numbers, str, Verdict]] = []
        for values in measured:
            if values is None:  # a run broke down
                sides.append(((math.nan, None, None), "none: a run broke down", "fails"))
            else:
                interval = expect.interval(values)
                sides.append((_numbers(interval), interval.method, expect.verdict(interval)))
        ((numbers, how, verdict), (its_numbers, _, its_verdict)) = sides
        found.append(Outcome(str(expect), *numbers, how, verdict, its_numbers, its_verdict))
    return tuple(found)


def _numbers(interval: Interval) -> Numbers:
    return interval.value, interval.low, interval.high


def _by_name(runs: Sequence[dict[str, Any]]) -> dict[str, list[float]] | None:
    """Each value's numbers in the order of the runs; None if a run broke down."""
    if any("broken" in value for value in runs):
        return None
    names = runs[0]["values"].keys()
    for value in runs:
        odd = names ^ value["values"].keys()
        if odd:
            raise ClaimError(f"the seeds measured different values: {', '.join(sorted(odd))} in some only")
    return {name: [value["values"][name] for value in runs] for name in names}


def _finished(
    waiting: dict[str, Claim],
    runs: dict[str, list[Run]],
    kept: dict[Run, dict[str, Any]],
    seeds: tuple[int, ...],
    where: str,
) -> Iterator[tuple[Claim, Result | Exception]]:
    """Judge the claims whose runs are all in, and stop waiting for them."""
    for paper in [paper for paper in waiting if all(one in kept for one in runs[paper])]:
        claim = waiting.pop(paper)
        values = [kept[one] for one in runs[paper]]
        try:
            yield claim, judge(claim, seeds, values[: len(seeds)], values[len(seeds) :], where)
        except ClaimError as error:
            yield claim, ClaimError(f"{paper}: {error}")


def _runs(claim: Claim, seeds: tuple[int, ...], scale: float) -> list[Run]:
    """The method on every seed, then the control: both of a seed may want one cached base model, built by the first."""
    measure: Any = claim.measure
    module, attribute = measure.__module__, measure.__qualname__
    return [
        Run(module, attribute, claim.paper, seed, mechanism, scale) for mechanism in (True, False) for seed in seeds
    ]


@contextlib.contextmanager
def _progress(
    claims: Sequence[Claim], runs: dict[str, list[Run]], done: Sequence[Run], where: str, console: Console | None
) -> Iterator[Callable[[Run], None]]:
    """Say what is to be done and how long it should take, then show a bar; yield what moves it on by a run.

    The bar counts the claims' planned minutes, not runs, so that the time left is right when claims differ in length.
    """
    if console is None:
        yield lambda one: None
        return
    from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

    planned = {one: claim.minutes / 10 for claim in claims for one in runs[claim.paper]}  # 5 seeds and their controls
    count, total = len(done), sum(planned.values())
    behind = sum((planned[one] for one in done), start=0.0)
    time = "" if where == "Ray" else f", about {(total - behind) * 2 / int(where):.1f} min in {where} processes"
    line = f"claims: {len(claims)}; runs: {len(planned)}, of which {count} are kept from before{time}"
    console.print(line, highlight=False)
    columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.fields[runs]}"), TimeRemainingColumn())
    bar = Progress(
        *columns, console=console, disable=not console.is_terminal, speed_estimate_period=600, transient=True
    )
    with bar:
        task = bar.add_task("measuring", total=total, runs=f"{count}/{len(planned)}")
        bar.advance(task, behind)

        def advance(one: Run) -> None:
            nonlocal count
            count += 1
            bar.update(task, advance=planned[one], runs=f"{count}/{len(planned)}", description=str(one))

        try:
            yield advance
        except KeyboardInterrupt:
            console.print(f"stopped: {count} of {len(planned)} runs are kept, the same command goes on from there")
            raise
