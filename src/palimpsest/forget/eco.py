"""Embedding-corrupted prompts: a gate finds the prompts about what must go, and the model reads those corrupted.

Liu et al. 2024 (arXiv:2406.07933, ECO).  Needs: forget and retain records (for the gate).  The weights stay, so whoever
has them, or asks so that the gate does not notice, has everything: this suppresses, it does not remove.  Prompts that
the gate lets through are answered by the very same model, bit by bit.
Shapes: N prompts, B rows of a batch, T positions, n tokens of one prompt, D dimensions of the embedding.
"""

from __future__ import annotations

import logging
import math
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from torch import Tensor

from palimpsest.core.errors import InputError
from palimpsest.core.methods import method
from palimpsest.core.seeds import numpy_rng
from palimpsest.core.watch import Watch
from palimpsest.forget.corruption import STRONG, Corruption, Kind, Search, Where, zeroth_order
from palimpsest.forget.unlearn import above_zero, check_share, distinct, required
from palimpsest.models.anatomy import hooked
from palimpsest.models.encoder import PACKAGED
from palimpsest.models.gate import Gate, Rule
from palimpsest.models.guard import Prepared, register_guard

if TYPE_CHECKING:
    from datasets import Dataset

    from palimpsest.data.request import ForgetRequest
    from palimpsest.models.lm import LM

Tokens = Literal["names", "all"]

_OPTIONS = 4
_DOCUMENT_WORDS = 32  # of a document that are its prompt, and as many its continuation
_START = 1.0  # log10 of the strength (in embedding deviations) or of the dimensions that the search starts from
_STRONGEST = 6.0  # log10 of the largest strength tried
_ENOUGH = 0.02  # distance from the target at which the search ends
_NAME = re.compile(r"[^\W\d_a-z]\w*(?:[ \-][^\W\d_a-z]\w*)*")  # a run of words that begin with no lower-case letter
_LOG = logging.getLogger(__name__)


@method(verb="forget", paper="eco")
@dataclass(frozen=True, kw_only=True)
class ECO:
    """Embedding-corrupted prompts: a gate detects questions about the forget set, whose tokens the model then misreads.

    The strength of the corruption is found by trial: such that the forget questions are answered at chance.  Given a
    model with such a guard already, the new scope joins the old ones.
    """

    kind: Kind = "noise"
    dims: int = 1  # coordinates of the embedding that are corrupted; 0: all
    where: Where = "first"
    strength: float = (
        0.0  # standard deviations of the embedding matrix; 0: found by trial (dims, for "zero" and "flip")
    )
    tokens: Tokens = "names"  # corrupt the names in a prompt, or all its tokens but the last
    target: float = 1 / _OPTIONS  # the share of forget questions answered rightly that the search aims at
    steps: int = 10  # of the search, two looks at the forget questions each
    records: int = 128  # forget questions looked at, at most
    threshold: float = 0.0  # of the gate's probability; 0: conformal
    error: float = 0.05  # the conformal threshold's share of errors
    rule: Rule = "strict"
    encoder: str = PACKAGED
    seed: int = 0

    def __post_init__(self) -> None:
        above_zero(steps=self.steps, records=self.records)
        if not 0 <= self.target <= 1:
            raise InputError(f"target={self.target:g} is a share of right answers: wanted 0 to 1")
        self._corruption(max(self.strength, 1.0))

    def __call__(self, lm: LM, request: ForgetRequest, *, watch: Watch | None = None) -> LM:
        earlier = _scopes(lm)
        check_share(request)
        forget = distinct(request.forget)
        inside = _texts(lm, forget)
        outside = [text for text in _texts(lm, required(request.retain, "retain")) if text not in set(inside)]
        gate = Gate.fit(
            inside,
            outside,
            threshold=self.threshold,
            error=self.error,
            rule=self.rule,
            encoder=self.encoder,
            seed=self.seed,
        )
        corruption = self._corruption(self.strength)
        if not self.strength and (self.kind in STRONG or (self.kind in ("zero", "flip") and self.dims)):
            corruption, found = self.search(lm.with_guard(None), forget)
            gap = f"right answers {found.loss:.3f} from {self.target:.3f} after {len(found.tried)} looks"
            _LOG.info("corruption found: strength %.4g, %d dims, %s", corruption.strength, corruption.dims, gap)
        return lm.with_guard(EcoGuard((*earlier, Scope(gate, corruption, self.tokens))))

    def search(self, lm: LM, forget: Dataset) -> tuple[Corruption, Search]:
        """The corruption under which the forget questions are answered at `target`, and the search that led to it.

        The loss is |share answered rightly - target|: a share *below* chance gives the answer away as well.  What is
        varied is log10 of the strength, or of the dimensions for kinds without a strength.  A question's options are
        its column ``options`` or, without it, the answers to the questions most like it; a document's beginning is a
        question for how it goes on.
        """
        questions = _questions(lm, forget, self.records, self.seed)
        layer: Any = lm.model.get_input_embeddings()
        width = layer.weight.shape[1]
        strong = self.kind in STRONG

        def at(point: float) -> Corruption:
            return self._corruption(10**point, None if strong else min(round(10**point), width))

        def loss(point: float) -> float:
            guarded = lm.with_guard(EcoGuard((Scope(None, at(point), self.tokens),)))
            return abs(right_answers(guarded, questions) - self.target)

        highest = _STRONGEST if strong else math.log10(width)
        search = zeroth_order(loss, min(_START, highest), highest=highest, steps=self.steps, enough=_ENOUGH)
        return at(search.point), search

    def _corruption(self, strength: float, dims: int | None = None) -> Corruption:
        return Corruption(self.kind, self.dims if dims is None else dims, self.where, strength, self.seed)


