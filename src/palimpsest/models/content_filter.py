"""A content filter in front of a model: prompts that name or describe what is forbidden are withheld from it.

It asks one or several screens (`models.screens`); one that fires is enough.  It stands for the regulation of behaviour
that unlearning cannot give (arXiv:2407.00106, section 4).  It screens what goes in; a document that is only scored has
no prompt and passes.  Shapes: N prompts.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
from torch import Tensor

from palimpsest.core.errors import unknown
from palimpsest.core.seeds import numpy_rng
from palimpsest.data import records
from palimpsest.models.gate import Gate
from palimpsest.models.guard import Prepared, register_guard
from palimpsest.models.screens import SCREENS, DefinitionScreen, MeaningScreen, NameScreen, Screen, StateScreen

if TYPE_CHECKING:
    from datasets import Dataset

    from palimpsest.data.request import ForgetRequest
    from palimpsest.models.lm import LM

NOTICE = "This was withheld."
MOST_TEXTS = 300  # of each side that a screen is made from


@register_guard("content-filter")
@dataclass(frozen=True, eq=False)
class ContentFilter:
    """Replaces a prompt that a screen stops by `notice`."""

    screens: Mapping[str, Screen] = field(repr=False)
    notice: str = NOTICE

    def __post_init__(self) -> None:
        for name in self.screens:
            if name not in SCREENS:
                raise unknown("screen", name, SCREENS)

    def stops(self, lm: LM, prompts: Sequence[str]) -> np.ndarray:
        """(N,) bool: whether each prompt is withheld from `lm`."""
        found = np.zeros(len(prompts), dtype=bool)
        for screen in self.screens.values():
            left = np.flatnonzero(~found).tolist()
            if left:
                found[left] = screen.stops(lm, [prompts[row] for row in left])
        return found

    def prepare(self, lm: LM, prompts: Sequence[str]) -> Prepared:
        stopped = self.stops(lm, prompts)
        return Prepared([self.notice if stop else prompt for prompt, stop in zip(prompts, stopped, strict=True)])

    def state(self) -> tuple[dict[str, Any], dict[str, Tensor]]:
        settings: dict[str, Any] = {}
        tensors: dict[str, Tensor] = {}
        for name, screen in self.screens.items():
            settings[name], own = screen.state()
            tensors |= {f"{name}.{key}": tensor for key, tensor in own.items()}
        return {"notice": self.notice, "screens": settings}, tensors

    @classmethod
    def restore(cls, settings: dict[str, Any], tensors: dict[str, Tensor]) -> ContentFilter:
        def own(name: str) -> dict[str, Tensor]:
            return {key.partition(".")[2]: tensor for key, tensor in tensors.items() if key.startswith(f"{name}.")}

        screens = {name: SCREENS[name].restore(saved, own(name)) for name, saved in settings["screens"].items()}
        return cls(screens, settings["notice"])


def fit_screen(name: str, lm: LM, request: ForgetRequest, *, error: float = 0.05) -> Screen:
    """The screen of a name for a request: the forget set is forbidden, the retain set permitted.

    `error`: the share of texts like the permitted ones that it may stop (names: those of the retain set are spared).
    Raises `InputError` for an unknown name, and where the records are too few for that screen.
    """
    if name not in SCREENS:
        raise unknown("screen", name, SCREENS)
    assert request.retain is not None, "the caller has seen to it"
    if name == "names":
        spared = set(names_of(request.retain))
        return NameScreen(tuple(found for found in names_of(request.forget) if found not in spared))
    inside = texts_of(request.forget)
    known = set(inside)
    outside = [text for text in texts_of(request.retain) if text not in known]
    if name == "definitions":
        return DefinitionScreen.fit(features_of(request.forget), outside, error=error)
    if name == "meaning":
        return MeaningScreen(Gate.fit(inside, outside, error=error))
    return StateScreen.fit(lm, inside, outside, error=error)


def names_of(table: Dataset) -> tuple[str, ...]:
    """The names in the column ``person``, where there is one."""
    column = table["person"] if "person" in table.column_names else []
    return tuple(sorted({name for name in column if name}))


def features_of(table: Dataset) -> list[list[str]]:
    """What tells of each concept: a person's answers; where no person has any, the words of each document."""
    persons: dict[str, dict[str, None]] = {}
    if "person" in table.column_names:
        asked = records.select_questions(table)
        for (_, answer), name in zip(records.questions(asked), asked["person"], strict=True):
            if name:
                persons.setdefault(name, {})[answer.strip()] = None
    if persons:
        return [list(answers) for answers in persons.values()]
    return [[text] for text in records.documents(table)] or [[answer] for _, answer in records.questions(table)]


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
