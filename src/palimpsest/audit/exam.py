"""What every model of an audit is asked, and what each of them answers.

An `Exam` is made once, from a request and the model before forgetting: all models get the same rows and prompts.
A `Sitting` is one model's answers to it.  Answers are kept under the hash of weights, tokenizer and questions, so the
model before and the reference sit an exam once, however many methods are compared.
Knows nothing of metrics, except to choose how questions are best asked.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from palimpsest.audit import membership
from palimpsest.audit.answers import STOPS, cut, rouge_l
from palimpsest.audit.memorisation import Recital, decode, ends, recitals, recite
from palimpsest.core.cache import cached
from palimpsest.core.errors import InputError
from palimpsest.core.files import sha256_of, write_json
from palimpsest.core.seeds import numpy_rng
from palimpsest.data import records
from palimpsest.models.encode import encode_prompts

if TYPE_CHECKING:
    from datasets import Dataset

    from palimpsest.data.request import ForgetRequest
    from palimpsest.models.lm import LM

DEMONSTRATIONS = 10  # in MUSE's prompts
KS = (5, 10, 20, 30, 40, 50, 60)  # the percentages of Min-K% that MUSE logs
_VERSION = 1  # changes when the same model would answer the same question otherwise

_FRAMED = re.compile(r"\s*(?:question|q)\s*:\s*(.*?)\s*(?:answer|a)\s*:\s*", re.IGNORECASE | re.DOTALL)


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """How much is asked, and how."""

    samples: int = 100  # records of each set that are asked, at most
    prompt_tokens: int = 896  # of a document: MUSE's released prompts have about 660 words
    continuation_tokens: int = 128  # of a document, at most
    answer_tokens: int = 32  # at most
    demonstrations: int | None = None  # None: 10 as in MUSE, or 0 if the model before answers retain better so
    statistic: Literal["min-k", "loss", "zlib", "lowercase"] = "min-k"  # what the membership attack goes by
    k: float = 40.0  # the share of least likely tokens that Min-K% looks at, in percent
    seed: int = 0

    def __post_init__(self) -> None:
        least = {"samples": 1, "prompt_tokens": 4, "continuation_tokens": 4, "answer_tokens": 1}
        for name, value in least.items():
            if getattr(self, name) < value:
                raise InputError(f"{name} must be at least {value}, not {getattr(self, name)}")
        if self.demonstrations is not None and self.demonstrations < 0:
            raise InputError(f"demonstrations must be 0 or more, not {self.demonstrations}")
        if self.statistic not in ("min-k", "loss", "zlib", "lowercase"):
            raise InputError(f"statistic must be min-k, loss, zlib or lowercase, not '{self.statistic}'")
        if not 0 < self.k <= 100:
            raise InputError(f"k is a percentage above 0 and at most 100, not {self.k}")

    @property
    def statistic_name(self) -> str:
        return f"min-{self.k:g}%" if self.statistic == "min-k" else self.statistic

    def sample(self, count: int, *names: object) -> np.ndarray:
        """The numbers of the rows to ask among `count`: all, or a seeded choice of `samples`, ascending."""
        if count <= self.samples:
            return np.arange(count)
        return np.sort(numpy_rng(self.seed, "sample", *names).choice(count, self.samples, replace=False))


@dataclass(frozen=True)
class Style:
    """How questions are asked: bare, as the model was trained on them, or after demonstrations as in MUSE."""

    demonstrations: tuple[tuple[str, str], ...] = ()
    words: str = "without demonstrations"
    why: str = ""
    held_back: frozenset[int] = frozenset()  # of the retain questions, those that demonstrations give away

    def prompts(self, lm: LM, asked: Dataset) -> list[str]:
        """The prompts of a table of questions."""
        if not self.demonstrations:
            return [prompt for prompt, _ in lm.pairs(asked)]
        shown = "".join(f"Question: {question}\nAnswer: {answer}\n\n" for question, answer in self.demonstrations)
        return [f"{shown}Question: {bare(prompt)}\nAnswer: " for prompt, _ in records.questions(asked)]


@dataclass(frozen=True)
class Questions:
    """N questions as they are put to a model, and their true answers."""

    prompts: tuple[str, ...]
    shown: tuple[str, ...]  # without demonstrations, for people
    truths: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.prompts)


@dataclass(frozen=True)
class Exam:
    """What is asked.  A set without anything to ask is missing from its dict."""

    sizes: Sizes
    style: Style
    recitals: dict[str, list[Recital]]  # forget, utility: documents to go on with
    questions: dict[str, Questions]  # forget, utility, retain
    scored: dict[str, Dataset]  # forget, utility: rows whose likelihood is taken
    members: dict[str, Dataset]  # forget and holdout rows for the membership attack: both, or neither

    def about(self, lm: LM, request: ForgetRequest) -> Exam:
        """The same questions and recitals, with the forget set of another request; no likelihoods, no attack."""
        recited = _recitals(self.sizes, lm, request.forget, "forget")
        asked = _questions(self.sizes, self.style, lm, request.forget, "forget")
        return replace(
            self,
            recitals=_present(**{**self.recitals, "forget": recited}),
            questions=_present(**{**self.questions, "forget": asked}),
            scored={},
            members={},
        )


def exam(sizes: Sizes, lm: LM, request: ForgetRequest) -> Exam:
    """The exam on a request; `lm`, the model before forgetting, says how long prompts may be and how to ask."""
    style = _style(sizes, lm, request)
    tables = {"forget": request.forget, "utility": request.utility, "retain": request.retain}
    given = {name: table for name, table in tables.items() if table is not None}
    both = {name: table for name, table in given.items() if name != "retain"}
    return Exam(
        sizes=sizes,
        style=style,
        recitals=_present(**{name: _recitals(sizes, lm, table, name) for name, table in both.items()}),
        questions=_present(**{name: _questions(sizes, style, lm, table, name) for name, table in given.items()}),
        scored=_present(**{name: _scorable(sizes, lm, table, name) for name, table in both.items()}),
        members=_members(sizes, lm, request),
    )


@dataclass(frozen=True)
class Sitting:
    """One model's answers to an exam.  ``keep=False``: they are not written to the cache (a model in training)."""

    exam: Exam
    lm: LM
    keep: bool = True

    def recital(self, name: str) -> list[str]:
        """The model's continuations of a set's documents."""
        asked = self.exam.recitals[name]
        key = [[[recital.prompt.tolist(), len(recital.truth)] for recital in asked]]
        return self._remembered(["recital", sha256_of(key)], lambda: decode(self.lm, recite(self.lm, asked)))

    def beginnings(self, name: str) -> list[str]:
        """What is given of a set's documents."""
        return decode(self.lm, [recital.prompt for recital in self.exam.recitals[name]])

    def truths(self, name: str) -> list[str]:
        """How a set's documents really go on, cut to the same tokens."""
        return decode(self.lm, [recital.truth for recital in self.exam.recitals[name]])

    def answers(self, name: str) -> list[str]:
        """The model's answers to a set's questions, cut by MUSE's rules."""
        return self._answers(self.exam.questions[name])

    def _answers(self, questions: Questions) -> list[str]:
        tokens = _answer_room(self.exam.sizes, self.lm)

        def ask() -> list[str]:
            return [cut(said) for said in self.lm.generate(questions.prompts, max_new_tokens=tokens, stop=STOPS)]

        return self._remembered(["answers", sha256_of(questions.prompts), tokens], ask)

    def surprise(self, name: str) -> np.ndarray:
        """(N,) mean negative log-likelihood a token of a set's rows, in nats."""
        rows = self.exam.scored[name]
        return np.array(self._remembered(["nll", records.sha256(rows)], lambda: self.lm.nll(rows).tolist()))

    def attack(self, name: str) -> dict[str, np.ndarray]:
        """The scores of the membership attack on the members "forget" or "holdout": {statistic: (N,)}."""
        rows, sizes = self.exam.members[name], self.exam.sizes
        texts = [completion for _, completion in records.pairs(rows)]

        def scores() -> dict[str, list[float]]:
            logprobs = text_logprobs(self.lm, rows)
            found = {f"min-{k:g}%": membership.min_k(logprobs, k) for k in sorted({*KS, sizes.k})}
            found |= {"loss": membership.loss(logprobs), "zlib": membership.zlib_ratio(logprobs, texts)}
            if sizes.statistic == "lowercase":
                lowered = text_logprobs(self.lm, [(prompt, text.lower()) for prompt, text in self.lm.pairs(rows)])
                found["lowercase"] = membership.lowercase_ratio(logprobs, lowered)
            return {statistic: values.tolist() for statistic, values in found.items()}

        key = ["attack", records.sha256(rows), sizes.k, sizes.statistic == "lowercase"]
        return {statistic: np.array(values) for statistic, values in self._remembered(key, scores).items()}

    def _remembered(self, what: Any, compute: Callable[[], Any]) -> Any:
        if not self.keep:
            return compute()
        return cached(
            "audit",
            [_VERSION, *self._who, what],
            lambda folder: write_json(folder / "value.json", compute()),
            lambda folder: json.loads((folder / "value.json").read_text(encoding="utf-8")),
        )

    @cached_property
    def sha256(self) -> str:
        """Of the model; hashed once a sitting, for a large model takes a while."""
        return self.lm.sha256

    @cached_property
    def _who(self) -> list[str]:
        tokenizer = self.lm.tokenizer
        written = sha256_of([tokenizer.backend_tokenizer.to_str(), tokenizer.chat_template])
        return [self.sha256, written, self.lm.device.type, str(self.lm.max_length)]


