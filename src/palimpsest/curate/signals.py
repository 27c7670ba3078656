"""Eleven cheap signals of a document's quality, counted from its characters, words and lines, as columns to rank by.

In the style of RedPajama-V2's quality signals, as meta-rater uses them (Zhuang et al. 2025, arXiv:2504.14194; its own
list is not published, this one is from its description).  They say nothing on their own about which way is good.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from palimpsest.core.errors import InputError
from palimpsest.core.methods import method
from palimpsest.curate.engine import add, text_column
from palimpsest.curate.pool import require_daft

if TYPE_CHECKING:
    from daft import DataFrame

_ENDS = (".", "!", "?", '"', "\N{RIGHT DOUBLE QUOTATION MARK}", "\N{IDEOGRAPHIC FULL STOP}")


def _entropy(words: list[str]) -> float:
    """Of the distribution of words, in nats."""
    return -sum(n / len(words) * math.log(n / len(words)) for n in Counter(words).values()) + 0.0


def _top_gram(words: list[str], size: int) -> float:
    """Share of the words' characters that stand in the most frequent sequence of `size` words, if any comes twice."""
    grams = Counter(tuple(words[place : place + size]) for place in range(len(words) - size + 1))
    if not grams:
        return 0.0
    gram, count = max(grams.items(), key=lambda item: (item[1], sum(map(len, item[0]))))
    return min(1.0, count * sum(map(len, gram)) / sum(map(len, words))) if count > 1 else 0.0


def _a_line(text: str, fits: Callable[[str], bool]) -> float:
    """Mean over the lines of the share of characters that fit."""
    lines = [line for line in text.splitlines() if line.strip()]
    return sum(sum(map(fits, line)) / len(line) for line in lines) / len(lines)


def _terminated(text: str) -> float:
    lines = [line.rstrip() for line in text.splitlines() if line.strip()]
    return sum(line.endswith(_ENDS) for line in lines) / len(lines)


SIGNALS: dict[str, Callable[[str, list[str]], float]] = {
    "words": lambda text, words: float(len(words)),
    "word_length": lambda text, words: sum(map(len, words)) / len(words),
    "words_without_letters": lambda text, words: sum(not re.search(r"[^\W\d_]", word) for word in words) / len(words),
    "unique_words": lambda text, words: len(set(words)) / len(words),
    "entropy": lambda text, words: _entropy(words),
    "sentences": lambda text, words: float(len(re.findall(r"[.!?\N{IDEOGRAPHIC FULL STOP}]+(?=\s|$)", text)) or 1),
    "terminated_lines": lambda text, words: _terminated(text),
    "digits": lambda text, words: _a_line(text, str.isdigit),
    "capitals": lambda text, words: _a_line(text, str.isupper),
    "top_bigram": lambda text, words: _top_gram(words, 2),
    "top_trigram": lambda text, words: _top_gram(words, 3),
}


@method(verb="curate", paper="meta_rater", name="signals")
@dataclass(frozen=True)
class Signals:
    """Add eleven cheap quality signals of each document as ``score_*`` columns; nothing is left out.

    ``words``, ``sentences`` (counts), ``word_length``, ``entropy`` (nats), and shares from 0 to 1; 0 for an empty text.
    """

    text: str = "text"  # column
    only: str = ""  # names of signals, separated by commas; "": all

    def __call__(self, pool: DataFrame) -> DataFrame:
        daft = require_daft()
        names = [name.strip() for name in self.only.split(",") if name.strip()] or list(SIGNALS)
        for name in names:
            if name not in SIGNALS:
                raise InputError(f"unknown signal '{name}'; known: {', '.join(SIGNALS)}")
        fields = {f"score_{name}": daft.DataType.float64() for name in names}

        @daft.func.batch(return_dtype=daft.DataType.struct(fields), use_process=False)
        def measured(texts: Any) -> Any:
            return [dict(zip(fields, signals(text or "", names), strict=True)) for text in texts.to_pylist()]

        found = measured(text_column(pool, self.text))
        return add(pool, {name: found.get(name) for name in fields})


def signals(text: str, names: list[str] | None = None) -> np.ndarray:
    """(S,) the signals of one document, 0 where it is empty."""
    names = list(SIGNALS) if names is None else names
    words = re.findall(r"\S+", text.lower())
    return np.array([SIGNALS[name](text, words) if words else 0.0 for name in names])
