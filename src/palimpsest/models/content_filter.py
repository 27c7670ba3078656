"""A content filter in front of a model: prompts that name or describe what is forbidden are withheld from it.

Two screens, either enough: a list of names, and a gate (`models.gate`) that reads the meaning of the whole prompt with
whatever it brings along.  It stands for the regulation of behaviour that unlearning cannot give (arXiv:2407.00106,
section 4).  It screens what goes in; a document that is only scored has no prompt and passes.  Shapes: N prompts.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
from torch import Tensor

from palimpsest.core.seeds import numpy_rng
from palimpsest.data import records
from palimpsest.models.gate import Gate
from palimpsest.models.guard import Prepared, register_guard

if TYPE_CHECKING:
    from datasets import Dataset

    from palimpsest.models.lm import LM

NOTICE = "This was withheld."
MOST_TEXTS = 300  # of each side that a gate is trained on


@register_guard("content-filter")
@dataclass(frozen=True, eq=False)
class ContentFilter:
    """Replaces a prompt that it stops by `notice`."""

    names: tuple[str, ...] = ()
    gate: Gate | None = field(default=None, repr=False)
    notice: str = NOTICE

    def stops(self, prompts: Sequence[str]) -> np.ndarray:
        """(N,) bool: whether each prompt is withheld."""
        found = np.array([self._named(prompt) for prompt in prompts], dtype=bool)
        left = np.flatnonzero(~found).tolist()
        if self.gate is not None and left:
            found[left] = self.gate([prompts[row] for row in left])
        return found

    def prepare(self, lm: LM, prompts: Sequence[str]) -> Prepared:
        stopped = self.stops(prompts)
        return Prepared([self.notice if stop else prompt for prompt, stop in zip(prompts, stopped, strict=True)])

    def state(self) -> tuple[dict[str, Any], dict[str, Tensor]]:
        settings, tensors = self.gate.state() if self.gate is not None else (None, {})
        return {"names": list(self.names), "notice": self.notice, "gate": settings}, tensors

    @classmethod
    def restore(cls, settings: dict[str, Any], tensors: dict[str, Tensor]) -> ContentFilter:
        gate = None if settings["gate"] is None else Gate.restore(settings["gate"], tensors)
        return cls(tuple(settings["names"]), gate, settings["notice"])

    def _named(self, prompt: str) -> bool:
        return any(re.search(rf"(?<!\w){re.escape(name)}(?!\w)", prompt, re.IGNORECASE) for name in self.names)


def names_of(table: Dataset) -> tuple[str, ...]:
    """The names in the column ``person``, where there is one."""
    column = table["person"] if "person" in table.column_names else []
    return tuple(sorted({name for name in column if name}))


def texts_of(table: Dataset, seed: int = 0) -> list[str]:
    """What prompts about a table look like: its questions, its documents, and a question behind a document.

    At most `MOST_TEXTS`, drawn by `seed`.
    """
    documents = records.documents(table)
    questions = [prompt.strip() for prompt, _ in records.questions(table) if prompt.strip()]
    rng = numpy_rng(seed, "filter texts")
    behind = [f"{documents[int(rng.integers(len(documents)))]}\n\n{question}" for question in questions if documents]
    texts = list(dict.fromkeys([*documents, *questions, *behind]))
    if len(texts) <= MOST_TEXTS:
        return texts
    return [texts[row] for row in np.sort(rng.choice(len(texts), MOST_TEXTS, replace=False))]


def fit_filter(
    forbidden: Dataset, permitted: Dataset, *, names: Sequence[str] = (), error: float = 0.05, notice: str = NOTICE
) -> ContentFilter:
    """A filter whose gate stops at most a share `error` of texts like the permitted ones (class-conditional conformal).

    Raises `InputError` for fewer than five different texts on a side.
    """
    inside = texts_of(forbidden)
    known = set(inside)
    outside = [text for text in texts_of(permitted) if text not in known]
    return ContentFilter(tuple(names), Gate.fit(inside, outside, error=error), notice)
