"""What the models of an audit say about concepts and hold of them, beside each other: measurements, table and verdict.

"ablated" is the model before with all traces ablated: what an unlearner would come to that erased just these.
Shapes: N questions that no vector was chosen by, n vectors.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np

from palimpsest.audit.answers import cut, rouge_l
from palimpsest.audit.jailbreaks import JAILBREAKS, PLAIN, asked
from palimpsest.audit.traces import Change, Trace, ablated, change, own_answers
from palimpsest.core.records import Better, Measurement
from palimpsest.core.statistics import bootstrap_interval
from palimpsest.models.concept_vectors import Place, find, read_all
from palimpsest.models.storage import merged

if TYPE_CHECKING:
    from palimpsest.audit.conceptvectors import ConceptVectors, Study
    from palimpsest.models.lm import LM

LEFT = 0.5  # Jaccard index from which a trace counts as left
ABLATED = "ablated"
_SHOWN = ("before", "after", "reference")
_CHANGES: tuple[tuple[str, str, float, Better], ...] = (  # measurement, field of `Change`, value before, good way
    ("trace_jaccard", "jaccard", 1.0, "lower"),
    ("trace_cosine", "cosine", 1.0, "lower"),
    ("trace_l2", "l2", 0.0, "higher"),
)


@dataclass(frozen=True, eq=False)
class Findings:
    """The models of one audit, by name ("before", "after", maybe "reference"), on the questions of its study."""

    audit: ConceptVectors
    study: Study
    models: dict[str, LM]

    @cached_property
    def change(self) -> Change:
        return self._changed([(v.place, v.sign) for one in self.study.found for v in one.vectors])

    @cached_property
    def change_elsewhere(self) -> Change:
        return self._changed([(place, 1) for one in self.study.found for draw in one.draws for place in draw])

    def _changed(self, signed: Sequence[tuple[Place, int]]) -> Change:
        before, after = self.study.lm, opened(self.models["after"])
        return change(before, after, [p for p, _ in signed], [s for _, s in signed], self.audit.words)

    @cached_property
    def said(self) -> dict[str, dict[str, list[str]]]:
        """{model: {way: answers about the concepts}}; the questions are those no vector was chosen by."""
        return {name: {way: self._say(name, way) for way in (PLAIN, *JAILBREAKS)} for name in self._names}

    @property
    def _names(self) -> list[str]:
        return [*self.models, *([ABLATED] if self.study.found else [])]

    def _say(self, name: str, way: str) -> list[str]:
        concepts = [one.concept for one in self.study.traces]
        prompts = [
            prompt
            for one in concepts
            for prompt in asked(way, one.measured.prompts, one.name, one.texts, one.chosen_by.pairs)
        ]
        return self._answers(name, prompts)

    def _answers(self, name: str, prompts: Sequence[str]) -> list[str]:
        lm = self.study.lm if name == ABLATED else self.models[name]
        around: Any = nullcontext()
        if name == ABLATED:
            around = ablated(lm, self.study.places, self.audit.search)
        with around:
            return [cut(answer) for answer in own_answers(lm, prompts, self.audit.answer_tokens)]

    @property
    def truths(self) -> list[str]:
        return [truth.strip() for one in self.study.traces for truth in one.concept.measured.truths]

    def alike(self, name: str, way: str) -> np.ndarray:
        """(N,) how far a model's answers are those that the model before gives when asked plainly, 0 to 100."""
        return _similarity(self.said[name][way], self.said["before"][PLAIN])

    @cached_property
    def unrelated(self) -> dict[str, np.ndarray]:
        said = {name: self._answers(name, self.study.unrelated.prompts) for name in self._names}
        return {name: _similarity(answers, said["before"]) for name, answers in said.items()}

    def measurements(self) -> list[Measurement]:
        found = [*self._trace_measurements(), self._clear_vectors()]
        found.append(self._spoken("target_answers", "forget", {n: self.alike(n, PLAIN) for n in self._names}))
        found.append(self._spoken("unrelated_answers", "utility", self.unrelated, better="higher"))
        known = {name: _similarity(self.said[name][PLAIN], self.truths) for name in self._names}
        found.append(self._spoken("concept_knowledge", "forget", known))
        for way, told in JAILBREAKS.items():
            values = {name: self.alike(name, way) for name in self._names}
            found.append(self._spoken(f"jailbreak_{way}", "attack", values, note=f"the attacker {told}"))
        return found

    def _trace_measurements(self) -> list[Measurement]:
        if not self.study.found:
            note = "no trace was found in the model before, so there is nothing whose change could be measured"
            return [Measurement(name, "trace", None, None, better=way, note=note) for name, _, _, way in _CHANGES]
        found = []
        for name, of, start, better in _CHANGES:
            values, others = getattr(self.change, of), getattr(self.change_elsewhere, of)
            note = f"{len(values)} vectors of {len(self.study.found)} concepts; other vectors there {others.mean():.3f}"
            if name == "trace_jaccard":
                note += f"; by the vectors' own move {self.change.jaccard_alone.mean():.3f}"
            if name == "trace_l2":
                note += f"; in lengths of the vector {(values / self.change.norm).mean():.3f}"
            low, high = bootstrap_interval(values, seed=self.audit.seed)
            found.append(
                Measurement(
                    name,
                    "trace",
                    start,
                    float(values.mean()),
                    low=low,
                    high=high,
                    n=len(values),
                    better=better,
                    note=note,
                    values=tuple(values.tolist()),
                )
            )
        return found

    def _clear_vectors(self) -> Measurement:
        """How many vectors of each model write a concept of the request, looked for in that model's own weights."""
        counts = {}
        for name, lm in self.models.items():
            bare = opened(lm)
            written = read_all(bare.model, self.audit.words)
            counts[name] = sum(
                len(find(bare, *tables, written, keep=self.audit.keep, clarity=self.audit.clarity, most=10**6))
                for tables in self.study.tables.values()
            )
        note = "" if "reference" in counts else "needs a reference model (--reference) to say how many arise anyway"
        return Measurement(
            "clear_vectors",
            "trace",
            float(counts["before"]),
            float(counts["after"]),
            None if "reference" not in counts else float(counts["reference"]),
            n=len(self.study.traces),
            better="reference",
            note=note,
        )

    def _spoken(
        self,
        name: str,
        group: str,
        values: dict[str, np.ndarray],
        better: Better = "lower",
        note="",
    ) -> Measurement:
        low, high = bootstrap_interval(values["after"], seed=self.audit.seed)
        told = [note] if note else []
        if ABLATED in values:
            told.append(f"the model before with its traces ablated: {values[ABLATED].mean():.1f}")
        reference = values.get("reference")
        return Measurement(
            name,
            group,
            float(values["before"].mean()),
            float(values["after"].mean()),
            None if reference is None else float(reference.mean()),
            low,
            high,
            n=len(values["after"]),
            better=better,
            note="; ".join(told),
            values=tuple(values["after"].tolist()),
            before_values=tuple(values["before"].tolist()),
            reference_values=() if reference is None else tuple(reference.tolist()),
        )

    def table(self) -> list[dict[str, Any]]:
        """One row a way of asking: how far each model's answers are those of the model before."""
        return [
            {"asked": way, **{name: round(float(self.alike(name, way).mean()), 1) for name in self._names}}
            for way in (PLAIN, *JAILBREAKS)
        ]

    def verdict(self) -> str:
        number, traced = len(self.study.traces), len(self.study.found)
        if not traced:
            return (
                f"No trace found: in none of {number} concepts is there a value vector that writes it and drives the "
                "answers on it. This says nothing about what is left."
            )
        moved, others = self.change.jaccard.mean(), self.change_elsewhere.jaccard.mean()
        said = self.alike("after", PLAIN).mean()
        word = "left" if moved >= LEFT else "gone"
        return (
            f"The trace is {word}: {len(self.change.jaccard)} vectors hold {traced} of {number} concepts; what they "
            f"write has a Jaccard index of {moved:.2f} with what they wrote before (other vectors there {others:.2f}), "
            f"and the answers on the concepts are {said:.0f}% like those before."
        )

    def examples(self) -> list[dict[str, Any]]:
        prompts = [prompt for one in self.study.traces for prompt in one.concept.measured.prompts]
        spread = np.linspace(0, len(prompts) - 1, min(self.audit.examples, len(prompts))).round().astype(int)
        return [
            {
                "set": "forget",
                "prompt": prompts[row],
                "truth": self.truths[row],
                **{name: self.said[name][PLAIN][row] if name in self.said else None for name in _SHOWN},
            }
            for row in spread.tolist()
        ]


def opened(lm: LM) -> LM:
    """The model as its weights have it: adapters merged, no guard."""
    return replace(lm, model=merged(lm.model), guard=None)


def _similarity(answers: Sequence[str], truths: Sequence[str]) -> np.ndarray:
    """(N,) ROUGE-L F1, 0 to 100; two empty answers are alike."""
    both_empty = np.array([not one.strip() and not other.strip() for one, other in zip(answers, truths, strict=True)])
    return np.where(both_empty, 100.0, 100 * rouge_l(answers, truths))


def told(one: Trace, before: LM) -> dict[str, Any]:
    """A concept's trace, for people: which vectors, what they write, what their ablation did."""
    told: dict[str, Any] = {"concept": one.concept.name, "candidates": one.candidates, "vectors": []}
    if not one.vectors:
        return {**told, "status": "no trace found"}
    for vector in one.vectors:
        words = [before.tokenizer.decode([word]) for word in vector.words]
        told["vectors"].append({**asdict(vector), "words": words})
    drops = {name: float(getattr(one, name).mean()) for name in ("target", "unrelated", "random")}
    return {**told, "status": "trace found", "drops": drops}