@dataclass(frozen=True)
class Scope:
    """What must go, as the gate knows it (None: every prompt), and what happens to a prompt about it."""

    gate: Gate | None
    corruption: Corruption
    tokens: Tokens = "names"


@register_guard("eco")
@dataclass(frozen=True, eq=False)
class EcoGuard:
    """Corrupts, inside the embedding layer, the prompts that the gate of a scope detects (the first scope that does).

    A document is a completion of the empty prompt, which no gate detects: it is scored as by the bare model.
    """

    scopes: tuple[Scope, ...]

    def prepare(self, lm: LM, prompts: Sequence[str]) -> Prepared:
        meant = self.detected(prompts)
        if (meant < 0).all():
            return Prepared(prompts)
        rows = np.flatnonzero(meant >= 0).tolist()
        plans = {row: _Plan.of(lm, prompts[row], self.scopes[meant[row]]) for row in rows}
        layer: Any = lm.model.get_input_embeddings()
        unit = float(layer.weight.detach().float().std())

        @contextmanager
        def active(batch_rows: np.ndarray, prompt: Tensor) -> Iterator[None]:
            lines = [(line, plans[row]) for line, row in enumerate(batch_rows.tolist()) if row in plans]

            def corrupt(module: Any, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
                if output.shape[:2] != prompt.shape:
                    return output
                changed = output.clone()
                for line, plan in lines:
                    places = prompt[line].nonzero().squeeze(1)
                    if len(places):
                        chosen = places[plan.chosen(inputs[0][line, places]).to(places.device)]
                        changed[line, chosen] = plan.scope.corruption(output[line, chosen], unit, plan.prompt)
                return changed

            if lines and bool(prompt.any()):
                with hooked((layer, corrupt)):
                    yield
            else:  # an answer is being decoded: what was corrupted stays so in the cache
                yield

        return Prepared(prompts, active)

    def detected(self, prompts: Sequence[str]) -> np.ndarray:
        """(N,) the number of the first scope that detects each prompt; -1 where none does."""
        meant = np.full(len(prompts), -1)
        for number, scope in reversed(list(enumerate(self.scopes))):
            fires = np.ones(len(prompts), dtype=bool) if scope.gate is None else scope.gate(prompts)
            meant[fires & np.array([bool(prompt) for prompt in prompts], dtype=bool)] = number
        return meant

    def explain(self, lm: LM, prompts: Sequence[str]) -> list[dict[str, Any]]:
        """What happens to each prompt, for a log: the gate's probability and threshold, the tokens corrupted."""
        meant = self.detected(prompts)
        probabilities = [None if scope.gate is None else scope.gate.probability(prompts) for scope in self.scopes]
        records = []
        for row, prompt in enumerate(prompts):
            scope = self.scopes[max(int(meant[row]), 0)]
            known = probabilities[max(int(meant[row]), 0)]
            plan = _Plan.of(lm, prompt, scope) if meant[row] >= 0 else None
            records.append(
                {
                    "scope": int(meant[row]),
                    "probability": None if known is None else float(known[row]),
                    "threshold": None if scope.gate is None else scope.gate.threshold,
                    "tokens": [] if plan is None else np.flatnonzero(plan.flags).tolist(),
                    "corruption": None if plan is None else asdict(scope.corruption),
                }
            )
        return records

    def state(self) -> tuple[dict[str, Any], dict[str, Tensor]]:
        scopes: list[dict[str, Any]] = []
        tensors: dict[str, Tensor] = {}
        for number, scope in enumerate(self.scopes):
            settings = None
            if scope.gate is not None:
                settings, weights = scope.gate.state()
                tensors |= {f"{number}.{name}": value for name, value in weights.items()}
            scopes.append({"gate": settings, "corruption": asdict(scope.corruption), "tokens": scope.tokens})
        return {"scopes": scopes}, tensors

    @classmethod
    def restore(cls, settings: dict[str, Any], tensors: dict[str, Tensor]) -> EcoGuard:
        scopes = []
        for number, saved in enumerate(settings["scopes"]):
            start = f"{number}."
            own = {name.removeprefix(start): value for name, value in tensors.items() if name.startswith(start)}
            gate = None if saved["gate"] is None else Gate.restore(saved["gate"], own)
            scopes.append(Scope(gate, Corruption(**saved["corruption"]), saved["tokens"]))
        return cls(tuple(scopes))


@dataclass(frozen=True)
class _Plan:
    """One detected prompt: its tokens, and which of them are to be corrupted."""

    prompt: str
    scope: Scope
    ids: list[int]
    flags: np.ndarray = field(repr=False)  # (n,) bool

    @staticmethod
    def of(lm: LM, prompt: str, scope: Scope) -> _Plan:
        found = lm.tokenizer(prompt, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
        ids, offsets = found["input_ids"], found["offset_mapping"]
        flags = np.zeros(len(ids), dtype=bool)
        if scope.tokens == "names":
            for first, last in names(prompt):
                flags |= np.array([start < last and end > first for start, end in offsets], dtype=bool)
        if not flags.any():
            if scope.tokens == "names":
                _LOG.debug("no name in %r: all its tokens but the last are corrupted", prompt)
            flags[: max(len(ids) - 1, 1)] = True
        return _Plan(prompt, scope, ids, flags)

    def chosen(self, seen: Tensor) -> Tensor:
        """(k,) bool over the k tokens of the prompt that a batch holds: its head may have been cut off, or its last
        token have merged with the completion's first."""
        held = seen.tolist()
        room = len(self.ids) - len(held)
        starts = [start for start in range(max(room, 0) + 1) if self.ids[start : start + len(held)] == held]
        start = starts[0] if starts else 0
        flags = torch.zeros(len(held), dtype=torch.bool)
        part = torch.from_numpy(self.flags[start : start + len(held)])
        flags[: len(part)] = part
        if not flags.any():  # what was to be corrupted has been cut off
            flags[: max(len(held) - 1, 1)] = True
        return flags


def names(text: str) -> list[tuple[int, int]]:
    """(first, past the last) character of each run of capitalised words; a single one that opens a sentence is none."""
    found = []
    for run in _NAME.finditer(text):
        opens = re.search(r"(?:^|[.!?:]\s+|\n)\W*$", text[: run.start()]) is not None
        if not (opens and not re.search(r"[ \-]", run.group())):
            found.append(run.span())
    return found


@dataclass(frozen=True)
class Question:
    """A prompt with its options, the right one among them."""

    prompt: str
    options: tuple[str, ...]
    right: int


def right_answers(lm: LM, questions: Sequence[Question]) -> float:
    """The share of questions whose right option is the likeliest a token; equally likely ones share the point."""
    pairs = [(question.prompt, option) for question in questions for option in question.options]
    means = iter([float(values.mean()) if len(values) else -math.inf for values in lm.token_logprobs(pairs)])
    points = []
    for question in questions:
        scores = np.array([next(means) for _ in question.options])
        best = scores >= scores.max()
        points.append(best[question.right] / best.sum())
    return float(np.mean(points))


def _scopes(lm: LM) -> tuple[Scope, ...]:
    """The scopes that the model is guarded against already."""
    if lm.guard is None:
        return ()
    if not isinstance(lm.guard, EcoGuard):
        raise InputError(f"this model forgets by another guard ({type(lm.guard).__name__}): load it without that guard")
    return lm.guard.scopes


def halved(text: str) -> tuple[str, str]:
    ends = [word.end() for word in re.finditer(r"\S+", text)]
    if len(ends) < 2:
        return text, ""
    first = min(_DOCUMENT_WORDS, len(ends) // 2)
    return text[: ends[first - 1]], text[ends[first - 1] : ends[min(2 * first, len(ends)) - 1]]


def _texts(lm: LM, table: Dataset) -> list[str]:
    """What the gate learns from: prompts, and of documents the beginning and the whole."""
    texts = []
    for prompt, completion in lm.pairs(table):
        texts += [prompt] if prompt else [halved(completion)[0], completion]
    found = [text for text in dict.fromkeys(texts) if text.strip()]
    if not found:
        raise InputError("there is no text among the records, so nothing to tell what must go by")
    return found


def _questions(lm: LM, table: Dataset, most: int, seed: int) -> list[Question]:
    """At most `most` seeded questions of a table with their options; of documents, if there are no others."""
    pairs = lm.pairs(table)
    if not any(prompt for prompt, _ in pairs):
        pairs = [halved(text) for _, text in pairs]
    given = table["options"] if "options" in table.column_names else [None] * len(pairs)
    rows = [row for row, (prompt, completion) in enumerate(pairs) if prompt.strip() and completion.strip()]
    order = numpy_rng(seed, "questions").permutation(len(rows))
    likeness = _Likeness([pairs[row] for row in rows])
    found = []
    for place in sorted(order[:most].tolist()):
        prompt, completion = pairs[rows[place]]
        options = _given(given[rows[place]], completion) or likeness.others(place)
        if len(options) == _OPTIONS:
            shuffled = numpy_rng(seed, "options", prompt).permutation(_OPTIONS)
            right = int(np.flatnonzero(shuffled == 0)[0])
            found.append(Question(prompt, tuple(options[number] for number in shuffled), right))
    if not found:
        raise InputError(
            f"the search needs forget questions with {_OPTIONS} different answers between them: give strength instead"
        )
    return found


def _given(options: Sequence[str] | None, completion: str) -> list[str]:
    """The right answer, then the others of a record's own options, written as the right one is."""
    lead = completion[: len(completion) - len(completion.lstrip())]
    if not options or completion.strip() not in options:
        return []
    wrong = [lead + option for option in options if option != completion.strip()]
    return [completion, *wrong][:_OPTIONS]


class _Likeness:
    """Finds wrong answers of the right kind: those to the questions that share most words, names aside."""

    def __init__(self, pairs: list[tuple[str, str]]):
        self.pairs = pairs
        self.words = [self._bare(prompt) for prompt, _ in pairs]

    def others(self, place: int) -> list[str]:
        """The answer to question `place`, then the other answers nearest to it, all different."""
        own = self.words[place]
        shares = np.array([len(own & words) / max(len(own | words), 1) for words in self.words])
        answers = [self.pairs[place][1]]
        for other in np.argsort(-shares, kind="stable"):
            if self.pairs[other][1] not in answers:
                answers.append(self.pairs[other][1])
            if len(answers) == _OPTIONS:
                break
        return answers

    def _bare(self, prompt: str) -> set[str]:
        for first, last in reversed(names(prompt)):
            prompt = prompt[:first] + prompt[last:]
        return set(re.findall(r"\w+", prompt.casefold()))
