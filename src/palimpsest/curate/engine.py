"""The curation engine: a method over a pool of any size, shard by shard, on all cores or a Ray cluster, resumable at
any moment.

A method is a function from a Daft frame to the same frame with columns added: ``keep``, ``weight`` or ``score_*``, and
if it likes ``reason``, a few words on why a row is kept or not.  A method that must see the whole pool before it can
judge a row is a `Surveyor`: it makes a small table of every shard, puts them together, and then judges rows by the
result.

``run`` writes into `out`:

================  =====================================================================================
``data/``         one parquet file a shard: all rows in their order, the user's columns and the method's
``curation.json`` what was done and what came of it: counts by reason, distributions, examples, broken shards
``facts.parquet`` what a `Surveyor` found out about the pool
``.work/``        what is needed to go on after an interruption
================  =====================================================================================

Every file appears whole or not at all, under a key made of the shard's stamp, the method, its hyper-parameters and the
files these name, and the facts: whatever is unchanged is not done again, whatever is changed is.  Knows nothing of any
one method.
"""

from __future__ import annotations

import dataclasses
import hashlib
import inspect
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol, TypeVar

import pyarrow as pa
import pyarrow.parquet

import palimpsest
from palimpsest.core.errors import InputError
from palimpsest.core.files import sha256_of, write_json
from palimpsest.core.methods import config_of
from palimpsest.curate import output, pool, shards, workers
from palimpsest.curate.pool import Shard, Source

if TYPE_CHECKING:
    from daft import DataFrame

_FACTS_KEY = b"palimpsest_key"
_EXAMPLES = 20_000  # sampled rows that the result holds

Broken = Literal["stop", "skip"]
Method = Callable[["DataFrame"], "DataFrame"]
M = TypeVar("M", bound=Any)


class Surveyor(Protocol):
    """A method that judges rows by what the whole pool looks like: a map, a reduction and a second map."""

    def survey(self, shard: DataFrame) -> DataFrame:
        """A small table of one shard."""
        ...

    def gather(self, parts: Sequence[pa.Table]) -> pa.Table:
        """The facts of the pool from the tables of its shards."""
        ...

    def judge(self, shard: DataFrame, facts: pa.Table) -> DataFrame:
        """The shard's rows with columns added."""
        ...

    def review(self, judged: DataFrame) -> DataFrame:
        """As `survey`, of what is kept of a judged shard."""
        ...

    def notes(self, facts: pa.Table, reviews: Sequence[pa.Table], totals: Mapping[str, float]) -> dict[str, Any]:
        """What the report tells beside the counts: "sentences", "warnings", "curves", "tables" and "numbers".

        `reviews` are the tables of `review`; `totals` are the rows, the rows kept, and the sums of the added numbers.
        """
        ...


@dataclass(frozen=True)
class Curation:
    """What came of a run; also ``curation.json``."""

    out: Path
    method: dict[str, Any]  # name, paper, config
    rows: int
    kept: int  # rows whose keep is true; all rows where a method only weighs or scores
    reasons: dict[str, dict[str, int]]  # reason: {"kept": rows, "left out": rows}
    sums: dict[str, float]  # of every added number, over all rows
    shards: int
    done: int  # shards done now; the others were finished before
    broken: tuple[dict[str, str], ...]  # source, error
    seconds: float
    samples: tuple[dict[str, Any], ...] = field(repr=False)  # rows drawn at random: their text, and the added columns
    notes: dict[str, Any] = field(default_factory=dict, repr=False)  # what the method adds for the report

    def __str__(self) -> str:
        share = f" ({self.kept / self.rows:.1%})" if self.rows else ""
        lines = [
            f"{self.kept:,} of {self.rows:,} rows kept{share}, {self.shards:,} shards, {self.done:,} of them done now"
        ]
        lines += [f"{sum(counts.values()):,} rows: {why}" for why, counts in self.reasons.items() if why]
        lines += [f"skipped: {fault['error']}" for fault in self.broken]
        return "\n".join([*lines, *self.notes.get("warnings", ())])

    def to_json(self) -> dict[str, Any]:
        value = {key.name: getattr(self, key.name) for key in dataclasses.fields(self) if key.name != "out"}
        return {"palimpsest": palimpsest.__version__, "kind": "curate", **value, "seconds": round(self.seconds, 3)}


