"""What came of a claim: `Result`, its line in ``results/claims.jsonl``, what changed since the last one, the table.

Knows nothing of how claims are run.
"""

from __future__ import annotations

import errno
import json
import math
import os
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from palimpsest.claims.definition import Verdict
from palimpsest.core.errors import InputError

if TYPE_CHECKING:
    from rich.console import Group
    from rich.table import Table

Numbers = tuple[float, float | None, float | None]  # mean, low, high

COLOURS = {"holds": "green", "fails": "red", "unclear": "yellow", "untested": "magenta"}


@dataclass(frozen=True)
class Outcome:
    """One expectation and what was measured: of the method, and of the negative control."""

    expect: str  # in words: "utility_npo - utility_ga >= 0.2"
    mean: float
    low: float | None
    high: float | None
    interval: str  # how the interval was computed, with the reason where that is not BCa
    verdict: Verdict
    control: Numbers
    control_verdict: Verdict


@dataclass(frozen=True)
class Result:
    """A claim as measured.  `verdict` is of the claim, `control` of the same expectations with the mechanism off."""

    paper: str
    statement: str
    paper_says: dict[str, Any]
    seeds: tuple[int, ...]
    measured: dict[str, Numbers]
    expectations: tuple[Outcome, ...]
    verdict: Verdict
    control: Verdict
    note: str
    seconds: float  # of all runs together, whatever the number of processes
    version: str
    machine: dict[str, Any] = field(repr=False)  # processor, threads, precision, package versions
    date: str  # ISO 8601, UTC

    def to_json(self) -> dict[str, Any]:
        """The line of ``claims.jsonl``, numbers to 6 significant digits."""
        return _rounded(asdict(self))


def append(path: str | Path, result: Result) -> None:
    """Append the result's line in one write: writers do not mix their lines, and a full disk leaves no half line."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    line = json.dumps(result.to_json(), ensure_ascii=False, allow_nan=False).encode() + b"\n"
    handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o644)
    try:
        size = os.fstat(handle).st_size
        if size and os.pread(handle, 1, size - 1) != b"\n":  # somebody edited the file and left the last line open
            line = b"\n" + line
        if os.write(handle, line) != len(line):
            os.ftruncate(handle, size)
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
        os.fsync(handle)
    finally:
        os.close(handle)


def read(path: str | Path) -> list[dict[str, Any]]:
    """The lines of a results file, oldest first; none if there is no file.

    Raises InputError, naming file and line, for a line that is not a result.
    """
    path = Path(path)
    if not path.exists():
        return []
    found = []
    for number, line in enumerate(path.read_bytes().splitlines(), start=1):
        try:
            value = json.loads(line)
        except ValueError as error:  # not JSON, or not UTF-8
            raise InputError(f"{path}:{number}: not valid JSON ({error})") from None
        if not isinstance(value, dict) or not {"paper", "verdict", "measured"} <= value.keys():
            raise InputError(f"{path}:{number}: not the result of a claim")
        found.append(value)
    return found


def difference(then: dict[str, Any], now: dict[str, Any]) -> list[tuple[str, str, str]]:
    """(what, then, now) for all but the measured values in which two lines differ: version, seeds, machine, ..."""
    ignored = ("measured", "expectations", "seconds", "date", "note", "paper_says")
    before, after = (_flat({key: value for key, value in line.items() if key not in ignored}) for line in (then, now))
    return [
        (key, before.get(key, "-"), after.get(key, "-"))
        for key in dict.fromkeys([*after, *before])
        if before.get(key) != after.get(key)
    ]


def difference_table(paper: str, then: dict[str, Any], now: dict[str, Any]) -> Table:
    """`difference` and the means that moved, for people."""
    from rich.table import Table

    table = Table(
        title=f"{paper}: '{now['verdict']}' now, '{then['verdict']}' on {then.get('date', '?')}", title_justify="left"
    )
    for column in ("what differs", "then", "now"):
        table.add_column(column, overflow="fold")
    for row in difference(then, now):
        table.add_row(*row)
    for name, (mean, *_) in now["measured"].items():
        old = then.get("measured", {}).get(name)
        if old and old[0] != mean:
            table.add_row(f"measured.{name}", f"{old[0]:g}", f"{mean:g}")
    return table


def table(results: Sequence[Result], without: Iterable[str] = ()) -> Group:
    """The results for people: a block a claim, a line an expectation.  `without`: papers that have no claim yet."""
    from rich.console import Group
    from rich.text import Text

    blocks: list[Any] = []
    for result in results:
        title = Text.assemble(
            (result.paper, "bold"), ": ", _coloured(result.verdict), ", control ", _coloured(result.control)
        )
        blocks += [title, Text(result.statement), _expectations(result)]
        blocks += [Text(result.note, style="italic")] if result.note else []
        blocks.append(Text())
    if without := list(without):
        blocks.append(Text(f"no claim yet ({len(without)}): {', '.join(without)}"))
    return Group(*blocks)


def _expectations(result: Result) -> Table:
    """Verdict, what was expected, and below it what was measured, of the method and of the control."""
    from rich.table import Table
    from rich.text import Text

    view = Table.grid(padding=(0, 2, 0, 2))
    for outcome in result.expectations:
        measured = interval_words(outcome.mean, outcome.low, outcome.high)
        numbers = Text(f"{measured}; control {interval_words(*outcome.control)}", style="dim")
        view.add_row(_coloured(outcome.verdict), Text(outcome.expect).append("\n").append_text(numbers))
    return view


def exit_code(results: Sequence[Result]) -> int:
    """1 if a claim fails, else 0.

    ``unclear`` (more seeds are needed) and ``untested`` (the control holds as well) are not successes, and are shown as
    what they are, but they are no evidence against the claim either: they do not fail a build.
    """
    return int(any(result.verdict == "fails" for result in results))


def interval_words(mean: float, low: float | None, high: float | None) -> str:
    """A mean with its 95% interval: "0.5 (0.1 to 0.6)"."""
    if math.isnan(mean):
        return "not measured"
    return f"{mean:.3g}" if low is None or high is None else f"{mean:.3g} ({low:.3g} to {high:.3g})"


def _coloured(verdict: Verdict) -> Any:
    from rich.text import Text

    return Text(verdict, style=COLOURS[verdict])


def _rounded(value: Any) -> Any:
    if isinstance(value, float):
        return float(f"{value:.6g}") if math.isfinite(value) else None
    if isinstance(value, dict):
        return {key: _rounded(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_rounded(item) for item in value]
    return value


def _flat(value: Any, prefix: str = "") -> dict[str, str]:
    if not isinstance(value, dict):
        return {prefix: str(value)}
    return {
        name: text
        for key, item in value.items()
        for name, text in _flat(item, f"{prefix}.{key}" if prefix else key).items()
    }
