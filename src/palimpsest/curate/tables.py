"""One file of a pool as Arrow batches whose schema is known before the first row: nothing lost, nothing guessed from a
sample.

Daft infers the types of a ``.jsonl`` or ``.csv`` from its beginning: a column that first appears later is dropped, a
float after integers is cut off.  So these files are read twice in blocks, first for their schema, then for their rows,
and come to Daft as a `DataSource`.  Where the values of a column have no common type, it becomes JSON text.  Parquet is
read by Daft itself. Broken input is an `InputError` with the line.  Knows nothing of shards or methods.
"""

from __future__ import annotations

import gzip
import io
import json
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv
import pyarrow.json

from palimpsest.core.errors import InputError
from palimpsest.data import formats

_BLOCK = 4 << 20  # bytes of a file parsed at once
_ROWS = 4096  # rows of a batch where rows are made one by one

_INTEGER = r"^-?(0|[1-9][0-9]{0,17})$"  # not 007, which is a name, and nothing past 64 bits
_NUMBER = r"^-?(0|[1-9][0-9]{0,14})(\.[0-9]+)?([eE][+-]?[0-9]{1,2})?$"

Batches = Callable[[], Iterator[pa.RecordBatch]]


def read(path: str) -> tuple[pa.Schema, Batches]:
    """The schema of a ``.jsonl``, ``.csv``, ``.json`` or ``.txt`` file (or URL), and a function that reads its
    batches.
    """
    kind = formats.extension(Path(path)).removesuffix(".gz")
    if kind == ".jsonl":
        schema = _lines_schema(path)
        return schema, lambda: _lines(path, schema)
    if kind == ".csv":
        schema = _csv_schema(path)
        return schema, lambda: _csv(path, schema)
    table = _whole(path)
    return table.schema, lambda: iter(table.to_batches(max_chunksize=_ROWS))


def open_binary(path: str) -> IO[bytes]:
    """A local file or one behind a URL, unpacked if its name ends in ``.gz``."""
    packed = path.lower().endswith(".gz")
    if "://" not in path:
        return formats.open_binary(Path(path))
    from pyarrow import fs

    system, inner = fs.FileSystem.from_uri(path)
    handle: Any = system.open_input_stream(inner, compression="gzip" if packed else None)
    return handle


def _blocks(path: str) -> Iterator[tuple[int, bytes]]:
    """(number of its first line, whole lines of about `_BLOCK` bytes) of a file."""
    number = 1
    try:
        with open_binary(path) as handle:
            start = handle.read(3)
            rest = b"" if start == b"\xef\xbb\xbf" else start  # a byte order mark is dropped
            while block := handle.read(_BLOCK):
                block = rest + block
                end = block.rfind(b"\n") + 1
                whole, rest = block[:end], block[end:]
                if whole:
                    yield number, whole
                    number += whole.count(b"\n")
            if rest.strip():
                yield number, rest
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise InputError(f"{path}: not a whole gzip file ({error})") from error
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror or error})") from error


def _lines_schema(path: str) -> pa.Schema:
    found: pa.Schema | None = None
    for number, block in _blocks(path):
        if block.strip():
            _check_text(path, number, block)
            found = _common(found, _table(path, number, block, None).schema)
    if found is None or not len(found):
        raise InputError(f"{path}: the file is empty; wanted at least one row")
    return pa.schema([pa.field(field.name, _settled(field.type)) for field in found])


def _check_text(path: str, number: int, block: bytes) -> None:
    try:
        block.decode()  # Arrow's JSON reader takes anything
    except UnicodeDecodeError as error:
        line = number + block.count(b"\n", 0, error.start)
        raise InputError(f"{path}:{line}: not UTF-8 (byte 0x{block[error.start]:02x}); wanted UTF-8 text") from error


def _lines(path: str, schema: pa.Schema) -> Iterator[pa.RecordBatch]:
    for number, block in _blocks(path):
        if block.strip():
            yield from _table(path, number, block, schema).to_batches()


def _table(path: str, number: int, block: bytes, schema: pa.Schema | None) -> pa.Table:
    """The rows of a block; of exactly `schema` if that is given."""
    parse = pyarrow.json.ParseOptions(
        explicit_schema=schema, unexpected_field_behavior="infer" if schema is None else "error"
    )
    read = pyarrow.json.ReadOptions(use_threads=False, block_size=max(len(block), 1))
    try:
        table = pyarrow.json.read_json(io.BytesIO(block), read, parse)
        return table if schema is None else table.select(schema.names)
    except pa.ArrowInvalid:  # broken, or a column of mixed types: line by line, to name the line or to settle on a type
        return _table_of(list(_objects(path, number, block)), schema)


def _objects(path: str, number: int, block: bytes) -> Iterator[dict[str, Any]]:
    for line_number, line in enumerate(block.split(b"\n"), number):
        if not line.strip():
            continue
        where = f"{path}:{line_number}"
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise InputError(f"{where}: not valid JSON ({error.msg}, column {error.colno})") from error
        if not isinstance(row, dict):
            raise InputError(f'{where}: found {type(row).__name__}; wanted an object such as {{"text": "..."}}')
        yield row


