"""Four ways to see that a prompt names or tells what is forbidden; a content filter asks several of them.

By a list of names; by what the prompt's statements add up to, in whatever order and words; by its meaning (a gate on a
sentence encoder); by the state that it leaves the guarded model in.  The first stops who asks openly, the others also
who describes and does not name (arXiv:2407.00106, section 4, whose screens are words only: these are ours).
Shapes: N prompts, C concepts, D hidden units.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import torch
from torch import Tensor

from palimpsest.core.errors import InputError
from palimpsest.models.gate import Gate, conformal_quantile, linear_gate, sigmoid
from palimpsest.models.states import last_states

if TYPE_CHECKING:
    from palimpsest.models.lm import LM

_STATEMENT = re.compile(r"(?<=[.!;])\s+|(?<!\?)\n+|(?<=\?)\n{2,}")  # a question and the answer below it are one


class Screen(Protocol):
    def stops(self, lm: LM, prompts: Sequence[str]) -> np.ndarray:
        """(N,) bool: which prompts it would withhold from the model."""
        ...

    def state(self) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """JSON-able settings, and tensors."""
        ...

    @classmethod
    def restore(cls, settings: dict[str, Any], tensors: dict[str, Tensor]) -> Screen: ...


@dataclass(frozen=True)
class NameScreen:
    """Stops prompts in which a name stands, as whole words in any case."""

    names: tuple[str, ...]

    def stops(self, lm: LM, prompts: Sequence[str]) -> np.ndarray:
        found = [bool(self._pattern and self._pattern.search(prompt)) for prompt in prompts]
        return np.array(found, dtype=bool)

    def state(self) -> tuple[dict[str, Any], dict[str, Tensor]]:
        return {"names": list(self.names)}, {}

    @classmethod
    def restore(cls, settings: dict[str, Any], tensors: dict[str, Tensor]) -> NameScreen:
        return cls(tuple(settings["names"]))

    @cached_property
    def _pattern(self) -> re.Pattern[str] | None:
        any_of = "|".join(map(re.escape, self.names))
        return re.compile(rf"(?<!\w)(?:{any_of})(?!\w)", re.IGNORECASE) if any_of else None


@dataclass(frozen=True)
class DefinitionScreen:
    """Stops prompts whose statements, joined by the words that they share, tell enough of a concept's features.

    Order does not count, nor wording as far as `synonyms` reach, nor how the telling is split over helper words:
    statements that share a word which is neither ordinary nor a feature ("A quill is red. Abel is a quill.") are about
    one thing.  A prompt's score is the largest share of a concept's features that is told of one thing.
    """

    concepts: tuple[tuple[str, ...], ...]  # of each concept its features, as words
    ordinary: tuple[str, ...] = ()  # words that join nothing
    synonyms: Mapping[str, str] = field(default_factory=dict)  # word -> the word that it counts as
    threshold: float = 0.99  # the score above which a prompt is stopped

    @staticmethod
    def fit(
        features: Sequence[Iterable[str]],
        permitted: Sequence[str],
        *,
        synonyms: Mapping[str, str] | None = None,
        common: float = 0.2,
        error: float = 0.05,
    ) -> DefinitionScreen:
        """Words in more than a share `common` of the permitted texts are ordinary, and no features.

        The threshold lets through at least 1 - `error` of texts like the permitted ones that tell a feature at all
        (conformal).  Raises `InputError` without permitted texts, or where no concept has a feature that is not
        ordinary.
        """
        if not permitted:
            raise InputError("a screen of definitions needs permitted texts: without them every word would tell")
        counts: dict[str, int] = {}
        for text in permitted:
            for word in set(words_of(text)):
                counts[word] = counts.get(word, 0) + 1
        ordinary = {word for word, count in counts.items() if count > common * len(permitted)}
        told = (sorted({word for feature in one for word in words_of(feature)} - ordinary) for one in features)
        concepts = tuple(tuple(one) for one in told if one)
        if not concepts:
            raise InputError("no concept has a feature that the permitted texts are not full of")
        screen = DefinitionScreen(concepts, tuple(sorted(ordinary)), dict(synonyms or {}), 0.0)
        scores = np.array([score for text in permitted if (score := screen.score(text)) > 0])
        threshold = conformal_quantile(scores, error) if len(scores) else 0.0
        return DefinitionScreen(screen.concepts, screen.ordinary, screen.synonyms, threshold)

    def score(self, prompt: str) -> float:
        """0 to 1: the largest share of a concept's features that statements about one thing tell."""
        groups: list[tuple[set[str], set[str]]] = []  # (words that join, features) of what is about one thing
        for statement in _STATEMENT.split(prompt):
            words = {self.synonyms.get(word, word) for word in words_of(statement)}
            told = words & self._features
            joins = words - told - self._ordinary
            apart = []
            for others, features in groups:
                if others & joins:
                    joins, told = joins | others, told | features
                else:
                    apart.append((others, features))
            groups = [*apart, (joins, told)]
        return max((len(features & one) / len(one) for _, features in groups for one in self._sets), default=0.0)

    def stops(self, lm: LM, prompts: Sequence[str]) -> np.ndarray:
        return np.array([self.score(prompt) > self.threshold for prompt in prompts], dtype=bool)

    def state(self) -> tuple[dict[str, Any], dict[str, Tensor]]:
        settings = {
            "concepts": [list(one) for one in self.concepts],
            "ordinary": list(self.ordinary),
            "synonyms": dict(self.synonyms),
            "threshold": self.threshold,
        }
        return settings, {}

    @classmethod
    def restore(cls, settings: dict[str, Any], tensors: dict[str, Tensor]) -> DefinitionScreen:
        concepts = tuple(tuple(one) for one in settings["concepts"])
        return cls(concepts, tuple(settings["ordinary"]), settings["synonyms"], settings["threshold"])

    @cached_property
    def _sets(self) -> list[set[str]]:
        return [{self.synonyms.get(word, word) for word in one} for one in self.concepts]

    @cached_property
    def _features(self) -> set[str]:
        return set().union(*self._sets)

    @cached_property
    def _ordinary(self) -> set[str]:
        return set(self.ordinary)


