"""Concept vectors: is what a model no longer says still written in its weights?

Hong et al. 2024 (arXiv:2406.11614).  Behind a concept stand a few value vectors of the feed-forward blocks whose top
words are about it and whose ablation makes the model lose the answers on it.  They are looked for in the model before;
after unlearning, how far they have moved says whether the concept was erased or only silenced, and jailbreak prompts,
also put to the model with these vectors ablated, say what that means in practice.
Needs: forget records about one concept or several (column ``concept`` or ``person``) with at least 8 questions or texts
each, and utility or retain records about other things; a dense model.  A concept that is held in attention, or by many
vectors together, shows no trace here: that is said, and counted, and proves nothing.

Ours beside the paper: a word statistic in place of the GPT-4 judge; validation by the probability of the model's own
answers (finer than BLEU on short ones), on other questions than effects are reported on; noise in lengths of the
vector; other vectors of the same layers and norms beside each number.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any

from palimpsest.audit.trace_findings import Findings, opened, told
from palimpsest.audit.traces import (
    Certainty,
    Concept,
    Questions,
    Search,
    Trace,
    questions_of,
    trace,
)
from palimpsest.core.errors import InputError
from palimpsest.core.methods import config_of, info_of, method
from palimpsest.core.records import Evidence
from palimpsest.core.seeds import numpy_rng
from palimpsest.data.records import concat
from palimpsest.models.concept_vectors import by_concept, projections, read_all

if TYPE_CHECKING:
    from palimpsest.data.request import ForgetRequest
    from palimpsest.models.lm import LM

FEWEST_UNRELATED = 8  # questions about other things


@method(verb="audit", paper="conceptvectors")
@dataclass(frozen=True, kw_only=True)
class ConceptVectors:
    """Concept vectors: finds the weights that hold a concept, and measures how much of them unlearning has changed."""

    words: int = 0  # K, top words that are compared; 0: the paper's 200, in a small vocabulary a fiftieth of it
    keep: float = 0.3  # share of all vectors that is looked at, those of the highest top logits
    clarity: float = 0.5  # share of a vector's ten top words that must be the concept's
    tried: int = 10  # vectors of a concept that are ablated, at most
    strength: float = 5.0  # length of the noise in lengths of the vector
    least_drop: float = 0.05  # of the probability of its own answers: below, a vector does not drive them
    specific: float = 2.0  # how many times larger than on unrelated questions the drop must be
    concepts: int = 10  # concepts looked at, at most
    unrelated: int = 50  # unrelated questions, at most
    answer_tokens: int = 32
    examples: int = 4  # answers shown
    seed: int = 0

    def __post_init__(self) -> None:
        if not (0 < self.keep <= 1 and 0 < self.clarity <= 1) or self.words < 0 or self.strength <= 0:
            raise InputError("keep and clarity must lie in (0, 1], words be 0 or more, strength above 0")
        if min(self.tried, self.concepts, self.answer_tokens) < 1 or self.unrelated < FEWEST_UNRELATED:
            raise InputError(
                f"tried, concepts and answer_tokens must be at least 1, unrelated {FEWEST_UNRELATED} or more"
            )

    def __call__(self, before: LM, after: LM, request: ForgetRequest, reference: LM | None = None) -> Evidence:
        """Measure a model after unlearning against the one before.

        A `reference` that never knew says what its answers, and the number of clear vectors, should have come to.
        Raises `InputError` for models that cannot be compared or addressed, and for too few records (with how many
        are needed).
        """
        began = time.monotonic()
        models = {"before": before, "after": after, **({} if reference is None else {"reference": reference})}
        self._refuse(models)
        study = Study.of(self, before, request)
        found = Findings(self, study, models)
        info = info_of(self)
        return Evidence(
            kind="audit",
            measurements=tuple(found.measurements()),
            method={"name": info.name, "paper": info.paper, "config": config_of(self)},
            model={name: {"source": lm.source, "sha256": lm.sha256} for name, lm in models.items()},
            data=request.describe(),
            seconds=time.monotonic() - began,
            extras={
                "audit": {"name": info.name, "paper": info.paper, "config": config_of(self)},
                "verdict": found.verdict(),
                "concepts": [told(one, before) for one in study.traces],
                "table": found.table(),
                "examples": found.examples(),
            },
        )

    @property
    def search(self) -> Search:
        return Search(**{one.name: getattr(self, one.name) for one in fields(Search)})

    def _refuse(self, models: dict[str, LM]) -> None:
        words = models["before"].tokenizer.get_vocab()
        for name, lm in models.items():
            projections(lm.model)
            if lm.tokenizer.get_vocab() != words:
                raise InputError(f"before and {name} have different vocabularies: their vectors cannot be compared")


@dataclass(frozen=True, eq=False)
class Study:
    """The traces of a request's concepts in the model before, and the questions to hold models against."""

    lm: LM  # the model before
    traces: list[Trace]
    tables: dict[str, tuple[Any, Any]]  # of each concept: its rows for the search and others', encoded
    unrelated: Questions  # that had no part in the choice of vectors

    @staticmethod
    def of(audit: ConceptVectors, before: LM, request: ForgetRequest) -> Study:
        lm = opened(before)
        grouped = by_concept(request.forget, request.name)
        picked = numpy_rng(audit.seed, "concepts").permutation(len(grouped))[: audit.concepts]
        names = [list(grouped)[place] for place in sorted(picked.tolist())]
        concepts = [Concept.of(name, grouped[name], audit.seed) for name in names]
        elsewhere = _unrelated(audit, request)
        half = len(elsewhere) // 2
        unrelated = [elsewhere.select(range(half)), elsewhere.select(range(half, len(elsewhere)))]
        known = [Certainty.of(lm, part, audit.search) for part in unrelated]
        written = read_all(lm.model, audit.words)
        kept = request.retain if request.retain is not None else request.utility
        tables, traces = {}, []
        for concept in concepts:
            rest = [table for name, table in grouped.items() if name != concept.name]
            tables[concept.name] = lm.encode(concept.rows), lm.encode(concat(*rest, kept))
            traces.append(trace(concept, tables[concept.name][1], known, written))
        return Study(lm, traces, tables, unrelated[1])

    @property
    def found(self) -> list[Trace]:
        return [one for one in self.traces if one.vectors]

    @property
    def places(self) -> list[tuple[int, int]]:
        return list(dict.fromkeys(place for one in self.found for place in one.places))


def _unrelated(audit: ConceptVectors, request: ForgetRequest) -> Questions:
    """Questions about other things; `InputError` if there are too few."""
    table = request.utility if request.utility is not None else request.retain
    if table is None:
        raise InputError("this audit needs records about other things (--utility or --retain FILE) to hold against")
    found = questions_of(table)
    if len(found) < FEWEST_UNRELATED:
        raise InputError(
            f"{len(found)} questions (or longer texts) about other things are too few: at least {FEWEST_UNRELATED} "
            "are needed among the utility or retain records"
        )
    picked = numpy_rng(audit.seed, "unrelated").permutation(len(found))[: audit.unrelated]
    return found.select(picked)
