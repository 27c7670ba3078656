"""Where data comes from: a file, a folder, a glob or the Hugging Face hub, read into one checked records table.

=======================================  ================================================================
``x.jsonl[.gz]``                         one object a line (the way to give large data)
``x.json``                               a list of objects
``x.csv[.gz]``                           a header, then records
``x.parquet``                            a table
``x.txt[.gz]``                           running text, cut into passages (`formats.text_file`)
a folder                                 every such file in it and below, in order of name
a glob such as ``data/*.jsonl``          every file it matches, in order of name
``hf:org/name[/config][:split]``         `datasets.load_dataset`, split ``train`` if none is named
=======================================  ================================================================

Column names are mapped as in `columns`; what cannot be used is one `InputError` that names file and line.
Rows stream through: input of more than 64 MB on disk becomes a memory-mapped table in the cache.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any, TypeAlias

import pyarrow as pa
from datasets import Dataset

from palimpsest.core import cache
from palimpsest.core.errors import InputError
from palimpsest.core.files import sha256_of
from palimpsest.data import formats
from palimpsest.data.columns import WANTED, Wanted, canonical, read_columns, renamed
from palimpsest.data.records import as_string

Source: TypeAlias = str | Path | Dataset
find = formats.find
SPILL = 64 * 2**20  # bytes of input from which a table is memory-mapped
_CHUNK = 4096  # rows of one Arrow part
_READER = 1  # changes when the same file would be read into another table


def read(source: Source, *, wanted: Wanted = "any") -> Dataset:
    """The records table of `source` (see the table above); a `Dataset` is checked and its columns mapped alike.

    `wanted` says which rows the caller can use: "documents" (text), "questions" (prompt and completion, or messages)
    or "any".  Raises `InputError`.
    """
    if wanted not in WANTED:
        raise InputError(f"wanted must be one of {', '.join(WANTED)}, not '{wanted}'")
    if isinstance(source, Dataset):
        return _from_table(source, "the table", wanted)
    if str(source).startswith("hf:"):
        return _from_table(from_hub(str(source)), str(source), wanted)
    files = find(source)
    rows = (place for path in files for place in _from_file(path))
    if sum(_unpacked_bytes(path) for path in files) < SPILL:
        return _table(_parts(rows, wanted), _empty(source))
    stamps = [[str(path.resolve()), path.stat().st_size, path.stat().st_mtime_ns] for path in files]
    return _spilled(stamps, rows, wanted, _empty(source))


def _from_file(path: Path) -> Iterator[formats.Place]:
    """The rows of a file; one without any is an error even where other files have some."""
    empty = True
    for place in formats.rows(path):
        empty = False
        yield place
    if empty:
        raise InputError(f"{path}: the file is empty; wanted at least one {_unit(path)}")


def _unit(path: Path) -> str:
    return "paragraph" if formats.extension(path).startswith(".txt") else "row"


def _unpacked_bytes(path: Path) -> int:
    return path.stat().st_size * (4 if path.suffix.lower() in (".gz", ".parquet") else 1)


def from_hub(source: str) -> Dataset:
    name, _, split = source.removeprefix("hf:").partition(":")
    parts = name.split("/")
    if not all(parts) or len(parts) > 3:
        raise InputError(f"{source}: wanted hf:org/name or hf:org/name/config, either with :split")
    repository, config = "/".join(parts[:2]), (parts[2] if len(parts) == 3 else None)
    import datasets

    try:
        table = datasets.load_dataset(repository, config, split=split or "train", streaming=False)
    except Exception as error:  # whatever the hub client raises: no network, no such set, no such split
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise InputError(f"{source}: cannot be loaded ({reason})") from error
    if not isinstance(table, Dataset):
        raise InputError(f"{source}: found a {type(table).__name__}; wanted one split, as in hf:org/name:train")
    return table


def _from_table(table: Dataset, label: str, wanted: Wanted) -> Dataset:
    """`table` checked and with its columns renamed: no copy is made, the features of other columns stay."""
    if len(table) == 0:
        raise InputError(f"{label}: it has no rows; wanted at least one")
    names, join = renamed(tuple(table.column_names))
    arrow = table.select_columns(list(read_columns(tuple(table.column_names)))).with_format("arrow")
    prompts: list[str | None] = []
    for start in range(0, len(table), _CHUNK):
        for offset, row in enumerate(arrow[start : start + _CHUNK].to_pylist(), 1):
            clean = canonical(row, f"{label}, row {start + offset}", wanted)
            if join is not None:
                prompts.append(clean["prompt"])
    if join is not None:
        table = table.remove_columns(list(join)).add_column("prompt", prompts)
    return table.rename_columns({old: new for old, new in names.items() if old != new and old in table.column_names})


def _empty(source: str | Path) -> str:
    return f"{source}: no rows; wanted at least one"


def _parts(rows: Iterable[formats.Place], wanted: Wanted) -> Iterator[pa.Table]:
    """Checked rows under canonical names, in Arrow tables of at most `_CHUNK` rows."""
    clean = (canonical(row, where, wanted) for where, row in rows)
    while chunk := list(islice(clean, _CHUNK)):
        yield _to_arrow(chunk)


def _to_arrow(rows: list[dict[str, Any]]) -> pa.Table:
    names = dict.fromkeys(name for row in rows for name in row)
    return pa.table({name: _array([row.get(name) for row in rows]) for name in names})


def _array(values: list[Any]) -> pa.Array:
    try:
        return pa.array(values)
    except (pa.ArrowInvalid, pa.ArrowTypeError, pa.ArrowNotImplementedError, OverflowError):
        return pa.array([as_string(value) for value in values])  # an extra column of mixed types


def _table(parts: Iterable[pa.Table], empty: str, fingerprint: str | None = None) -> Dataset:
    tables = list(parts)
    if not tables:
        raise InputError(empty)
    return Dataset(_join(tables), fingerprint=fingerprint)


def _join(tables: list[pa.Table]) -> pa.Table:
    """The parts one after the other; extra columns whose types disagree between parts become strings."""
    names = dict.fromkeys(name for table in tables for name in table.column_names)
    for name in names:
        found = [table.schema.field(name) for table in tables if name in table.column_names]
        try:
            pa.unify_schemas([pa.schema([field]) for field in found], promote_options="permissive")
        except pa.ArrowTypeError:
            tables = [_stringified(table, name) for table in tables]
    return pa.concat_tables(tables, promote_options="permissive")


def _stringified(table: pa.Table, name: str) -> pa.Table:
    if name not in table.column_names:
        return table
    values = pa.array([as_string(value) for value in table[name].to_pylist()], pa.string())
    return table.set_column(table.column_names.index(name), name, values)


def _spilled(key: Any, rows: Iterable[formats.Place], wanted: Wanted, empty: str) -> Dataset:
    """The table of `rows` as memory-mapped Arrow files in the cache."""

    def build(folder: Path) -> None:
        number = 0
        for number, part in enumerate(_parts(rows, wanted), 1):
            with pa.ipc.new_file(str(folder / f"{number:06d}.arrow"), part.schema) as file:
                file.write_table(part)
        if number == 0:
            raise InputError(empty)

    def mapped(folder: Path) -> Dataset:
        parts = (pa.ipc.open_file(pa.memory_map(str(file))).read_all() for file in sorted(folder.glob("*.arrow")))
        return _table(parts, empty, fingerprint=sha256_of(key)[:16])

    return cache.cached("sources", [_READER, key], build, mapped)
