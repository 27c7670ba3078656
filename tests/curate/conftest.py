"""Small pools on disk."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet
import pytest

pytest.importorskip("daft")

ENTRIES = ["dog", "red dog", "cat", "zebra crossing", "U.S.", "never seen"]


def captions(start: int, count: int) -> list[dict[str, Any]]:
    """Rows of which half name a dog, a tenth a cat, one in fifty a zebra crossing, and a third nothing."""
    kinds = {0: "a red dog, running", 1: "the dog sleeps", 2: "IMG_{n}.jpg", 3: "party at noon"}
    rows = []
    for n in range(start, start + count):
        text = "a zebra crossing in the U.S." if n % 50 == 7 else "my cat!" if n % 10 == 4 else kinds[n % 4].format(n=n)
        rows.append({"text": text, "url": f"http://x/{n}", "size": n})
    return rows


@pytest.fixture
def entries(tmp_path: Path) -> str:
    path = tmp_path / "entries.txt"
    path.write_text("\n".join(ENTRIES) + "\n")
    return str(path)


@pytest.fixture
def write_pool(tmp_path: Path) -> Callable[..., Path]:
    def write(shards: int = 4, rows: int = 300, name: str = "pool") -> Path:
        folder = tmp_path / name
        folder.mkdir()
        for shard in range(shards):
            write_parquet(folder / f"part{shard}.parquet", captions(shard * rows, rows))
        return folder

    return write


def write_parquet(path: Path, rows: list[dict[str, Any]], group: int | None = None) -> None:
    pyarrow.parquet.write_table(pa.Table.from_pylist(rows), path, row_group_size=group)


def write_lines(path: Path, rows: Iterable[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def rows_of(out: Path) -> list[dict[str, Any]]:
    """All rows that a run wrote."""
    return [
        row for path in sorted((out / "data").glob("*.parquet")) for row in pyarrow.parquet.read_table(path).to_pylist()
    ]


def files_of(out: Path) -> dict[str, bytes]:
    """What a run wrote for the user, without the times in it."""
    found = {
        str(path.relative_to(out)): path.read_bytes() for path in out.rglob("*.parquet") if ".work" not in path.parts
    }
    told = json.loads((out / "curation.json").read_text())
    for changing in ("seconds", "done"):
        told.pop(changing)
    return {**found, "curation.json": json.dumps(told).encode()}
