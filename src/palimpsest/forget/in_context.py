"""Forgetting in the prompt: the weights stay, and a question about what must go is asked in another context.

In-context unlearning (ICUL; Pawelczyk et al. 2024, arXiv:2310.07579) and the guardrail prompt (Thaker et al. 2024,
arXiv:2403.03329); sheet `knowledge_unlearning`, items 18 and 19.  Need: forget questions; in-context unlearning also
retain questions.  Whoever has the weights has everything, the forget questions travel with the model in plain text, and
the model must be able to follow a context at all.  Shapes: N prompts, M forget questions, W words.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from torch import Tensor

from palimpsest.core.errors import InputError
from palimpsest.core.methods import method
from palimpsest.core.seeds import numpy_rng
from palimpsest.core.watch import Watch
from palimpsest.data.lexicon import REFUSALS
from palimpsest.data.records import questions
from palimpsest.forget.preference import join, only_questions
from palimpsest.forget.unlearn import required
from palimpsest.models.guard import Prepared, PromptGuard, register_guard

if TYPE_CHECKING:
    from palimpsest.data.request import ForgetRequest
    from palimpsest.models.lm import LM

Pair = tuple[str, str]
_WORD = r"(?u)\w+"
_LEAST_WEIGHT = 0.1  # so that a forget question without a word of its own is still found in itself


@method(verb="forget", paper="knowledge_unlearning")
@dataclass(frozen=True, kw_only=True)
class InContext:
    """In-context unlearning: the forget question with a false answer, true answers to others, then what was asked.

    A prompt is treated so if enough of a forget question is found in it; all others pass unchanged.  Given a model that
    forgets in context already, the new questions join the old ones.
    """

    demonstrations: int = 2  # retain questions shown with their true answers (2, 4 or 6 in the paper)
    answer: Literal["wrong", "refusal"] = "wrong"  # the false answer: another forget question's, or "I don't know"
    false_alarms: float = 0.05  # share of retain questions that may be taken for forget questions
    seed: int = 0

    def __post_init__(self) -> None:
        if self.demonstrations < 0 or not 0 < self.false_alarms < 1:
            raise InputError("demonstrations must not be below 0, and false_alarms must lie between 0 and 1")

    def __call__(self, lm: LM, request: ForgetRequest, *, watch: Watch | None = None) -> LM:
        known = _known(lm)
        kept = questions(required(request.retain, "retain"))
        if len(kept) < max(self.demonstrations, 1):
            raise InputError(
                f"in-context unlearning needs {max(self.demonstrations, 1)} retain questions, not {len(kept)}"
            )
        asked = (*known, *self._false(questions(only_questions(request.forget))))
        shown = numpy_rng(self.seed, "demonstrations").permutation(len(kept))[: self.demonstrations]
        prompts = [prompt for prompt, _ in kept]
        words, weights = _weights([question for question, _ in asked], prompts)
        guard = InContextGuard(asked, tuple(kept[row] for row in shown), words, weights, 0.0)
        guard = InContextGuard(**{**asdict(guard), "threshold": self._threshold(guard.overlap(prompts).max(1))})
        _check_room(lm, [guard.context(row, question) for row, (question, _) in enumerate(asked)])
        return lm.with_guard(guard)

    def _threshold(self, overlaps: np.ndarray) -> float:
        """The overlap that only the allowed share of questions like the retain ones goes over (split conformal)."""
        place = min(math.ceil((len(overlaps) + 1) * (1 - self.false_alarms)), len(overlaps))
        return float(np.sort(overlaps)[place - 1])

    def _false(self, pairs: list[Pair]) -> list[Pair]:
        """Every question with an answer that is not its own."""
        rng = numpy_rng(self.seed, "false answers")
        if self.answer == "refusal":
            return [join(prompt, REFUSALS[rng.integers(len(REFUSALS))]) for prompt, _ in pairs]
        answers = sorted({completion for _, completion in pairs})
        if len(answers) < 2:
            raise InputError("all forget questions have the same answer: use answer 'refusal'")
        drawn = rng.integers(len(answers) - 1, size=len(pairs))
        places = [answers.index(completion) for _, completion in pairs]
        return [
            (prompt, answers[pick + (pick >= own)]) for (prompt, _), pick, own in zip(pairs, drawn, places, strict=True)
        ]


@register_guard("in-context")
@dataclass(frozen=True)
class InContextGuard:
    """Puts a prompt that holds more than `threshold` of a forget question behind that question, falsely answered."""

    asked: tuple[Pair, ...]  # (question, false answer)
    demonstrations: tuple[Pair, ...]
    words: tuple[str, ...]
    weights: tuple[float, ...]  # of each word: how much it speaks of what must go
    threshold: float

    def prepare(self, lm: LM, prompts: Sequence[str]) -> Prepared:
        if not prompts:
            return Prepared(prompts)
        overlap = self.overlap(prompts)
        nearest = overlap.argmax(1)
        meant = overlap.max(1) > self.threshold
        return Prepared(
            [self.context(row, prompt) if m else prompt for prompt, row, m in zip(prompts, nearest, meant, strict=True)]
        )

    def context(self, row: int, prompt: str) -> str:
        """The prompt after a forget question with its false answer and the demonstrations."""
        before = [question + answer for question, answer in (self.asked[row], *self.demonstrations)]
        return "\n".join([*before, prompt])

    def overlap(self, prompts: Sequence[str]) -> np.ndarray:
        """(N, M): the weighted share of each forget question's words that are found in each prompt."""
        vectorizer, weights_MW = self._index
        shared = vectorizer.transform(prompts) @ weights_MW.T
        whole = np.asarray(weights_MW.sum(1)).ravel()
        return shared.toarray() / np.where(whole > 0, whole, 1.0)

    @cached_property
    def _index(self) -> tuple[Any, Any]:
        """The vectorizer, and the (M, W) weights of each forget question's words."""
        vectorizer = _vectorizer(self.words)
        present = vectorizer.transform([question for question, _ in self.asked])
        return vectorizer, present.multiply(np.array(self.weights)).tocsr()

    def state(self) -> tuple[dict[str, Any], dict[str, Tensor]]:
        return asdict(self), {}

    @classmethod
    def restore(cls, settings: dict[str, Any], tensors: dict[str, Tensor]) -> InContextGuard:
        pairs = {name: tuple((q, a) for q, a in settings[name]) for name in ("asked", "demonstrations")}
        words, weights = tuple(settings["words"]), tuple(settings["weights"])
        return cls(**pairs, words=words, weights=weights, threshold=settings["threshold"])


