"""Demonstration retrieval's claim: what a reader does not know it reads off rows fetched from a bank.

Fictional people with five attributes of twelve values; each fact stands once in the bank, as an answered question in
one of three phrasings, and is asked in a fourth.  Two thirds of the people are asked about in meta-training, the others
stand only in the bank.  Four readers, the same small T5 with the same steps and rate: with retrieved demonstrations,
with random ones, with none, and closed-book: with none, but trained on the whole bank as well.  The retriever is the
packaged encoder.
The second half tunes on sixteen examples of a form of question never met in training.
The target is the answer alone: to repeat the question, as the paper does, would treble the cost.

The negative control gives the method, and it alone, random demonstrations.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from palimpsest.claims import Expect, claim
from palimpsest.core.seeds import numpy_rng
from palimpsest.core.watch import Watch
from palimpsest.data.lexicon import PEOPLE, words
from palimpsest.data.text_tasks import TextTask
from palimpsest.learn.fewshot.demonstration_retrieval import (
    Bank,
    Demonstration,
    DemonstrationRetrieval,
    FittedReader,
)
from palimpsest.models.retrieval import DenseIndex

FIRST = words(
    "Anna Boris Clara David Edith Felix Greta Hugo Irene James Karen Louis Maria Noah Olga Peter Rosa Simon Tessa Ugo"
)
LAST = words(
    "Abbott Bergman Collins Dubois Eriksen Fischer Garcia Hansen Ivanov Jensen Keller Lopez Moretti Novak Olsen Palmer"
)
CHOICES = (
    "Does {name} live in {a} or {b}?",
    "Is {name} a {a} or a {b}?",
    "Does {name} work for {a} or {b}?",
    "Does {name} speak {a} or {b}?",
    "Does {name} enjoy {a} or {b}?",
)
ASKED, UNSEEN, TESTED, SHOTS, NEW = 200, 100, 40, 16, 100
STEPS, TUNING, LR, K = 400, 60, 3e-3, 3
NOISE = (0.05, 0.1)  # standard deviation in each dimension, of vectors of length one
QUIET = Watch(progress=False)


@claim(
    paper="demonstration_retrieval",
    statement="A small reader answers about people it was never asked about from demonstrations that it retrieves, not "
    "from random ones and not closed-book; its answers follow the bank; and it learns a new form from 16 examples.",
    paper_says={"TREC, 16 examples a class, %": 91.7, "QNLI": 84.4, "MNLI": 72.9},
    expectations=(
        Expect("retrieved", minus="random", at_least=30.0),
        Expect("retrieved", minus="none", at_least=30.0),
        Expect("retrieved", minus="closed_book", at_least=0.0),
        Expect("random", at_most=15.0),
        Expect("swapped", minus="retrieved", at_least=-5.0),
        Expect("deleted", at_most=15.0),
        Expect("others_moved", at_most=1.0),
        Expect("new_form_retrieved", minus="new_form_random", at_least=5.0),
        Expect("new_form_retrieved", minus="new_form_untrained", at_least=5.0),
    ),
    minutes=3,
    data="generated: 300 fictional people with 1,500 facts; the packaged sentence encoder as the retriever",
    note="layers, learning rate and steps were chosen on seed 100, for all readers alike; the new form gains, but its "
    "accuracy stays below that of guessing one of the two values named",
)
def measure(seed: int, mechanism: bool = True, scale: float = 1.0) -> dict[str, float]:
    """Accuracies in percent on people never asked about (chance 8.3; of the new form 50)."""
    world = Facts.drawn(seed, max(12, round((ASKED + UNSEEN) * scale)))
    learner = DemonstrationRetrieval(
        demonstrations="retrieved" if mechanism else "random",
        count=K,
        repeat_question=False,
        layers=1,
        vocab_size=2048,
        answer_length=16,
        steps=max(4, round(STEPS * scale)),
        tuning_steps=0,
        tuning_lr=LR / 4,
        lr=LR,
        seed=seed,
    )
    bank = Bank.of(world.bank())
    training, tested = world.questions(world.asked), world.questions(world.unseen[:TESTED])
    readers = {
        "retrieved": learner,
        "random": replace(learner, demonstrations="random"),
        "none": replace(learner, demonstrations="none"),
        "closed_book": replace(learner, demonstrations="none"),
    }
    if not mechanism:  # it is the reader with random demonstrations
        del readers["random"]
    measured: dict[str, float] = {}
    fitted: dict[str, FittedReader] = {}
    for name, one in readers.items():
        rows = [*training, *world.bank()] if name == "closed_book" else training
        fitted[name] = one.meta_fit([_task(rows)], bank=bank, watch=QUIET)
        measured[name] = _accuracy(fitted[name], tested)
    measured |= _probes(fitted["retrieved"], world, tested, seed)
    fitted["untrained"] = replace(learner, steps=0).meta_fit([_task(training)], bank=bank)
    for name in ("retrieved", "random", "none", "untrained"):
        if name in fitted:
            measured[f"new_form_{name}"] = _new_form(fitted[name], world, max(2, round(TUNING * scale)), seed)
    for name in ("random", "new_form_random"):
        measured.setdefault(name, measured[name.replace("random", "retrieved")])
    return measured


@dataclass(frozen=True, eq=False)
class Facts:
    """`values` (people, attributes): which of twelve values; `phrasings` alike: in which words the bank asks."""

    names: tuple[str, ...]
    values: np.ndarray
    phrasings: np.ndarray

    @staticmethod
    def drawn(seed: int, people: int) -> Facts:
        """Names and phrasings are the same for every seed, so that they are embedded once; facts differ."""
        order = numpy_rng(0, "names").permutation(len(FIRST) * len(LAST))[:people]
        names = tuple(f"{FIRST[n // len(LAST)]} {LAST[n % len(LAST)]}" for n in order)
        shape = (people, len(PEOPLE))
        phrasings = numpy_rng(0, "phrasings").integers(1, 4, size=shape)
        return Facts(names, numpy_rng(seed, "values").integers(12, size=shape), phrasings)

    @property
    def asked(self) -> list[int]:
        return list(range(2 * len(self.names) // 3))

    @property
    def unseen(self) -> list[int]:
        return list(range(2 * len(self.names) // 3, len(self.names)))

    def bank(self) -> list[Demonstration]:
        return [self._one(p, a, int(self.phrasings[p, a])) for p in range(len(self.names)) for a in range(len(PEOPLE))]

    def questions(self, people: Sequence[int]) -> list[Demonstration]:
        return [self._one(person, attribute, 0) for person in people for attribute in range(len(PEOPLE))]

    def _one(self, person: int, attribute: int, phrasing: int) -> Demonstration:
        about = PEOPLE[attribute]
        question = about.questions[phrasing].format(name=self.names[person])
        return Demonstration(question, about.values[self.values[person, attribute]])

    def choices(self, people: Sequence[int], count: int, rng: np.random.Generator) -> list[Demonstration]:
        """Questions of the new form: which of two values is it?"""
        found = []
        for _ in range(count):
            person, attribute = int(rng.choice(people)), int(rng.integers(len(PEOPLE)))
            true = int(self.values[person, attribute])
            pair = [PEOPLE[attribute].values[n] for n in (true, (true + int(rng.integers(1, 12))) % 12)]
            a, b = pair if rng.random() < 0.5 else pair[::-1]
            found.append(Demonstration(CHOICES[attribute].format(name=self.names[person], a=a, b=b), pair[0]))
        return found


def _task(rows: Sequence[Demonstration], name: str = "people") -> TextTask:
    return TextTask(name, tuple((row.question, row.answer) for row in rows))


def _answers(fitted: FittedReader, tested: Sequence[Demonstration]) -> np.ndarray:
    return np.array(fitted.adapt(_task(tested[:1])).answers([one.question for one in tested]))


def _accuracy(fitted: FittedReader, tested: Sequence[Demonstration]) -> float:
    return 100 * float((_answers(fitted, tested) == [one.answer for one in tested]).mean())


def _probes(ours: FittedReader, world: Facts, tested: Sequence[Demonstration], seed: int) -> dict[str, float]:
    """What becomes of the answers when the bank is changed: the readers stay as they are."""
    before = _answers(ours, tested)
    people, size = world.unseen[:TESTED], len(PEOPLE)
    moved_on = 1 + numpy_rng(seed, "swap").integers(11, size=world.values.shape)
    other = replace(world, values=(world.values + moved_on) % 12)
    swapped = ours.over(Bank(tuple(other.bank()), ours.bank.index))
    found = {"swapped": _accuracy(swapped, other.questions(people))}
    gone = people[: len(people) // 4]
    rows = [person * size + attribute for person in gone for attribute in range(size)]
    cut = len(gone) * size
    after = _answers(ours.over(ours.bank.without(rows)), tested)
    truth = np.array([one.answer for one in tested])
    found["deleted"] = 100 * float((after[:cut] == truth[:cut]).mean())
    found["others_moved"] = 100 * abs(float((after[cut:] == truth[cut:]).mean() - (before[cut:] == truth[cut:]).mean()))
    found["recall"] = _recall(ours, world, tested)
    for noise in NOISE:
        vectors = ours.bank.index.vectors
        moved = vectors + noise * numpy_rng(seed, "noise").normal(size=vectors.shape).astype(np.float32)
        one = ours.over(Bank(ours.bank.rows, DenseIndex(moved)))
        found[f"noise_{noise:g}_recall"] = _recall(one, world, tested)
        found[f"noise_{noise:g}"] = _accuracy(one, tested)
    return found


def _recall(fitted: FittedReader, world: Facts, tested: Sequence[Demonstration]) -> float:
    """In percent: how often the row with the fact is among those shown."""
    rows = fitted.shown(tested).rows
    facts = [person * len(PEOPLE) + a for person in world.unseen[:TESTED] for a in range(len(PEOPLE))]
    return 100 * float(np.mean([fact in line for fact, line in zip(facts, rows, strict=True)]))


def _new_form(fitted: FittedReader, world: Facts, steps: int, seed: int) -> float:
    rng = numpy_rng(seed, "choices")
    shots, tested = world.choices(world.asked, SHOTS, rng), world.choices(world.unseen, NEW, rng)
    tuned = replace(fitted, learner=replace(fitted.learner, tuning_steps=steps)).adapt(_task(shots, "choices"))
    answers = np.array(tuned.answers([one.question for one in tested]))
    return 100 * float((answers == [one.answer for one in tested]).mean())