def run(
    method: Method,
    sources: Source | Sequence[Source],
    out: str | Path,
    *,
    ray: str | None = None,
    workers: int | None = None,
    broken: Broken = "stop",
    only_kept: bool = False,
    shard_rows: int = pool.SHARD_ROWS,
    progress: str = "curating",
) -> Curation:
    """Curate the files that `sources` name with `method` into the folder `out`; started again, it goes on where it was.

    `ray`: address of a cluster ("auto", "ray://...", or "local" for one on this machine); sources and `out` must then
    lie where all nodes see them.  `workers`: processes on this machine, by default one a core.  `broken`: what a shard
    that cannot be read or judged does: "stop" everything or be "skip"ped and named in the result.  `only_kept`: write
    only the rows with a true ``keep``.  `progress`: label of the bar, "" for none.

    Raises `InputError` for input that cannot be used; finished shards are kept.
    """
    started = time.monotonic()
    if broken not in ("stop", "skip"):
        raise InputError(f"broken must be 'stop' or 'skip', not '{broken}'")
    pool.require_daft()
    folder = Path(out)
    if folder.exists() and not folder.is_dir():
        raise InputError(f"{folder}: there is a file of this name; wanted a folder")
    parts = pool.shards(sources, rows=shard_rows)
    if any(Path(part.source).is_relative_to(folder.resolve()) for part in parts if "://" not in part.source):
        raise InputError(f"{folder}: the output folder holds some of the sources; wanted another one")
    if hasattr(method, "prepare"):
        method = method.prepare(parts, folder)
    job = _Job(method, folder, only_kept, {"ray": ray, "workers": workers}, broken, progress)
    facts = job.survey(parts) if _surveys(method) else None
    result = job.judge(parts, facts, started)
    write_json(folder / "curation.json", result.to_json())
    return result


def _surveys(method: Any) -> bool:
    """Is it a `Surveyor`?  One that lacks a part must not pass for a method of one pass."""
    missing = [name for name in ("gather", "judge", "review", "notes") if not hasattr(method, name)]
    if hasattr(method, "survey") and missing:
        raise TypeError(f"{type(method).__name__} has survey, but no {', '.join(missing)}")
    return hasattr(method, "survey")


@dataclass
class _Job:
    method: Any
    folder: Path
    only_kept: bool
    where: dict[str, Any]
    broken: Broken
    progress: str

    def __post_init__(self) -> None:
        self.key = method_key(self.method)
        self.work = self.folder / ".work"
        self.faults: dict[str, dict[str, str]] = {}  # shard's name: source and error

    def survey(self, parts: Sequence[Shard]) -> Path:
        """Make the facts; returns where they lie."""
        goals = {part: self.work / "survey" / f"{part.name}-{self._key(part, 'survey')[:16]}.parquet" for part in parts}
        missing = [(self.method, part, goal) for part, goal in goals.items() if not goal.exists()]
        self._all(shards.survey, missing, "looking at the pool")
        _keep_only(self.work / "survey", set(goals.values()))
        tables = [pyarrow.parquet.read_table(goal) for part, goal in goals.items() if part.name not in self.faults]
        if not tables:
            raise InputError(f"no shard could be read; the first: {next(iter(self.faults.values()))['error']}")
        path, key = (
            self.folder / "facts.parquet",
            sha256_of(sorted(goal.name for goal in goals.values() if goal.exists())),
        )
        if not path.exists() or pyarrow.parquet.read_schema(path).metadata.get(_FACTS_KEY) != key.encode():
            table = self.method.gather(tables)
            output.write_table(table.replace_schema_metadata({**(table.schema.metadata or {}), _FACTS_KEY: key}), path)
        return path

    def judge(self, parts: Sequence[Shard], facts: Path | None, started: float) -> Curation:
        digest = "" if facts is None else hashlib.sha256(facts.read_bytes()).hexdigest()
        parts = [part for part in parts if part.name not in self.faults]
        tasks = []
        for part in parts:
            key = self._key(part, "judge", digest, self.only_kept)
            if shards.record(self.work, part, key) is None:
                tasks.append((self.method, part, self.folder, key, facts, digest, self.only_kept))
        self._all(shards.judge, tasks, self.progress)
        parts = [part for part in parts if part.name not in self.faults]
        if not parts:
            raise InputError(f"no shard could be judged; the first: {next(iter(self.faults.values()))['error']}")
        _keep_only(self.folder / "data", {shards.data_path(self.folder, part) for part in parts})
        _keep_only(self.work / "records", {shards.record_path(self.work, part) for part in parts})
        records = [shards.read_record(shards.record_path(self.work, part)) for part in parts]
        return self._result(parts, records, facts, len(tasks), started)

    def _result(
        self, parts: Sequence[Shard], records: list[dict[str, Any]], facts: Path | None, done: int, started: float
    ) -> Curation:
        reasons: dict[str, Counter[str]] = {}
        sums: dict[str, float] = {}
        for record in records:
            for reason, counts in record["reasons"].items():
                reasons.setdefault(reason, Counter()).update(counts)
            for column, value in record["sums"].items():
                sums[column] = sums.get(column, 0.0) + value
        rows, kept = (sum(record[name] for record in records) for name in ("rows", "kept"))
        notes = {}
        if facts is not None:
            reviews = [pyarrow.parquet.read_table(self.work / "review" / f"{part.name}.parquet") for part in parts]
            totals = {**sums, "rows": rows, "kept": kept}
            notes = self.method.notes(pyarrow.parquet.read_table(facts), reviews, totals)
        return Curation(
            self.folder,
            describe(self.method),
            rows,
            kept,
            {reason: dict(counts) for reason, counts in sorted(reasons.items(), key=lambda item: -item[1].total())},
            sums,
            len(parts),
            done,
            tuple(fault for _, fault in sorted(self.faults.items())),
            time.monotonic() - started,
            tuple(row for record in records for row in record["samples"])[:_EXAMPLES],
            notes,
        )

    def _key(self, part: Shard, *more: Any) -> str:
        return sha256_of([self.key, part.source, part.row_groups, part.stamp, *more])

    def _all(self, function: Callable[..., Any], tasks: list[tuple[Any, ...]], label: str) -> None:
        """Do all tasks; each returns (its shard, rows, error or "")."""
        with _Bar(self.progress and label, len(tasks)) as bar:
            for part, rows, error in workers.run(function, tasks, **self.where):
                bar.advance(rows)
                if error and self.broken == "stop":
                    raise InputError(error)
                if error:
                    self.faults[part.name] = {"source": part.source, "error": error}