def text_logprobs(lm: LM, rows: Any) -> list[np.ndarray]:
    """The log-probabilities of each row's own tokens, without the end-of-sequence token that encoding adds."""
    last = [ends(lm, ids) for ids in lm.encode(rows).ids]
    return [values[: len(values) - end] for values, end in zip(lm.token_logprobs(rows), last, strict=True)]


def bare(prompt: str) -> str:
    """A question without the ``Question: ... Answer:`` that may be written around it."""
    found = _FRAMED.fullmatch(prompt)
    return found[1] if found else prompt.strip()


def _style(sizes: Sizes, lm: LM, request: ForgetRequest) -> Style:
    """How to ask: see `Sizes.demonstrations`."""
    if sizes.demonstrations == 0:
        return Style()
    asked = records.select_questions(request.retain) if request.retain is not None else None
    if asked is None or len(asked) < 2:
        return Style(why="they are taken from the retain set's questions, and there are too few")
    wanted = DEMONSTRATIONS if sizes.demonstrations is None else sizes.demonstrations
    style = _demonstrated(asked, wanted, sizes.seed)
    room = lm.max_length - _answer_room(sizes, lm)
    tables = [table for table in (request.forget, request.utility, request.retain) if table is not None]
    longest = max((prompt for table in tables for prompt, _ in records.questions(table)), key=len)
    while style.demonstrations and _length(lm, style, longest) > room:
        style = _demonstrated(asked, len(style.demonstrations) - 1, sizes.seed)
    if not style.demonstrations:
        return Style(why=f"none fits into the model's context of {lm.max_length} tokens")
    if sizes.demonstrations is not None:
        return style
    plain = Style(held_back=style.held_back)
    shown, bare_ = (_answered(sizes, one, lm, request.retain) for one in (style, plain))
    best, score, other, other_score = (style, shown, plain, bare_) if shown >= bare_ else (plain, bare_, style, shown)
    why = f"the model before answers {score:.0f}% of the retain set so, {other_score:.0f}% {other.words}"
    return replace(best, why=why)