@method(verb="forget", paper="knowledge_unlearning")
@dataclass(frozen=True, kw_only=True)
class Guardrail:
    """Guardrail prompt: every prompt follows an instruction that names what the model must not know."""

    subjects: tuple[str, ...] = ()  # what is named; none: the values of `column` in the forget set
    column: str = "person"
    instruction: str = "You know nothing about {subjects}: to any question about them, answer that you don't know."

    def __post_init__(self) -> None:
        if "{subjects}" not in self.instruction:
            raise InputError("the instruction must contain {subjects}")

    def __call__(self, lm: LM, request: ForgetRequest, *, watch: Watch | None = None) -> LM:
        if lm.guard is not None:
            raise InputError("this model has a guard already: list all subjects in one guardrail")
        names = self.subjects
        if not names and self.column in request.forget.column_names:
            names = tuple(dict.fromkeys(str(value) for value in request.forget[self.column] if value is not None))
        if not names:
            raise InputError(f"a guardrail must name what is forgotten: give subjects, or a column '{self.column}'")
        guard = PromptGuard(self.instruction.replace("{subjects}", ", ".join(names)) + "\n\n{prompt}")
        _check_room(lm, guard.prepare(lm, [prompt for prompt, _ in lm.pairs(request.forget)]).prompts)
        return lm.with_guard(guard)


def _known(lm: LM) -> tuple[Pair, ...]:
    """The questions that the model forgets in context already."""
    if lm.guard is None:
        return ()
    if not isinstance(lm.guard, InContextGuard):
        raise InputError(f"this model forgets by another guard ({type(lm.guard).__name__}): load it without that guard")
    return lm.guard.asked


def _vectorizer(words: Sequence[str] | None) -> Any:
    """Which words are in a text, each counted once."""
    from sklearn.feature_extraction.text import CountVectorizer

    return CountVectorizer(vocabulary=words, token_pattern=_WORD, binary=True, dtype=np.float64)


def _weights(forget: list[str], retain: list[str]) -> tuple[tuple[str, ...], tuple[float, ...]]:
    """Every word of the forget questions, and ln of how much more common it is there than in the retain questions.

    A name weighs much, the words of a phrasing that is asked of everybody the least there is.
    """
    vectorizer = _vectorizer(None)
    here = np.asarray(vectorizer.fit_transform(forget).sum(0)).ravel()
    there = np.asarray(vectorizer.transform(retain).sum(0)).ravel()
    ratio = (here + 1) / (len(forget) + 2) * (len(retain) + 2) / (there + 1)  # of shares, each smoothed (Laplace)
    weights = np.maximum(np.log(ratio), _LEAST_WEIGHT)
    return tuple(vectorizer.get_feature_names_out().tolist()), tuple(weights.tolist())


def _check_room(lm: LM, prompts: Sequence[str]) -> None:
    """`InputError` if a prompt with its context leaves too little room to answer: its beginning would be cut off."""
    longest = max(len(ids) for ids in lm.tokenizer(list(prompts), verbose=False)["input_ids"])
    if longest > lm.max_length * 3 // 4:
        raise InputError(
            f"the longest prompt with its context has {longest} tokens, and the model sees {lm.max_length}: "
            "use fewer demonstrations or subjects"
        )