@dataclass(frozen=True, eq=False)
class MeaningScreen:
    """Stops prompts whose meaning a gate takes to be in scope."""

    gate: Gate

    def stops(self, lm: LM, prompts: Sequence[str]) -> np.ndarray:
        return self.gate(prompts)

    def state(self) -> tuple[dict[str, Any], dict[str, Tensor]]:
        return self.gate.state()

    @classmethod
    def restore(cls, settings: dict[str, Any], tensors: dict[str, Tensor]) -> MeaningScreen:
        return cls(Gate.restore(settings, tensors))


@dataclass(frozen=True, eq=False)
class StateScreen:
    """Stops prompts that leave the model in a state like the forbidden ones do: a linear probe on its last token.

    It reads the very model that it was made with; behind other weights it means nothing.
    """

    weights: Tensor = field(repr=False)  # (D,) float64
    bias: float
    threshold: float
    layer: int

    @staticmethod
    def fit(
        lm: LM, inside: Sequence[str], outside: Sequence[str], *, error: float = 0.05, strength: float = 1.0
    ) -> StateScreen:
        """A probe on the middle layer, with at most `error` of texts like those `outside` stopped (conformal).

        Raises `InputError` for fewer than five texts on a side.
        """
        for name, texts in (("inside", inside), ("outside", outside)):
            if len(texts) < 5:
                raise InputError(f"a probe of states needs at least 5 texts {name} the scope, not {len(texts)}")
        states_LND = last_states(lm.with_guard(None), [*inside, *outside])
        layer = (len(states_LND) + 1) // 2
        states_ND = states_LND[layer]
        scale = float(states_ND.std()) or 1.0  # the penalty is on the weights, and models differ in their scale
        labels = np.repeat([1, 0], [len(inside), len(outside)])
        weights, bias, threshold = linear_gate(states_ND / scale, labels, error=error, strength=strength)
        return StateScreen(torch.from_numpy(weights / scale), bias, threshold, layer)

    def stops(self, lm: LM, prompts: Sequence[str]) -> np.ndarray:
        if not prompts:
            return np.zeros(0, dtype=bool)
        states_ND = last_states(lm.with_guard(None), prompts)[self.layer]
        return sigmoid(states_ND @ self.weights.cpu().numpy() + self.bias) > self.threshold

    def state(self) -> tuple[dict[str, Any], dict[str, Tensor]]:
        return {"bias": self.bias, "threshold": self.threshold, "layer": self.layer}, {"weights": self.weights}

    @classmethod
    def restore(cls, settings: dict[str, Any], tensors: dict[str, Tensor]) -> StateScreen:
        return cls(tensors["weights"], **settings)


SCREENS: Mapping[str, type[Screen]] = {
    "names": NameScreen,
    "definitions": DefinitionScreen,
    "meaning": MeaningScreen,
    "states": StateScreen,
}


def words_of(text: str) -> list[str]:
    return re.findall(r"\w+", text.casefold())