def _demonstrated(asked: Dataset, wanted: int, seed: int) -> Style:
    """The style with one question of each of `wanted` groups (persons, or rows), at most half of all groups."""
    labels: list[Any] = list(range(len(asked)))
    if "person" in asked.column_names:
        labels = [row if person is None else person for row, person in enumerate(asked["person"])]
    groups: dict[Any, list[int]] = {}
    for row, label in enumerate(labels):
        groups.setdefault(label, []).append(row)
    rng = numpy_rng(seed, "demonstrations")
    order = [list(groups.values())[group] for group in rng.permutation(len(groups))]
    chosen = order[: min(wanted, len(order) // 2)]
    rows = [group[int(rng.integers(len(group)))] for group in chosen]
    shown = tuple((bare(question), answer.strip()) for question, answer in records.questions(asked.select(rows)))
    words = f"after {len(shown)} demonstration{'s' if len(shown) != 1 else ''} from the retain set"
    return Style(shown, words, held_back=frozenset(row for group in chosen for row in group))


def _answer_room(sizes: Sizes, lm: LM) -> int:
    return min(sizes.answer_tokens, max(lm.max_length // 2, 1))


def _length(lm: LM, style: Style, question: str) -> int:
    from datasets import Dataset

    prompt = style.prompts(lm, Dataset.from_dict({"prompt": [question], "completion": [""]}))
    return len(encode_prompts(lm.tokenizer, prompt)[0])


def _answered(sizes: Sizes, style: Style, lm: LM, retain: Dataset | None) -> float:
    """How well the model answers the retain questions in this style: mean ROUGE-L in percent."""
    questions = _questions(sizes, style, lm, retain, "retain")
    if questions is None:
        return 0.0
    sitting = Sitting(Exam(sizes, style, {}, {"retain": questions}, {}, {}), lm)
    return 100 * float(rouge_l(sitting.answers("retain"), questions.truths).mean())


def _recitals(sizes: Sizes, lm: LM, table: Dataset, name: str) -> list[Recital]:
    texts = records.documents(table)
    picked = [texts[row] for row in sizes.sample(len(texts), name, "documents")]
    return recitals(lm, picked, sizes.prompt_tokens, sizes.continuation_tokens)


def _questions(sizes: Sizes, style: Style, lm: LM, table: Dataset | None, name: str) -> Questions | None:
    if table is None:
        return None
    asked = records.select_questions(table)
    free = [row for row in range(len(asked)) if name != "retain" or row not in style.held_back]
    asked = asked.select([free[row] for row in sizes.sample(len(free), name, "questions")])
    if len(asked) == 0:
        return None
    pairs = records.questions(asked)
    return Questions(
        tuple(style.prompts(lm, asked)),
        tuple(bare(prompt) for prompt, _ in pairs),
        tuple(completion.strip() for _, completion in pairs),
    )


def _members(sizes: Sizes, lm: LM, request: ForgetRequest) -> dict[str, Dataset]:
    """The rows to compare: documents where both sets have some, else questions, by their answers."""
    if request.holdout is None:
        return {}
    tables = {"forget": request.forget, "holdout": request.holdout}
    for select in (records.select_documents, records.select_questions):
        found = {name: _scorable(sizes, lm, select(table), name) for name, table in tables.items()}
        if all(rows is not None for rows in found.values()):
            return _present(**found)
    return {}


def _scorable(sizes: Sizes, lm: LM, table: Dataset, name: str) -> Dataset | None:
    """The sampled rows with a token of their own that a likelihood can be taken of; None if there are none."""
    rows = table.select(sizes.sample(len(table), name, "rows"))
    if len(rows) == 0:
        return None
    try:
        encoded = lm.encode(rows)
    except InputError:  # no row has anything to score
        return None
    tokens = [len(ids) - ends(lm, ids) - start for ids, start in zip(encoded.ids, encoded.starts, strict=True)]
    good = [row for row, count in enumerate(tokens) if count > 0]
    return rows.select(good) if good else None


def _present(**parts: Any) -> dict[str, Any]:
    return {name: part for name, part in parts.items() if part is not None and len(part) > 0}
