"""What a judged shard leaves on disk: one parquet file, and the counts and examples that the report needs.

Files do not depend on how Daft cut its batches: the same rows give the same bytes.  Knows nothing of methods.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet

from palimpsest.core.files import atomic_file
from palimpsest.core.seeds import numpy_rng

if TYPE_CHECKING:
    from daft import DataFrame

_GROUP = 1 << 14  # rows of a row group
_SAMPLE = 256  # rows of a shard that stand for its distributions in the report
_TEXT = 400  # characters of a text shown there


def write_frame(frame: DataFrame, path: Path) -> None:
    """Stream a frame into one parquet file.  Row groups do not depend on how Daft cut its batches: same rows, same
    bytes.
    """
    schema = frame.schema().to_pyarrow_schema()
    with atomic_file(path) as temporary, pyarrow.parquet.ParquetWriter(temporary, schema, compression="zstd") as writer:
        for table in _regrouped(frame.to_arrow_iter(), schema):
            writer.write_table(table, row_group_size=_GROUP)


def _regrouped(batches: Iterator[pa.RecordBatch], schema: pa.Schema) -> Iterator[pa.Table]:
    held: list[pa.Table] = []
    rows = 0
    for batch in batches:
        held.append(pa.Table.from_batches([batch]).cast(schema))
        rows += batch.num_rows
        if rows >= _GROUP:
            table = pa.concat_tables(held)
            whole = rows - rows % _GROUP
            yield table.slice(0, whole)
            held, rows = [table.slice(whole)], rows - whole
    if rows:
        yield pa.concat_tables(held)


def write_table(table: pa.Table, path: Path) -> None:
    with atomic_file(path) as temporary:
        pyarrow.parquet.write_table(table, temporary, compression="zstd")


def summary(path: Path, added: list[str], name: str, text: str) -> dict[str, Any]:
    """Of a judged shard: rows, rows kept, counts by reason and side, sums of the added numbers, and rows drawn at
    random.
    """
    with pyarrow.parquet.ParquetFile(path) as file:
        kinds = {field.name: field.type for field in file.schema_arrow}
        plain = [column for column in added if not pa.types.is_nested(kinds[column])]
        numbers = [
            column for column in plain if pa.types.is_floating(kinds[column]) or pa.types.is_integer(kinds[column])
        ]
        shown = [text] if text in kinds and not pa.types.is_nested(kinds[text]) and text not in plain else []
        rows = file.metadata.num_rows
        places = np.sort(numpy_rng(0, "sample", name).choice(rows, min(_SAMPLE, rows), replace=False))
        reasons: dict[str, Counter[str]] = {}
        sums = dict.fromkeys(numbers, 0.0)
        samples: list[dict[str, Any]] = []
        start = 0
        for batch in file.iter_batches(columns=plain + shown, batch_size=_GROUP):
            kept = batch["keep"].to_pylist() if "keep" in plain else [True] * batch.num_rows
            why = batch["reason"].to_pylist() if "reason" in plain else [""] * batch.num_rows
            for (reason, side), count in Counter(zip(why, map(bool, kept), strict=True)).items():
                reasons.setdefault(reason or "", Counter())["kept" if side else "left out"] += count
            for column in numbers:
                sums[column] += float(pc.sum(batch[column]).as_py() or 0)
            inside = places[(places >= start) & (places < start + batch.num_rows)] - start
            drawn = batch.take(pa.array(inside)).to_pylist()
            samples += [{key: _shown(value) for key, value in row.items()} for row in drawn]
            start += batch.num_rows
    kept_rows = sum(counts["kept"] for counts in reasons.values())
    return {"rows": rows, "kept": kept_rows, "reasons": reasons, "sums": sums, "samples": samples}


def _shown(value: Any) -> Any:
    if isinstance(value, float) and (value != value or value in (float("inf"), float("-inf"))):
        return None
    if value is None or isinstance(value, bool | int | float):
        return value
    return str(value)[:_TEXT]
