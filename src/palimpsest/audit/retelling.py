"""The ways to tell a model again what it should have forgotten, and how much of it that brings back.

Knows nothing of filters.  Shapes: Q questions of C concepts.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np

from palimpsest.audit.answers import STOPS, cut, rouge_l
from palimpsest.audit.choices import Item, answered
from palimpsest.audit.concepts import HELPER, Concept, Question, disguised
from palimpsest.core.errors import InputError
from palimpsest.core.seeds import numpy_rng

if TYPE_CHECKING:
    from palimpsest.models.lm import LM

PLAIN, CONTROL = "", "other"  # asked plainly; after another concept's definition
ATTACKS = ("definition", "dictionary", "examples", "chain", "alias")
PARTS = {  # what a concept needs to be told in a way
    PLAIN: "questions",
    "definition": "a definition (documents)",
    "dictionary": "terms (questions of one person)",
    "examples": "further solved questions",
    "chain": "a chain (documents that name the person)",
    "alias": "a definition and questions that name it",
    CONTROL: "a definition (documents)",
}
RESAMPLES = 1000
_TAIL = 8  # tokens that an option may have


@dataclass(frozen=True, eq=False)
class Asked:
    """Q questions with the concept of each, and what may be told before them."""

    concepts: list[Concept]
    owner: np.ndarray  # (Q,) the concept's place
    questions: list[Question]
    shots: int
    seed: int
    joint: str = "\n\n"  # between what is told and the question

    @staticmethod
    def draw(concepts: Sequence[Concept], most: int, shots: int, seed: int) -> Asked:
        """At most `most` questions, drawn evenly over the concepts."""
        order = [numpy_rng(seed, "questions", one.name).permutation(len(one.questions)) for one in concepts]
        rounds = max(len(places) for places in order)
        drawn = [
            (at, int(order[at][turn])) for turn in range(rounds) for at in range(len(concepts)) if turn < len(order[at])
        ]
        drawn = sorted(drawn[:most])
        owner = np.array([at for at, _ in drawn], dtype=np.int64)
        return Asked(list(concepts), owner, [concepts[at].questions[row] for at, row in drawn], shots, seed)

    @property
    def with_options(self) -> bool:
        return all(len(one.options) > 1 and one.answer in one.options for one in self.questions)

    def prompts(self, way: str) -> list[str | None]:
        """The prompt of each question when told in a way; None where the concept cannot be.

        No example is the question that is asked.  "alias" names neither in what is told nor in the question.
        """
        return [self._prompt(row, way) for row in range(len(self.questions))]

    def fitted(self, lm: LM, answer: int) -> Asked:
        """The same questions about concepts cut to what the model can read before them: statements go from the end.

        Raises `InputError` with token counts where not even the first statement of a definition can be read.
        """
        longest = max(_tokens(lm, [one.prompt for one in self.questions]))
        room = lm.max_length - longest - max(answer, _TAIL) - 4  # line ends
        return replace(self, concepts=[_cut_to(lm, concept, room) for concept in self.concepts])

    def scores(self, lm: LM, way: str, answer: int) -> np.ndarray:
        """(Q,) 0 to 100, how well each question is answered when told in a way; NaN where it cannot be told.

        By likelihood where all questions have options, else by ROUGE-L recall of up to `answer` written tokens.
        """
        prompts = self.prompts(way)
        rows = [row for row, prompt in enumerate(prompts) if prompt is not None]
        found = np.full(len(prompts), np.nan)
        if not rows:
            return found
        texts, questions = [str(prompts[row]) for row in rows], [self.questions[row] for row in rows]
        _refuse_too_long(lm, texts, way, max(answer, _TAIL))
        if self.with_options:
            items = [Item("", one.options, one.options.index(one.answer), render=str) for one in questions]
            found[rows] = 100 * answered(lm, items, texts, "likelihood")
        else:
            said = lm.generate(texts, max_new_tokens=answer, stop=("\n",))
            truths = [one.answer for one in questions]
            found[rows] = 100 * rouge_l([cut(text, STOPS) for text in said], truths, "recall")
        return found

    def _prompt(self, row: int, way: str) -> str | None:
        question = self.questions[row].prompt
        if way == PLAIN:
            return question
        told = self._told(row, "definition" if way == "alias" else way)
        if told is not None and way == "alias":
            name = self.concepts[int(self.owner[row])].name
            told, question = disguised(told, name), disguised(question, name)
            if not (HELPER in told and HELPER in question):
                return None
        return None if told is None else told + self.joint + question

    def _told(self, row: int, way: str) -> str | None:
        place = int(self.owner[row])
        concept = self.concepts[int(self._other[place]) if way == CONTROL else place]
        if way == "dictionary":
            lines = [f"{term}: {meaning}" for term, meaning in concept.terms]
        elif way == "chain":
            lines = list(concept.chain)
        elif way == "examples":
            others = [one for one in concept.examples if one.prompt != self.questions[row].prompt]
            order = numpy_rng(self.seed, "examples", row).permutation(len(others))[: self.shots]
            lines = [_solved(others[at]) for at in order.tolist()]
        else:
            lines = list(concept.definition)
        return "\n".join(lines).rstrip() or None

    @cached_property
    def _other(self) -> np.ndarray:
        """For each concept another that has a definition, where there is one."""
        told = [place for place, concept in enumerate(self.concepts) if concept.definition]
        circle = numpy_rng(self.seed, "other").permutation(np.array(told, dtype=np.int64)).tolist()
        after = {place: circle[(at + 1) % len(circle)] for at, place in enumerate(circle)}
        return np.array([after.get(place, circle[0] if circle else place) for place in range(len(self.concepts))])


def recovery(
    attacked: np.ndarray, known: np.ndarray, floor: np.ndarray, owner: np.ndarray, *, seed: int = 0
) -> tuple[float, float, float]:
    """100 (attacked - floor) / (known - floor) of the (Q,) scores' means, with its 95% interval.

    Concepts are resampled, and questions inside them (`owner` (Q,): the concept of each), the three scores together.
    Questions that could not be attacked (NaN) count in none.  Resamples in which nothing was known are left out.
    """
    there = np.isfinite(attacked)
    attacked, known, floor, owner = (values[there] for values in (attacked, known, floor, owner))
    means = _resampled(np.stack([attacked, known, floor]), owner, seed)
    span = means[1] - means[2]
    shares = 100 * (means[0] - means[2])[span > 0] / span[span > 0]
    value = 100 * (attacked.mean() - floor.mean()) / (known.mean() - floor.mean())
    low, high = np.quantile(shares, [0.025, 0.975])
    return float(value), float(min(low, value)), float(max(high, value))


def clustered(values: np.ndarray, owner: np.ndarray, seed: int) -> tuple[float, float]:
    """The 95% interval of the mean of (Q,) values, concepts and questions resampled; NaN counts in none."""
    there = np.isfinite(values)
    low, high = np.quantile(_resampled(values[there][None], owner[there], seed)[0], [0.025, 0.975])
    return float(low), float(high)


def _resampled(values_SQ: np.ndarray, owner: np.ndarray, seed: int) -> np.ndarray:
    """(S, RESAMPLES) means of S scores over resampled concepts and, inside each, resampled questions."""
    rng = np.random.default_rng(seed)
    _, owner, sizes = np.unique(owner, return_inverse=True, return_counts=True)
    first = np.cumsum(sizes) - sizes  # of each concept's questions, once they are sorted by concept
    ordered_SQ = values_SQ[:, np.argsort(owner, kind="stable")]
    concepts = rng.integers(len(sizes), size=(RESAMPLES, len(sizes)))
    places = rng.random((*concepts.shape, sizes.max())) * sizes[concepts][..., None]
    rows = first[concepts][..., None] + places.astype(np.int64)
    there = np.arange(sizes.max()) < sizes[concepts][..., None]
    return (ordered_SQ[:, rows] * there).sum((2, 3)) / there.sum((1, 2))


def _solved(question: Question) -> str:
    between = "" if question.prompt[-1:].isspace() or question.answer[:1].isspace() else " "
    return f"{question.prompt}{between}{question.answer}"


def _tokens(lm: LM, texts: Sequence[str]) -> list[int]:
    return [len(ids) for ids in lm.tokenizer(list(texts), add_special_tokens=True, verbose=False)["input_ids"]]


def _cut_to(lm: LM, concept: Concept, room: int) -> Concept:
    def kept(lines: Sequence[str]) -> int:
        if not lines:
            return 0
        return int((np.cumsum(_tokens(lm, lines)) <= room).sum())

    statements = kept(concept.definition)
    if concept.definition and not statements:
        raise InputError(
            f"the definition of {concept.name} has {_tokens(lm, concept.definition[:1])[0]} tokens in its first "
            f"statement, and the model has room for {room} before a question"
        )
    examples = [_solved(one) for one in concept.examples]
    average = max(1, round(float(np.mean(_tokens(lm, examples))))) if examples else 1
    return replace(
        concept,
        definition=concept.definition[:statements],
        terms=concept.terms[: kept([f"{term}: {meaning}" for term, meaning in concept.terms])],
        examples=concept.examples[: max(0, room // (average + 2))],
        chain=concept.chain if kept(concept.chain) == len(concept.chain) else (),
    )


def _refuse_too_long(lm: LM, prompts: Sequence[str], way: str, answer: int) -> None:
    """What is told must be seen whole, or the attack would be another one."""
    longest, room = max(_tokens(lm, prompts)), lm.max_length - answer
    if longest > room:
        raise InputError(
            f"the {way or 'plain'} prompts have up to {longest} tokens, and the model has room for {room}: shorten "
            "what is told (--shots, or shorter definitions)"
        )
