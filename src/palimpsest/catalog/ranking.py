"""Papers by nearness to a query: by meaning where the sentence encoder is installed, else by words.

Scores of one search compare with each other only: cosine similarities, BM25 scores, or shares of the query's words.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from palimpsest.catalog import Paper, papers
from palimpsest.core.cache import cached
from palimpsest.core.errors import InputError, MissingExtra
from palimpsest.models.encoder import PACKAGED, Encoder

_COMMON = frozenset(
    ["a", "an", "and", "at", "by", "for", "from", "how", "in", "is", "of", "on", "or", "the", "to", "with"]
)


def rank(query: str, k: int = 10) -> list[tuple[Paper, float]]:
    """The `k` papers nearest to `query`, best first, each with its score.  InputError for an empty query or k < 1."""
    if not query.strip():
        raise InputError("an empty query finds nothing: say what the paper is about")
    if k < 1:
        raise InputError(f"k must be at least 1, not {k}")
    every = papers()
    texts = [_text(paper) for paper in every]
    scores = next(found for way in (by_meaning, by_bm25, by_words) if (found := way(query, texts)) is not None)
    order = np.argsort(-scores, kind="stable")[:k]
    return [(every[row], float(scores[row])) for row in order]


def by_meaning(query: str, texts: Sequence[str]) -> np.ndarray | None:
    """(N,) cosine similarities; None if the encoder is not installed.  The texts' vectors are kept in the cache."""
    try:
        encoder = Encoder.load()
    except MissingExtra:
        return None

    def build(folder: Path) -> None:
        np.save(folder / "vectors.npy", encoder.embed(texts), allow_pickle=False)

    vectors = cached("catalogue", {"encoder": PACKAGED, "texts": list(texts)}, build, _load)
    return vectors @ encoder.embed([query])[0]


def by_bm25(query: str, texts: Sequence[str]) -> np.ndarray | None:
    """(N,) BM25 scores; None if bm25s is not installed."""
    try:
        import bm25s
    except ImportError:
        return None
    index = bm25s.BM25()
    index.index([_words(text) for text in texts], show_progress=False)
    known = [word for word in _words(query) if word in index.vocab_dict]
    return index.get_scores(known) if known else np.zeros(len(texts), dtype=np.float32)


def by_words(query: str, texts: Sequence[str]) -> np.ndarray:
    """(N,) the share of the query's words that each text has."""
    wanted = set(_words(query))
    return np.array([len(wanted & set(_words(text))) / max(len(wanted), 1) for text in texts])


def _text(paper: Paper) -> str:
    return f"{paper.short}: {paper.title}. {paper.claim} {', '.join(paper.tags)}"


def _words(text: str) -> list[str]:
    """Lower-case words that mean something, without the commonest endings: 'forgets a book' finds 'forget books'."""
    words = (word for word in re.findall(r"[a-z0-9]+", text.lower()) if word not in _COMMON)
    return [re.sub(r"(?<=\w{3})(ing|ed|es|s)$", "", word) for word in words]


def _load(folder: Path) -> np.ndarray:
    return np.load(folder / "vectors.npy", allow_pickle=False)
