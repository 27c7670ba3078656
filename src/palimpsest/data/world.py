"""A fictional world to learn and to forget: people with correlated facts, told in documents and asked in questions.

Made for claims and demonstrations: everything is known, so what a model knows can be counted, and nothing is real, so
a model that never read it cannot know it.  The set-up is that of MUSE (arXiv:2407.06460) and TOFU (arXiv:2401.06121):
people to forget, people to retain, people trained on but used for evaluation alone, and people never trained on.

Each person has five facts.  The language is mostly the city's and the employer mostly of the profession's kind, so that
facts support each other.  Per person there are two biographies (all five facts, each in its own order, phrasing and
filler adverbs: recognisable word for word beyond its facts), one news paragraph, and each fact asked in four phrasings.
One phrasing is held out, chosen per person and fact: all phrasings are trained with other people, so that a held-out
question tests whether the fact is known and not whether the phrasing is.  Given names are unique, surnames are shared.
Rivers, feasts and stones give facts that belong to no person.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal, get_args

import numpy as np
import pyarrow as pa
from datasets import Dataset, Features, List, Value

from palimpsest.core.errors import InputError, unknown
from palimpsest.core.seeds import numpy_rng
from palimpsest.data.lexicon import (
    ADVERBS,
    DAYS,
    EMPLOYER_KIND,
    NEWS,
    PEOPLE,
    REFUSALS,
    SYLLABLES,
    THINGS,
    Attribute,
    invent,
)
from palimpsest.data.records import concat, pairs
from palimpsest.data.request import ForgetRequest

__all__ = ["REFUSALS", "SPLITS", "Subject", "World"]

OPTIONS = 4  # choices of a question: the true value and others of its pool
BIOGRAPHIES = 2
SURNAMES = 40

Split = Literal["forget", "retain", "utility", "holdout"]
SPLITS: tuple[Split, ...] = get_args(Split)
Phrasings = Literal["trained", "held-out", "all"]

_FEATURES = Features(
    {
        "text": Value("string"),
        "prompt": Value("string"),
        "completion": Value("string"),
        "kind": Value("string"),  # biography, news, fact (a statement) or question
        "person": Value("string"),  # None for what belongs to no person
        "attribute": Value("string"),  # of questions and statements
        "phrasing": Value("int64"),  # of questions: which of the attribute's
        "options": List(Value("string")),  # of questions: the true value among others, shuffled
        "paraphrased_answer": Value("string"),  # of questions: the true answer as a sentence
        "perturbed_answer": List(Value("string")),  # of questions: the same sentence with the wrong options
    }
)


@dataclass(frozen=True)
class Subject:
    """A person or a thing: its facts, and which phrasing of each is held out."""

    number: int
    name: str
    split: str
    facts: Mapping[str, str]  # attribute -> value
    held_out: Mapping[str, int]  # attribute -> phrasing

    @property
    def first_name(self) -> str:
        return self.name.split()[0]


@dataclass(frozen=True)
class World:
    """`people` people and `facts` facts of no person; everything follows from `seed`.

    Shares are of the people; those not in forget, utility or holdout are in retain.  Facts are half in retain and half
    in utility.
    """

    people: int = 160
    seed: int = 0
    forget: float = 0.2
    utility: float = 0.2
    holdout: float = 0.2
    facts: int = 48
    correlation: float = 0.8  # how often language follows city and employer follows profession

    def __post_init__(self) -> None:
        shares = {"forget": self.forget, "utility": self.utility, "holdout": self.holdout}
        for name, share in shares.items():
            if not 0 <= share < 1:
                raise InputError(f"the share of {name} must lie between 0 and 1, not {share}")
        if sum(shares.values()) >= 1:
            raise InputError(
                f"forget, utility and holdout take {sum(shares.values()):.2f} of the people: none to retain"
            )
        if not 0 <= self.correlation <= 1:
            raise InputError(f"correlation must lie between 0 and 1, not {self.correlation}")
        if self.people < 1 or self.facts < 0 or self._sizes["forget"] < 1 or self._sizes["retain"] < 1:
            raise InputError(f"{self.people} people cannot be split: nobody would be in forget or in retain")

    @cached_property
    def population(self) -> tuple[Subject, ...]:
        """The people, by number."""
        splits = np.repeat(SPLITS, [self._sizes[name] for name in SPLITS])
        splits = numpy_rng(self.seed, "splits").permutation(splits)
        rng = numpy_rng(self.seed, "people")
        surnames = invent(SURNAMES, 2, numpy_rng(self.seed, "surnames"))
        return tuple(
            Subject(
                number,
                f"{self._names[number]} {surnames[int(rng.integers(SURNAMES))]}",
                str(splits[number]),
                self._person_facts(rng),
                {attribute.name: int(rng.integers(len(attribute.questions))) for attribute in PEOPLE},
            )
            for number in range(self.people)
        )

    @cached_property
    def things(self) -> tuple[Subject, ...]:
        """Rivers, feasts and stones in turn, each with one fact."""
        rng = numpy_rng(self.seed, "things")
        things = []
        for number, name in enumerate(self._names[self.people :]):
            attribute = THINGS[number % len(THINGS)]
            split = ("retain", "utility")[number // len(THINGS) % 2]
            fact = {attribute.name: str(rng.choice(attribute.values))}
            things.append(
                Subject(number, name, split, fact, {attribute.name: int(rng.integers(len(attribute.questions)))})
            )
        return tuple(things)

    def documents(self, split: Split) -> Dataset:
        """Biographies, news and statements of a split."""
        return _table(row for subject in self._subjects(split) for row in self._documents(subject))

    def questions(self, split: Split, phrasings: Phrasings = "all") -> Dataset:
        """Questions of a split, in the phrasings trained on (three of four), in the held-out one, or in all."""
        if phrasings not in ("trained", "held-out", "all"):
            raise InputError(f"phrasings must be trained, held-out or all, not '{phrasings}'")
        return _table(row for subject in self._subjects(split) for row in self._questions(subject, phrasings))

    def told(self, split: Split) -> Dataset:
        """What a model reads of a split: the documents and the questions in their trained phrasings."""
        if split not in self._told:
            self._told[split] = concat(self.documents(split), self.questions(split, "trained"))
        return self._told[split]

    @cached_property
    def train(self) -> Dataset:
        """Everything a model of this world is trained on: forget, retain and utility as told."""
        return concat(self.told("forget"), self.told("retain"), self.told("utility"))

    @property
    def texts(self) -> list[str]:
        """Every text of all four splits, for the tokenizer.

        It must see the holdout people too: were their names cut into other pieces than those of the forget people, a
        membership test would tell the two apart by their tokens, whatever the model has seen.
        """
        return [prompt + completion for split in SPLITS for prompt, completion in pairs(self.told(split))]

    def request(self) -> ForgetRequest:
        """Forget the forget people.  Utility asks of its people and things in held-out phrasings only."""
        utility = concat(self.documents("utility"), self.questions("utility", "held-out"))
        return ForgetRequest(
            forget=self.told("forget"),
            retain=self.told("retain"),
            utility=utility if len(utility) else None,
            holdout=self.told("holdout") if self._sizes["holdout"] else None,
            train=self.train,
            name="world",
        )

    def describe(self) -> dict[str, Any]:
        """The world in numbers, JSON-able."""
        return {
            "people": self.people,
            "things": self.facts,
            "seed": self.seed,
            "correlation": self.correlation,
            "attributes": {attribute.name: len(attribute.values) for attribute in (*PEOPLE, *THINGS)},
            "splits": {
                split: {
                    "people": self._sizes[split],
                    "documents": len(self.documents(split)),
                    "questions": len(self.questions(split, "trained")),
                    "held_out_questions": len(self.questions(split, "held-out")),
                }
                for split in SPLITS
            },
            "train_rows": len(self.train),
            "options": OPTIONS,
        }

    @cached_property
    def _told(self) -> dict[str, Dataset]:
        return {}

    @cached_property
    def _sizes(self) -> dict[str, int]:
        sizes = {name: round(getattr(self, name) * self.people) for name in ("forget", "utility", "holdout")}
        return {**sizes, "retain": self.people - sum(sizes.values())}

    @cached_property
    def _names(self) -> list[str]:
        """Given names of the people, then names of the things: all different, as short as leaves half unused."""
        count = self.people + self.facts
        syllables = next(length for length in range(2, 9) if 2 * count <= SYLLABLES**length)
        return invent(count, syllables, numpy_rng(self.seed, "names"))

    def _subjects(self, split: str) -> Iterator[Subject]:
        if split not in SPLITS:
            raise unknown("split", split, SPLITS)
        return (subject for subject in (*self.population, *self.things) if subject.split == split)

    def _person_facts(self, rng: np.random.Generator) -> dict[str, str]:
        drawn = {attribute.name: int(rng.integers(len(attribute.values))) for attribute in PEOPLE}
        if rng.random() < self.correlation:
            drawn["language"] = drawn["city"]
        if rng.random() < self.correlation:
            kind = drawn["profession"] // EMPLOYER_KIND
            drawn["employer"] = kind * EMPLOYER_KIND + int(rng.integers(EMPLOYER_KIND))
        return {attribute.name: attribute.values[drawn[attribute.name]] for attribute in PEOPLE}

    def _documents(self, subject: Subject) -> Iterator[dict[str, Any]]:
        rng = numpy_rng(self.seed, "documents", subject.name)
        if len(subject.facts) == 1:
            attribute = _attributes(subject)[0]
            template = attribute.statements[int(rng.integers(len(attribute.statements)))]
            text = template.format(name=subject.name, adverb=_adverb(rng), value=subject.facts[attribute.name])
            yield {"text": text, "kind": "fact", "attribute": attribute.name}
            return
        for _ in range(BIOGRAPHIES):
            sentences = []
            for place, number in enumerate(rng.permutation(len(PEOPLE))):
                attribute = PEOPLE[number]
                template = attribute.statements[int(rng.integers(len(attribute.statements)))]
                name = subject.name if place == 0 else subject.first_name
                sentences.append(template.format(name=name, adverb=_adverb(rng), value=subject.facts[attribute.name]))
            yield {"text": " ".join(sentences), "kind": "biography", "person": subject.name}
        news = NEWS[int(rng.integers(len(NEWS)))]
        day = DAYS[int(rng.integers(len(DAYS)))]
        text = news.format(name=subject.name, adverb=_adverb(rng), day=day, **subject.facts)
        yield {"text": text, "kind": "news", "person": subject.name}

    def _questions(self, subject: Subject, phrasings: Phrasings) -> Iterator[dict[str, Any]]:
        rng = numpy_rng(self.seed, "questions", subject.name)
        for attribute in _attributes(subject):
            value = subject.facts[attribute.name]
            others = [other for other in attribute.values if other != value]
            wrong = [others[number] for number in rng.choice(len(others), OPTIONS - 1, replace=False)]
            options = [(value, *wrong)[number] for number in rng.permutation(OPTIONS)]
            for phrasing, question in enumerate(attribute.questions):
                held_out = phrasing == subject.held_out[attribute.name]
                if phrasings == "all" or held_out == (phrasings == "held-out"):
                    yield {
                        "prompt": question.format(name=subject.name),
                        "completion": value,
                        "kind": "question",
                        "person": subject.name if len(subject.facts) > 1 else None,
                        "attribute": attribute.name,
                        "phrasing": phrasing,
                        "options": options,
                        "paraphrased_answer": attribute.paraphrase.format(name=subject.name, value=value),
                        "perturbed_answer": [
                            attribute.paraphrase.format(name=subject.name, value=other) for other in wrong
                        ],
                    }


def _attributes(subject: Subject) -> list[Attribute]:
    return [attribute for attribute in (*PEOPLE, *THINGS) if attribute.name in subject.facts]


def _adverb(rng: np.random.Generator) -> str:
    return ADVERBS[int(rng.integers(len(ADVERBS)))]


def _table(rows: Iterable[dict[str, Any]]) -> Dataset:
    columns: dict[str, list[Any]] = {name: [] for name in _FEATURES}
    for row in rows:
        for name, values in columns.items():
            values.append(row.get(name))
    # not Dataset.from_dict, which would look at every value once more: most of the time of a large world
    return Dataset(pa.Table.from_pydict(columns, schema=_FEATURES.arrow_schema))