def method_key(method: Any) -> str:
    """A hash of everything that decides what a method does: version, name, source, hyper-parameters, the files these
    name.
    """
    described = describe(method)
    files = [
        [value, pool.file_stamp(Path(value))]
        for value in described["config"].values()
        if isinstance(value, str) and value and len(value) < 4096 and Path(value).is_file()
    ]
    try:
        code = Path(inspect.getsourcefile(method if inspect.isfunction(method) else type(method)) or "").read_bytes()
    except (OSError, TypeError):  # made at a prompt: nothing to hash
        code = b""
    return sha256_of([palimpsest.__version__, described, files, hashlib.sha256(code).hexdigest()])


def describe(method: Any) -> dict[str, Any]:
    """Name, paper and hyper-parameters of a method; of a plain function its name."""
    from palimpsest.core.methods import info_of

    if not dataclasses.is_dataclass(method):
        return {"name": getattr(method, "__qualname__", type(method).__name__), "paper": "", "config": {}}
    try:
        info = info_of(method)
    except InputError:  # somebody's own dataclass
        return {"name": type(method).__name__, "paper": "", "config": config_of(method)}
    return {"name": info.name, "paper": info.paper, "config": config_of(method)}


def with_model_folder(method: M, needed: bool, out: Path) -> M:
    """`method` with a place for the model that it trains (`tuned`); where that is gone, the survey's facts go too.

    They are gathered again, and the model is trained again with them.
    """
    if not needed:
        return method
    tuned = Path(method.tuned) if method.tuned else out / "model"
    if not (tuned / "config.json").exists():
        (out / "facts.parquet").unlink(missing_ok=True)
    return replace(method, tuned=str(tuned))


def add(frame: DataFrame, columns: dict[str, Any]) -> DataFrame:
    """`frame` with expressions as new columns.  An `InputError` if the user's data has a column of that name."""
    for name in columns:
        if name in frame.column_names:
            raise InputError(f"the pool already has a column '{name}', which this method adds; rename it")
    return frame.with_columns(columns)


def text_column(frame: DataFrame, name: str) -> Any:
    """The expression of a text column; an `InputError` where there is none or it holds no strings."""
    daft = pool.require_daft()
    if name not in frame.column_names:
        found = ", ".join(f"'{column}'" for column in frame.column_names)
        raise InputError(f"no column '{name}'; found {found} (say which one holds the text)")
    kind = frame.schema()[name].dtype
    if not kind.is_string():
        raise InputError(f"the column '{name}' holds {kind}; wanted strings")
    return daft.col(name)


def _keep_only(folder: Path, wanted: set[Path]) -> None:
    """Remove what shards left behind that are no longer in the pool, and what a killed writer left half-written."""
    for path in folder.iterdir() if folder.exists() else ():
        if path not in wanted:
            path.unlink()


class _Bar:
    """Shards done and rows a second on stderr, on a terminal."""

    def __init__(self, label: str, total: int):
        self.label, self.total, self.rows = label, total, 0

    def __enter__(self) -> _Bar:
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

        console = Console(stderr=True)
        self.bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("shards{task.fields[speed]}"),
            TimeRemainingColumn(),
            console=console,
            disable=not self.label or not self.total or not console.is_terminal,
        )
        self.bar.start()
        self.task = self.bar.add_task(self.label, total=self.total, speed="")
        self.started = time.monotonic()
        return self

    def advance(self, rows: int) -> None:
        self.rows += rows
        speed = f", {self.rows / max(time.monotonic() - self.started, 1e-9):,.0f} rows/s" if self.rows else ""
        self.bar.update(self.task, advance=1, speed=speed)

    def __exit__(self, *_: object) -> None:
        self.bar.stop()