def _table_of(rows: list[dict[str, Any]], schema: pa.Schema | None) -> pa.Table:
    from palimpsest.data.records import as_string  # brings `datasets` with it, which workers can mostly do without

    names = list(dict.fromkeys(name for row in rows for name in row)) if schema is None else schema.names
    arrays = {}
    for name in names:
        values = [row.get(name) for row in rows]
        wanted = None if schema is None else schema.field(name).type
        try:
            arrays[name] = pa.array(values, wanted)
        except (pa.ArrowInvalid, pa.ArrowTypeError, pa.ArrowNotImplementedError, OverflowError):
            arrays[name] = pa.array([as_string(value) for value in values], pa.string())
    return pa.table(arrays)


def _common(one: pa.Schema | None, other: pa.Schema) -> pa.Schema:
    """The columns of both, each of a type that holds both; text where there is none."""
    if one is None:
        return other
    fields = {field.name: field.type for field in one}
    for field in other:
        fields[field.name] = _common_type(fields.get(field.name, field.type), field.type)
    return pa.schema(list(fields.items()))


def _common_type(one: pa.DataType, other: pa.DataType) -> pa.DataType:
    if one == other:
        return one
    try:
        pair = [pa.schema([pa.field("x", _plain(kind))]) for kind in (one, other)]
        return pa.unify_schemas(pair, promote_options="permissive").field("x").type
    except (pa.ArrowTypeError, pa.ArrowInvalid):
        return pa.string()


def _plain(kind: pa.DataType) -> pa.DataType:
    return pa.string() if pa.types.is_temporal(kind) else kind


def _settled(kind: pa.DataType) -> pa.DataType:
    """Text for what looks like a date (JSON has none) and for what was always null."""
    if pa.types.is_temporal(kind) or pa.types.is_null(kind):
        return pa.string()
    if pa.types.is_list(kind):
        return pa.list_(_settled(kind.value_type))
    if pa.types.is_struct(kind):
        return pa.struct([(field.name, _settled(field.type)) for field in kind])
    return kind


def _csv_batches(path: str, schema: pa.Schema | None) -> Iterator[pa.RecordBatch]:
    """Batches of strings (null where a cell is empty), or of `schema`."""
    try:
        with open_binary(path) as handle:
            head = handle.readline().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise InputError(f"{path}:1: not UTF-8 ({error.reason}); wanted UTF-8 text") from error
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror or error})") from error
    if not head.strip():
        raise InputError(f"{path}: the file is empty; wanted a header and at least one row")
    separator = max(",;\t", key=head.count)
    names = next(formats.csv.reader([head], delimiter=separator))
    types = schema or pa.schema([(name, pa.string()) for name in names])
    try:
        with (
            open_binary(path) as handle,
            pyarrow.csv.open_csv(
                pa.PythonFile(handle, "r"),
                pyarrow.csv.ReadOptions(use_threads=False, block_size=_BLOCK),
                pyarrow.csv.ParseOptions(delimiter=separator, newlines_in_values=True),
                pyarrow.csv.ConvertOptions(
                    column_types=types, strings_can_be_null=True, null_values=[""], quoted_strings_can_be_null=True
                ),
            ) as reader,
        ):
            yield from reader
    except (pa.ArrowInvalid, OSError, EOFError, zlib.error) as error:
        if "://" not in path:
            for _ in formats.rows(Path(path)):  # names the line
                pass
        raise InputError(f"{path}: {str(error).splitlines()[0]}") from error


def _csv_schema(path: str) -> pa.Schema:
    """int64 where every value is written as an integer is, float64 where every value is a number, else text."""
    types: dict[str, pa.DataType] = {}
    rows = 0
    for batch in _csv_batches(path, None):
        rows += batch.num_rows
        for name, column in zip(batch.schema.names, batch.columns, strict=True):
            types[name] = _narrowest(column, types.get(name, pa.int64()))
    if rows == 0:
        raise InputError(f"{path}: the file has no rows; wanted at least one")
    return pa.schema(list(types.items()))


def _narrowest(column: pa.Array, at_least: pa.DataType) -> pa.DataType:
    for kind, written in ((pa.int64(), _INTEGER), (pa.float64(), _NUMBER)):
        fits = at_least in (pa.int64(), kind)
        if fits and pc.all(pc.match_substring_regex(column, written)).as_py() is not False:
            return kind
    return pa.string()


def _csv(path: str, schema: pa.Schema) -> Iterator[pa.RecordBatch]:
    return _csv_batches(path, schema)


def _whole(path: str) -> pa.Table:
    if "://" in path:
        raise InputError(f"{path}: only .parquet, .jsonl and .csv can be read from a URL")
    rows = [row for _, row in formats.rows(Path(path))]
    if not rows:
        raise InputError(f"{path}: the file is empty; wanted at least one row")
    table = _table_of(rows, None)
    return table.cast(pa.schema([pa.field(field.name, _settled(field.type)) for field in table.schema]))


def frame(path: str) -> Any:
    """The rows of `path` (see `read`) as a Daft frame that streams."""
    from daft import DataType
    from daft.io.source import DataSource, DataSourceTask
    from daft.recordbatch import RecordBatch
    from daft.schema import Schema

    arrow, batches = read(path)
    schema = Schema.from_field_name_and_types([(field.name, DataType.from_arrow_type(field.type)) for field in arrow])

    class Task(DataSourceTask):
        @property
        def schema(self) -> Schema:
            return schema

        async def read(self) -> Any:
            for batch in batches():
                yield RecordBatch.from_arrow_record_batches([batch], arrow)

    class Source(DataSource):
        @property
        def name(self) -> str:
            return path

        @property
        def schema(self) -> Schema:
            return schema

        async def get_tasks(self, pushdowns: Any) -> Any:
            yield Task()

    return Source().read()
