"""A dense index: the rows of a table of vectors with the largest inner products, found exactly, by faiss.

Nothing is approximated, so what an index finds changes only with its rows: a row taken out is gone.  A search may bar
rows query by query, such as a text itself among its own neighbours.  `overlapping` finds the texts that may not stand
in a bank at all.  Knows nothing of what rows stand for.
Shapes: P rows, D dimensions, N queries, k found for each.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file

from palimpsest.core.errors import InputError, MissingExtra
from palimpsest.core.files import atomic_file

NONE = -1  # the row of a place that nothing was found for


@dataclass(frozen=True, eq=False)
class Found:
    """The best first; equal scores in the order of rows.  Where fewer than k may be found, rows end with `NONE`."""

    rows: np.ndarray  # (N, k) int64
    scores: np.ndarray  # (N, k) float64, -inf beside NONE


@dataclass(frozen=True, eq=False)
class DenseIndex:
    """An index over `vectors` (P, D).

    Raises InputError for no rows, another shape or numbers that are not finite; MissingExtra without faiss.
    """

    vectors: np.ndarray  # (P, D) float32

    def __post_init__(self) -> None:
        object.__setattr__(self, "vectors", np.ascontiguousarray(checked(self.vectors, "the index"), dtype=np.float32))
        if not len(self.vectors):
            raise InputError("an index of no rows: there is nothing to retrieve")

    def __len__(self) -> int:
        return len(self.vectors)

    @property
    def dimensions(self) -> int:
        return self.vectors.shape[1]

    @cached_property
    def _faiss(self) -> Any:
        try:
            import faiss
        except ImportError:
            raise MissingExtra("faiss-cpu", "retrieval") from None
        index = faiss.IndexFlatIP(self.dimensions)
        index.add(self.vectors)
        return index

    def search(self, queries: np.ndarray, k: int, barred: Sequence[Sequence[int] | np.ndarray] | None = None) -> Found:
        """The k best rows for each of (N, D) queries; `barred`: for each query, the rows that it may not be given.

        Scores are computed anew in float64, so that they do not depend on which queries are asked together.
        Raises InputError for k below 1 and for queries of another length or that are not finite.
        """
        if k < 1:
            raise InputError(f"k must be at least 1, not {k}")
        queries = np.ascontiguousarray(checked(queries, "a query"), dtype=np.float32)
        if len(queries) and queries.shape[1] != self.dimensions:
            raise InputError(f"queries have {queries.shape[1]} dimensions, the index has {self.dimensions}")
        if barred is not None and len(barred) != len(queries):
            raise InputError(f"{len(queries)} queries but {len(barred)} lists of barred rows")
        rows = np.full((len(queries), k), NONE, dtype=np.int64)
        scores = np.full((len(queries), k), -np.inf)
        if not len(queries):
            return Found(rows, scores)
        spare = max(map(len, barred)) if barred is not None else 0
        _, near = self._faiss.search(queries, min(k + spare, len(self)))
        exact = np.einsum("nd,nkd->nk", queries.astype(np.float64), self.vectors[near].astype(np.float64))
        for line, (found, value) in enumerate(zip(near, exact, strict=True)):
            allowed = np.ones(len(found), dtype=bool) if barred is None else ~np.isin(found, barred[line])
            found, value = found[allowed], value[allowed]
            best = np.lexsort((found, -value))[:k]
            rows[line, : len(best)], scores[line, : len(best)] = found[best], value[best]
        return Found(rows, scores)

    def without(self, rows: Sequence[int] | np.ndarray) -> DenseIndex:
        """The index with the given rows taken out; those behind them move up."""
        return DenseIndex(np.delete(self.vectors, np.asarray(rows, dtype=np.int64), axis=0))

    def save(self, path: str | Path) -> None:
        """One safetensors file, whole or not at all."""
        with atomic_file(path) as temporary:
            save_file({"vectors": self.vectors}, temporary)

    @staticmethod
    def load(path: str | Path) -> DenseIndex:
        """What `save` wrote; InputError for any other file."""
        try:
            return DenseIndex(load_file(path)["vectors"])
        except (OSError, SafetensorError, KeyError) as error:
            raise InputError(f"{path} is not an index: {str(error).splitlines()[0]}") from None


def checked(vectors: Any, what: str) -> np.ndarray:
    """Vectors as an array (M, D); InputError for another shape or numbers that are not finite."""
    found = np.asarray(vectors)
    if found.ndim != 2 or found.dtype.kind not in "fiu":
        raise InputError(f"{what}: wanted vectors (rows, dimensions), got {found.dtype} of shape {found.shape}")
    if not np.isfinite(found).all():
        raise InputError(
            f"{what}: row {int(np.argmin(np.isfinite(found).all(1)))} has a number that is NaN or infinite"
        )
    return found


def plain(text: str) -> tuple[str, ...]:
    """The words of a text, lower case, without punctuation: texts of the same words count as the same."""
    return tuple(re.findall(r"\w+", text.lower()))


def overlapping(texts: Sequence[str], others: Sequence[str], words: int = 8) -> np.ndarray:
    """(len(texts),) bool: which share a run of `words` words with one of `others`, or, if shorter, are one of them.

    What overlaps with labelled examples may not stand in a bank: near copies would carry labels to their twins.
    """
    if words < 1:
        raise InputError(f"words must be at least 1, not {words}")
    known = {run for other in others for run in _runs(plain(other), words)}
    return np.array([any(run in known for run in _runs(plain(text), words)) for text in texts], dtype=bool)


def _runs(found: tuple[str, ...], words: int) -> list[tuple[str, ...]]:
    if len(found) <= words:
        return [found] if found else []
    return [found[start : start + words] for start in range(len(found) - words + 1)]
