"""The ConceptVectors benchmark's files as records: each concept's article in passages, and its paragraphs to complete.

Hong et al. 2024 (arXiv:2406.11614; data CC BY 4.0, article texts CC BY-SA).  An object a concept, one a line or in a
list, with ``Concept``, ``wikipedia_content``, ``text_completion`` (``First_half``, ``Second_half``) and, of the model
that it was made for, ``Layer`` and ``Dim``.  Its questions come without answers, so they are no records.
Knows nothing of models.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

from palimpsest.core.errors import InputError
from palimpsest.data import formats

if TYPE_CHECKING:
    from pathlib import Path

    from datasets import Dataset

PASSAGE = 400  # characters that a passage has at least: the paper's
_SENTENCE = re.compile(r"(?<=[.!?])\s+")


def read_articles(path: str | Path, *, passages: int | None = None) -> Dataset:
    """A records table with the column ``concept``; of each article the first `passages` (default: all).

    The columns ``layer`` and ``neuron`` are the benchmark's vector of the concept (None where none is given).
    Raises `InputError` that names the place of an object without a concept, an article or its halves of paragraphs.
    """
    from datasets import Dataset

    columns: dict[str, list[Any]] = {
        name: [] for name in ("concept", "text", "prompt", "completion", "layer", "neuron")
    }
    for where, row in (place for file in formats.find(path) for place in formats.rows(file)):
        concept = _text(row, "Concept", where)
        place = {"concept": concept, "layer": row.get("Layer"), "neuron": row.get("Dim")}
        told: list[dict[str, Any]] = [
            {"text": text} for text in cut_passages(_text(row, "wikipedia_content", where))[:passages]
        ]
        for halves in row.get("text_completion") or ():
            first, second = (_text(halves, side, where) for side in ("First_half", "Second_half"))
            told.append({"prompt": first, "completion": second})
        for one in told:
            for name, values in columns.items():
                values.append({**place, **one}.get(name))
    if not columns["concept"]:
        raise InputError(f"{path}: no concepts in it")
    return Dataset.from_dict(columns)


def cut_passages(text: str, least: int = PASSAGE) -> list[str]:
    """A text in pieces that end with a sentence and have at least `least` characters; a short rest joins the last."""
    found: list[str] = []
    open_piece = ""
    for sentence in _SENTENCE.split(text.strip()):
        open_piece = f"{open_piece} {sentence}".strip()
        if len(open_piece) >= least:
            found.append(open_piece)
            open_piece = ""
    if open_piece:
        found[-1:] = [" ".join([*found[-1:], open_piece])]
    return found


def _text(row: Any, name: str, where: Any) -> str:
    value = row.get(name) if isinstance(row, dict) else None
    if not isinstance(value, str) or not value.strip():
        raise InputError(f"{where}: no {name}; wanted the ConceptVectors benchmark's fields")
    return value.strip()
