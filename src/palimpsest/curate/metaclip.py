"""MetaCLIP: keep the texts that name a known concept, and thin out those that name only frequent ones.

Xu et al. 2023, "Demystifying CLIP Data" (arXiv:2309.16671).  Needs a pool with texts and a list of concepts (see
`palimpsest.curate.metadata`); images, URLs and all other columns go through unread.  No model filters anything; what no
entry names is lost, and whether a text fits its image is not asked.

A text that matches the entries E is kept with probability ``1 - prod over e in E of (1 - min(1, t / count(e)))``: at
least one of its entries draws it.  Draws are made by hashing rows, so neither order nor sharding nor the number of
machines changes them. Shapes: M entries, N rows.
"""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from palimpsest.core.errors import InputError
from palimpsest.core.files import sha256_of
from palimpsest.core.methods import method
from palimpsest.core.seeds import derive
from palimpsest.curate import metadata
from palimpsest.curate.engine import add, text_column
from palimpsest.curate.matching import Matcher
from palimpsest.curate.pool import Shard, file_stamp, require_daft

if TYPE_CHECKING:
    from daft import DataFrame

Array = np.ndarray[Any, Any]

_CLUMPED = (
    "{kept:,} rows were kept where {expected:,.0f} were expected: many rows of the pool are identical and share one "
    "draw; name a column that tells them apart (id)"
)


@method(verb="curate", paper="metaclip", name="metaclip")
@dataclass(frozen=True)
class MetaCLIP:
    """Keep texts that name a concept of a list, and balance the concepts: each frequent one contributes about t texts.

    Adds ``matched`` (numbers of the entries, from 0), ``probability``, ``keep`` and ``reason``.
    """

    metadata: str = ""  # file of entries (.txt one a line, or .json); "": made from the pool's own text
    text: str = "text"  # column
    tail: float = (
        0.06  # t is the count below which entries hold this share of all matches (the paper's 20,000 of 1.6 billion)
    )
    threshold: int = 0  # t itself; 0: from `tail`
    id: str = ""  # column that tells rows apart; "": all columns together, so identical rows share one draw
    seed: int = 0

    def __post_init__(self) -> None:
        if self.threshold < 0:
            raise InputError(f"threshold must be at least 1 (or 0: from tail), not {self.threshold}")
        if not 0 < self.tail < 1:
            raise InputError(f"tail must lie between 0 and 1, not {self.tail}")

    def __call__(self, pool: DataFrame) -> DataFrame:
        return self.judge(pool, self.gather([self.survey(pool).to_arrow()]))

    def prepare(self, shards: Sequence[Shard], out: Path) -> MetaCLIP:
        """With entries from the pool's own text, where none are given."""
        if self.metadata:
            return self
        stamps = sha256_of([[shard.name, shard.stamp, self.text] for shard in shards])
        path = out / f"metadata-{stamps[:8]}.txt"
        if not path.exists():
            metadata.save(metadata.from_pool(shards, text=self.text), path)
        return replace(self, metadata=str(path))

    def survey(self, shard: DataFrame) -> DataFrame:
        """(entry, count): in how many texts each entry occurs."""
        return _counted(shard.select(self._matched(shard).alias("entry")))

    def review(self, judged: DataFrame) -> DataFrame:
        """`survey` of the kept rows."""
        return _counted(judged.where(judged["keep"]).select(judged["matched"].alias("entry")))

    def gather(self, parts: Sequence[pa.Table]) -> pa.Table:
        """(M,) rows in the order of the list: entry, count, and chance, with which it draws one text; t is in the
        schema.
        """
        entries = _entries(*self._list())
        counts = _summed(parts, len(entries))
        t = self.threshold or tail_threshold(counts, self.tail)
        table = pa.table({"entry": entries, "count": counts, "chance": chances(counts, t)})
        return table.replace_schema_metadata({"threshold": str(t)})

    def judge(self, shard: DataFrame, facts: pa.Table) -> DataFrame:
        daft = require_daft()
        col = daft.col
        chance = facts["chance"].to_numpy()

        @daft.func.batch(return_dtype=daft.DataType.float64(), use_process=False)
        def probability(matched: Any) -> Any:
            return keep_probability(matched.to_arrow(), chance)

        @daft.func.batch(return_dtype=daft.DataType.bool(), use_process=False)
        def drawn(row: Any, probability: Any) -> Any:
            return uniform(row.to_arrow().fill_null(0).to_numpy()) < probability.to_arrow().to_numpy()

        row = self._row(shard)
        judged = add(shard, {"matched": self._matched(shard)})
        judged = add(judged, {"probability": probability(col("matched"))})
        judged = add(judged, {"keep": drawn(row, col("probability"))})
        reason = (
            daft.functions.when(col(self.text).is_null(), daft.lit("no text"))
            .when(col("probability") == 0, daft.lit("no entry matches"))
            .when(col("probability") == 1, daft.lit("names a rare concept"))
            .otherwise(daft.lit("names frequent concepts only"))
        )
        return add(judged, {"reason": reason})

    def notes(self, facts: pa.Table, reviews: Sequence[pa.Table], totals: Mapping[str, float]) -> dict[str, Any]:
        """t, the size expected before drawing, and the entries' counts before and after, for the report."""
        before, after = facts["count"].to_numpy(), _summed(reviews, facts.num_rows)
        t = int(facts.schema.metadata[b"threshold"])
        order = np.argsort(-before.astype(np.int64), kind="stable")
        never, head = int((before == 0).sum()), before > t
        share = float(before[head].sum() / max(before.sum(), 1))
        expected = totals.get("probability", 0.0)
        # no wider, if draws are independent
        spread = np.sqrt(expected * max(0.0, 1 - expected / max(totals["rows"], 1)))
        clumped = abs(totals["kept"] - expected) > 5 * spread + 1
        ranks = order[np.unique(np.geomspace(1, len(order), 60).astype(int)) - 1]
        seen = ranks[before[ranks] > 0]
        return {
            "numbers": {
                "threshold": t,
                "entries": len(before),
                "never": never,
                "head": int(head.sum()),
                "expected": expected,
            },
            "sentences": [
                f"Of {len(before):,} entries {len(before) - never:,} occur. {int(head.sum()):,} occur more than "
                f"t = {t:,} times and hold {share:.1%} of all matches.",
                f"{expected:,.0f} rows were expected before drawing.",
            ],
            "warnings": [_CLUMPED.format(kept=totals["kept"], expected=expected)] if clumped else [],
            "curves": [
                {
                    "title": "Texts of each entry, from the most frequent on",
                    "x": [int(np.flatnonzero(order == entry)[0]) + 1 for entry in seen],
                    "series": {"before": before[seen].tolist(), "kept": after[seen].tolist()},
                }
            ],
            "tables": [
                {
                    "caption": "The most frequent entries",
                    "columns": ["entry", "texts", "kept"],
                    "rows": [[facts["entry"][int(e)].as_py(), int(before[e]), int(after[e])] for e in order[:12]],
                }
            ],
        }

    def _list(self) -> tuple[str, str]:
        if not self.metadata:
            raise InputError(
                "wanted metadata: a file with the list of entries (curate.metadata.from_pool makes one from a pool)"
            )
        path = Path(self.metadata)
        if not path.is_file():
            raise InputError(f"{path}: no such file; wanted a list of entries, one a line")
        return str(path.resolve()), file_stamp(path)

    def _matched(self, frame: DataFrame) -> Any:
        daft = require_daft()
        column = text_column(frame, self.text)
        where = self._list()

        @daft.func.batch(return_dtype=daft.DataType.list(daft.DataType.uint32()), use_process=False)
        def matched(texts: Any) -> Any:
            return matcher(*where)(texts.to_arrow())

        return matched(column)

    def _row(self, frame: DataFrame) -> Any:
        """A 64-bit hash of what tells a row from the others, and of the seed."""
        daft = require_daft()
        if self.id and self.id not in frame.column_names:
            found = ", ".join(f"'{column}'" for column in frame.column_names)
            raise InputError(f"no column '{self.id}' to tell rows apart; found {found}")
        names = [self.id] if self.id else sorted(frame.column_names)
        return daft.functions.hash(
            *[daft.col(name) for name in names], seed=derive(self.seed, "metaclip"), hash_function="xxhash3_64"
        )


