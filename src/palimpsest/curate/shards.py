"""What is done to one shard, in whatever process: surveyed, judged, and put on record when its output is whole.

Errors of the input come back as text that names the file; everything else goes up.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet

from palimpsest.core.errors import InputError
from palimpsest.core.files import write_json
from palimpsest.curate import output, pool
from palimpsest.curate.pool import Shard

ADDED = ("keep", "weight", "reason")  # besides score_*
Outcome = tuple[Shard, int, str]  # of a task: its shard, rows done, and the error of a shard that cannot be used


def survey(method: Any, part: Shard, goal: Path) -> Outcome:
    """Write what `method` finds on one shard to `goal`."""

    def work() -> int:
        table = method.survey(part.frame()).to_arrow()
        output.write_table(table, goal)
        return 0

    return _guarded(part, work)


def judge(
    method: Any, part: Shard, folder: Path, key: str, facts: Path | None, digest: str, only_kept: bool
) -> Outcome:
    """Write the shard with the method's columns, a review of it where there are facts, and its record last."""

    def work() -> int:
        frame = part.frame()
        judged = method(frame) if facts is None else method.judge(frame, _facts(str(facts), digest))
        added = [name for name in judged.column_names if name not in frame.column_names]
        _check_columns(frame.column_names, judged.column_names, added)
        if only_kept and "keep" in added:
            judged = judged.where(judged["keep"])
        path = data_path(folder, part)
        output.write_frame(judged, path)
        if facts is not None:
            daft = pool.require_daft()
            review = method.review(daft.read_parquet(str(path))).to_arrow()
            output.write_table(review, folder / ".work" / "review" / f"{part.name}.parquet")
        summary = output.summary(path, added, part.name, getattr(method, "text", "text"))
        write_json(record_path(folder / ".work", part), {"key": key, "source": part.source, **summary})
        return int(summary["rows"])

    return _guarded(part, work)


def _guarded(part: Shard, work: Callable[[], int]) -> Outcome:
    """Errors of the input as text that names the file; everything else goes up."""
    try:
        return part, work(), ""
    except Exception as error:
        found = _input_error(error)
        if found is None and type(error).__module__.startswith("daft"):
            try:
                part.check()
            except InputError as broken:
                found = str(broken)
        if found is None:
            raise
        return part, 0, found if part.source in found else f"{part.source}: {found}"


def _input_error(error: BaseException | None) -> str | None:
    """The text of an `InputError` that Daft has wrapped."""
    while error is not None:
        if isinstance(error, InputError):
            return str(error)
        error = error.__cause__ or error.__context__
    return None


def _check_columns(before: list[str], after: list[str], added: list[str]) -> None:
    lost = [name for name in before if name not in after]
    if lost:
        raise RuntimeError(f"the method dropped the user's columns {', '.join(lost)}")
    if not any(name in ADDED or name.startswith("score_") for name in added):
        raise RuntimeError(f"the method added no keep, weight or score_* (it added {', '.join(added) or 'nothing'})")


@lru_cache(maxsize=2)
def _facts(path: str, digest: str) -> pa.Table:
    """The facts, read once a process."""
    return pyarrow.parquet.read_table(path)


def data_path(folder: Path, part: Shard) -> Path:
    return folder / "data" / f"{part.name}.parquet"


def record_path(work: Path, part: Shard) -> Path:
    return work / "records" / f"{part.name}.json"


def record(work: Path, part: Shard, key: str) -> dict[str, Any] | None:
    """The record of a shard that is finished under this key."""
    path = record_path(work, part)
    if not path.exists() or not data_path(work.parent, part).exists():
        return None
    found = read_record(path)
    return found if found["key"] == key else None


def read_record(path: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return found
