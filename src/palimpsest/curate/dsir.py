"""How much likelier a document's words are in a target corpus than in the pool: importance weights of hashed n-grams.

Xie et al. 2023, "Data Selection for Language Models via Importance Resampling" (arXiv:2302.03169).  A score for
`MetaRater` and a baseline beside it.  Needs a file of target documents; knows words and pairs of neighbours only.
Shapes: H buckets.
"""

from __future__ import annotations

import re
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa

from palimpsest.core.errors import InputError
from palimpsest.core.methods import method
from palimpsest.curate.engine import add, text_column
from palimpsest.curate.pool import require_daft

if TYPE_CHECKING:
    from daft import DataFrame

Array = np.ndarray[Any, Any]


@method(verb="curate", paper="meta_rater", name="dsir")
@dataclass(frozen=True)
class DSIR:
    """Add ``score_dsir``: the log ratio of a document's words between a target corpus and the pool.

    The mean over its n-grams, where the paper sums, so that the score does not grow with length.
    """

    target: str = ""  # file of target documents
    text: str = "text"  # column
    buckets: int = 10_000  # that n-grams are hashed into
    smoothing: float = 1.0  # added to every bucket's count

    def __call__(self, pool: DataFrame) -> DataFrame:
        return self.judge(pool, self.gather([self.survey(pool).to_arrow()]))

    def survey(self, shard: DataFrame) -> DataFrame:
        """(bucket, count) of the n-grams of the shard."""
        daft = require_daft()
        buckets = shard.select(self._hashed(shard).alias("bucket")).explode("bucket").drop_null("bucket")
        return buckets.groupby("bucket").agg(daft.col("bucket").count().alias("count")).sort("bucket")

    def gather(self, parts: Sequence[pa.Table]) -> pa.Table:
        """(H,) rows: the log ratio of each bucket."""
        from palimpsest.data import records, sources

        if not self.target:
            raise InputError("wanted target: a file of documents like those wanted")
        pool, target = np.zeros(self.buckets), np.zeros(self.buckets)
        for part in parts:
            np.add.at(pool, part["bucket"].to_numpy(), part["count"].to_numpy())
        for text in records.documents(sources.read(Path(self.target), wanted="documents")):
            np.add.at(target, hashed(text, self.buckets), 1)
        shares = [(counts + self.smoothing) / (counts + self.smoothing).sum() for counts in (target, pool)]
        return pa.table({"ratio": np.log(shares[0] / shares[1])})

    def judge(self, shard: DataFrame, facts: pa.Table) -> DataFrame:
        daft = require_daft()
        ratio = facts["ratio"].to_numpy()

        @daft.func.batch(return_dtype=daft.DataType.float64(), use_process=False)
        def score(texts: Any) -> Any:
            found = (hashed(text or "", len(ratio)) for text in texts.to_pylist())
            return np.array([ratio[buckets].mean() if len(buckets) else 0.0 for buckets in found])

        return add(shard, {"score_dsir": score(text_column(shard, self.text))})

    def review(self, judged: DataFrame) -> DataFrame:
        return judged.agg(require_daft().col("score_dsir").mean().alias("mean"))

    def notes(self, facts: pa.Table, reviews: Sequence[pa.Table], totals: Mapping[str, float]) -> dict[str, Any]:
        mean = totals["score_dsir"] / max(totals["rows"], 1)
        return {"numbers": {"mean": mean}, "sentences": [f"The mean log ratio is {mean:.3f} nats an n-gram."]}

    def _hashed(self, frame: DataFrame) -> Any:
        daft = require_daft()

        @daft.func.batch(return_dtype=daft.DataType.list(daft.DataType.int64()), use_process=False)
        def buckets(texts: Any) -> Any:
            return [hashed(text or "", self.buckets).tolist() for text in texts.to_pylist()]

        return buckets(text_column(frame, self.text))


def hashed(text: str, buckets: int) -> Array:
    """The buckets of a text's words and pairs of neighbouring words, each as often as it comes."""
    words = re.findall(r"\w+|[^\w\s]+", text.lower())
    grams = [*words, *(f"{a} {b}" for a, b in pairwise(words))]
    return np.array([zlib.crc32(gram.encode()) % buckets for gram in grams], np.int64)