def _summed(parts: Sequence[pa.Table], entries: int) -> Array:
    """(M,) uint64 counts from tables of (entry, count)."""
    counts = np.zeros(entries, np.uint64)
    for part in parts:
        np.add.at(counts, part["entry"].to_numpy(), part["count"].to_numpy().astype(np.uint64))
    return counts


def tail_threshold(counts: Array, share: float) -> int:
    """t: the count at which the entries counted that often or less hold a share of all matches closest to `share`."""
    ordered = np.sort(counts)
    held = np.cumsum(ordered, dtype=np.uint64)
    if not len(held) or held[-1] == 0:
        raise InputError("no text of the pool names any entry of the list")
    return max(1, int(ordered[np.abs(held / held[-1] - share).argmin()]))


def chances(counts: Array, t: int) -> Array:
    """(M,) float64: with which probability an entry draws a text that names it, ``t / max(count, t)``."""
    if t < 1:
        raise InputError(f"the threshold must be at least 1, not {t}")
    return t / np.maximum(counts.astype(np.float64), t)


def keep_probability(matched: pa.ListArray, chance: Array) -> Array:
    """(N,) float64: the probability that at least one of a row's entries draws it; 0 where it has none."""
    rows = pc.list_parent_indices(matched).to_numpy()
    with np.errstate(divide="ignore"):  # an entry that always draws: log 0
        missed = np.log1p(-chance)[pc.list_flatten(matched).to_numpy()]
    # 0.0 where there are none, not -0.0
    return 0.0 - np.expm1(np.bincount(rows, weights=missed, minlength=len(matched)))


def uniform(hashes: Array) -> Array:
    """(N,) float64 in [0, 1) from the upper 53 bits of uint64 hashes."""
    return (hashes >> np.uint64(11)) * 2.0**-53


def resample(probability: Array, seed: int, epoch: int) -> Array:
    """(N,) bool: fresh draws for an epoch (the paper's online balancing), from the ``probability`` column of a
    curated pool.
    """
    return np.random.default_rng(derive(seed, "epoch", epoch)).random(len(probability)) < probability


@lru_cache(maxsize=2)
def _entries(path: str, stamp: str) -> list[str]:
    return metadata.load(path)


def matcher(path: str, stamp: str) -> Matcher:
    """The index of a list, made once a process; `stamp` as from `pool.file_stamp`."""
    with _making:
        return _matcher(path, stamp)


@lru_cache(maxsize=2)
def _matcher(path: str, stamp: str) -> Matcher:
    return Matcher(_entries(path, stamp))


_making = threading.Lock()  # Daft asks from several threads at once


def _counted(matches: DataFrame) -> DataFrame:
    daft = require_daft()
    exploded = matches.explode("entry").where(daft.col("entry").not_null())
    return exploded.groupby("entry").agg(daft.col("entry").count().alias("count")).sort("entry")
