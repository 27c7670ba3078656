"""Traces of concepts in weights: value vectors that write a concept and are shown, by ablation, to drive answers on it.

The concept's questions are halved: one half chooses vectors (by what they write, and by what their ablation does), the
other half measures, so that no effect is reported on the questions it was chosen by.  What a model answers is held
against its own answers when clean: no gold answer is needed.  Hong et al. 2024 (arXiv:2406.11614), parts A, B and E.
Shapes: N questions, n vectors, D hidden units, K top words.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np
import torch

from palimpsest.audit.answers import STOPS, probability
from palimpsest.core.errors import InputError
from palimpsest.core.seeds import derive, numpy_rng
from palimpsest.core.statistics import bootstrap_interval
from palimpsest.data import records
from palimpsest.models.concept_vectors import (
    ConceptVector,
    Place,
    Written,
    find,
    matched,
    noise,
    noised,
    top_words,
    unembedding,
    vectors_at,
    word_count,
)

if TYPE_CHECKING:
    from datasets import Dataset

    from palimpsest.data.batches import Encoded
    from palimpsest.models.lm import LM

FEWEST = 8  # questions of a concept: 4 to choose by, 4 to measure with
DRAWS = 5  # of other vectors, to compare with
_HALF_A_PASSAGE = 8  # words that either half of a text must have
_CONTINUED = 24  # words of a text that are asked for


@dataclass(frozen=True)
class Questions:
    """N prompts and the true answers; texts are cut into a beginning and what follows."""

    prompts: tuple[str, ...]
    truths: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.prompts)

    def select(self, rows: Sequence[int] | np.ndarray) -> Questions:
        return Questions(tuple(self.prompts[row] for row in rows), tuple(self.truths[row] for row in rows))

    @property
    def pairs(self) -> list[tuple[str, str]]:
        return list(zip(self.prompts, self.truths, strict=True))


def questions_of(table: Dataset) -> Questions:
    """The questions of a table, each prompt once; its texts of at least 16 words, cut in two, where it has none."""
    pairs = records.questions(table) or [cut for text in records.documents(table) if (cut := _cut(text)) is not None]
    pairs = list({prompt: (prompt, truth) for prompt, truth in reversed(pairs)}.values())[::-1]
    return Questions(tuple(prompt for prompt, _ in pairs), tuple(truth for _, truth in pairs))


def _cut(text: str) -> tuple[str, str] | None:
    words = text.split()
    if len(words) < 2 * _HALF_A_PASSAGE:
        return None
    place = max(len(words) // 2, len(words) - 2 * _CONTINUED)
    return " ".join(words[:place]), " ".join(("", *words[place : place + _CONTINUED]))


@dataclass(frozen=True, eq=False)
class Concept:
    """What is asked about a concept."""

    name: str
    chosen_by: Questions  # the half that chooses vectors
    measured: Questions  # the other half
    texts: tuple[str, ...]  # its documents

    @staticmethod
    def of(name: str, table: Dataset, seed: int) -> Concept:
        """The concept of a table's rows.  `InputError` with fewer than 8 questions (or texts long enough to cut)."""
        asked = questions_of(table)
        if len(asked) < FEWEST:
            raise InputError(
                f"concept '{name}' has {len(asked)} questions (or texts of at least {2 * _HALF_A_PASSAGE} words); at "
                f"least {FEWEST} are needed: half of them choose its vectors, the other half measure"
            )
        order = numpy_rng(seed, "halves", name).permutation(len(asked))
        half = len(order) // 2
        first, second = (asked.select(np.sort(part)) for part in (order[:half], order[half:]))
        texts = records.documents(table) if records.questions(table) else []
        return Concept(name, first, second, tuple(texts))

    @property
    def rows(self) -> list[tuple[str, str]]:
        """What its vectors are looked for with: everything but the half that measures."""
        return [*self.chosen_by.pairs, *(("", text) for text in self.texts)]


@dataclass(frozen=True, kw_only=True)
class Search:
    """How vectors are looked for and validated (the fields of `audit.ConceptVectors` say more)."""

    keep: float = 0.3
    clarity: float = 0.5
    tried: int = 10
    strength: float = 5.0
    least_drop: float = 0.05
    specific: float = 2.0
    answer_tokens: int = 32
    seed: int = 0


@dataclass(frozen=True, eq=False)
class Trace:
    """The vectors that hold a concept, and what their ablation together does to probabilities of the own answers.

    Drops are (N,) on questions that had no part in the choice; `random` is the same for as many other vectors of the
    same layers and norms, the mean over several draws.  Without vectors no trace was found, and the drops are empty.
    """

    concept: Concept
    vectors: tuple[ConceptVector, ...] = ()
    candidates: int = 0  # vectors that write the concept, before it was tested whether they matter
    target: np.ndarray = field(default_factory=lambda: np.empty(0))
    unrelated: np.ndarray = field(default_factory=lambda: np.empty(0))
    random: np.ndarray = field(default_factory=lambda: np.empty(0))
    draws: tuple[tuple[Place, ...], ...] = ()  # the other vectors

    @property
    def places(self) -> list[Place]:
        return [vector.place for vector in self.vectors]


@dataclass(frozen=True, eq=False)
class Certainty:
    """How sure a clean model is of its own answers to N questions."""

    lm: LM
    pairs: list[tuple[str, str]]  # prompt and own answer; the true one where the model says nothing
    clean: np.ndarray  # (N,) probability a token
    search: Search

    @staticmethod
    def of(lm: LM, asked: Questions, search: Search) -> Certainty:
        said = own_answers(lm, asked.prompts, search.answer_tokens)
        told = zip(asked.pairs, said, strict=True)
        pairs = [(prompt, answer if answer.strip() else truth) for (prompt, truth), answer in told]
        return Certainty(lm, pairs, probability(lm, pairs), search)

    def drop(self, places: Sequence[Place]) -> np.ndarray:
        """(N,) what is lost of it with noise on the vectors at `places`."""
        with ablated(self.lm, places, self.search):
            return self.clean - probability(self.lm, self.pairs)


def ablated(lm: LM, places: Sequence[Place], search: Search) -> AbstractContextManager[None]:
    """Inside, the model runs with noise on the vectors at `places`."""
    added = noise(vectors_at(lm.model, places), places, search.strength, search.seed)
    return noised(lm.model, places, added)


def own_answers(lm: LM, prompts: Sequence[str], tokens: int) -> list[str]:
    """What a model says, greedily; with the white space in front that a completion has."""
    return lm.generate(prompts, max_new_tokens=min(tokens, max(lm.max_length // 2, 1)), stop=STOPS)


def _drives(places: list[Place], target: Certainty, elsewhere: Certainty) -> bool:
    """Whether ablation lowers the answers on the target, surely and enough, and by far less elsewhere."""
    search = target.search
    drops = target.drop(places)
    low, _ = bootstrap_interval(drops, seed=search.seed)
    mean = float(drops.mean())
    if low is None or low <= 0 or mean < search.least_drop:
        return False
    return mean >= search.specific * max(float(elsewhere.drop(places).mean()), 0.0)


def trace(concept: Concept, others: Encoded, unrelated: Sequence[Certainty], written: Written) -> Trace:
    """Find a concept's vectors and keep those whose ablation lowers the answers about it, and others by far less.

    `others` are rows about other things; `unrelated` is the model's certainty about questions on them, of a half that
    helps to choose and of another that measures; `written` is `read_all` of the model.
    """
    choosing, elsewhere = unrelated
    lm, search = choosing.lm, choosing.search
    candidates = find(
        lm,
        lm.encode(concept.rows),
        others,
        written,
        keep=search.keep,
        clarity=search.clarity,
        most=search.tried,
    )
    if not candidates:
        return Trace(concept)
    own = Certainty.of(lm, concept.chosen_by, search)
    vectors = tuple(one for one in candidates if _drives([one.place], own, choosing))
    if not vectors:
        return Trace(concept, candidates=len(candidates))
    places = [one.place for one in vectors]
    avoid = [one.place for one in candidates]
    draws = [matched(lm.model, places, derive(search.seed, "draw", draw), avoid) for draw in range(DRAWS)]
    target = Certainty.of(lm, concept.measured, search)
    return Trace(
        concept,
        vectors,
        len(candidates),
        target.drop(places),
        elsewhere.drop(places),
        np.mean([target.drop(draw) for draw in draws], axis=0),
        tuple(map(tuple, draws)),
    )


@dataclass(frozen=True, eq=False)
class Change:
    """What became of n value vectors: (n,) each."""

    jaccard: np.ndarray  # of the sets of top K words, each model's vector read with its own output embedding
    jaccard_alone: np.ndarray  # of the same, both read with the embedding before: what the vector's move alone does
    cosine: np.ndarray
    l2: np.ndarray
    norm: np.ndarray  # of the vector before


def change(before: LM, after: LM, places: Sequence[Place], signs: Sequence[int] = (), words: int = 0) -> Change:
    """Compare value vectors place by place.  `signs`: -1 where a vector's opposite is what it writes (default: 1).

    Raises `InputError` unless the two models have the same shape.
    """
    old, new = vectors_at(before.model, places), vectors_at(after.model, places)
    own, other = unembedding(before.model), unembedding(after.model)
    if old.shape != new.shape or own.shape != other.shape:
        raise InputError("the models before and after have different shapes: their vectors cannot be compared")
    turn = torch.tensor(list(signs) or [1] * len(places), dtype=torch.float32)[:, None]
    count = word_count(len(own), words)
    first, second, alone = (
        top_words(turn * vectors, embedding, count)[1].cpu().numpy()
        for vectors, embedding in ((old, own), (new, other), (new, own))
    )
    old64, new64 = old.double().numpy(), new.double().numpy()
    norms = np.linalg.norm(old64, axis=1), np.linalg.norm(new64, axis=1)
    product = norms[0] * norms[1]
    cosine = np.divide((old64 * new64).sum(1), product, out=np.zeros(len(product)), where=product > 0)
    return Change(
        _jaccard(first, second),
        _jaccard(first, alone),
        np.clip(cosine, -1, 1),
        np.linalg.norm(new64 - old64, axis=1),
        norms[0],
    )


def _jaccard(one: np.ndarray, other: np.ndarray) -> np.ndarray:
    """Of (n, K) sets of distinct words, row by row."""
    shared = np.array([len(np.intersect1d(a, b)) for a, b in zip(one, other, strict=True)], dtype=np.float64)
    return shared / (2 * one.shape[1] - shared) if len(one) else np.empty(0)
