"""MUSE: six questions to a model that was made to forget, each answered before, after, and by a model that never knew.

Shi et al. 2024 (arXiv:2407.06460; ICLR 2025).  Does it recite the forget set (C1), know it (C2), give away that it was
trained on it (C3); does the rest still work (C4), after a large request (C5), after many (C6)?  C3 needs a reference
trained without the forget set, and holdout records that no model has seen; C1 and C2 mean little without the reference.
C5 and C6 run the unlearner again, on parts of the forget set.  Scores run from 0 to 100, leakage from -100 up.

ROUGE of an empty answer is 0 and looks like perfect forgetting, so the share of gibberish stands beside C1, C2 and C4.
Definitions are the release's, without its known slips (sheet `muse`).  Where small models force a choice, it is stated
in `audit.exam` and `audit.memorisation`, and the measurement's note says which was made.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from palimpsest.audit import marks
from palimpsest.audit.exam import Exam, Sitting, Sizes, exam
from palimpsest.core.errors import InputError
from palimpsest.core.methods import config_of, info_of, method
from palimpsest.core.records import Evidence, Measurement

if TYPE_CHECKING:
    from palimpsest.data.request import ForgetRequest
    from palimpsest.models.lm import LM

Unlearner = Callable[["LM", "ForgetRequest"], "LM"]


@dataclass(frozen=True)
class Course:
    """Several requests, and how the model fared with them.

    Entry 0 of each curve is the model before any request.  "rows" counts the rows forgotten so far, "knowledge" and
    "verbatim" are of these rows (entry 0: of the whole forget set), "utility" is of the utility set.
    """

    measurement: Measurement  # utility before the first and after the last request
    curves: dict[str, list[float]]


@method(verb="audit", paper="muse")
@dataclass(frozen=True, kw_only=True)
class Muse(Sizes):
    """Six-way evaluation: verbatim and knowledge memorisation, privacy, utility, scalability, sustainability."""

    folds: int = 4  # requests of C5 and C6
    examples: int = 4  # generations of each kind that are kept to be shown

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.folds < 1 or self.examples < 0:
            raise InputError(f"folds must be at least 1 and examples 0, not {self.folds} and {self.examples}")

    def __call__(
        self,
        before: LM,
        after: LM,
        request: ForgetRequest,
        reference: LM | None = None,
        *,
        method: dict[str, Any] | None = None,
        unlearner: Unlearner | None = None,
    ) -> Evidence:
        """Ask all models and return the evidence.

        `method` describes what made `after` (name, paper, config).  With `unlearner` C5 and C6 are measured too, which
        runs it 2 x `folds` times.  `InputError` if the models read different tokens.
        """
        began = time.monotonic()
        models = {"before": before, "after": after, **({} if reference is None else {"reference": reference})}
        _refuse_other_tokens(models)
        asked = self.exam(before, request)
        sittings = {name: Sitting(asked, lm) for name, lm in models.items()}
        measurements = [
            marks.verbatim(sittings, "verbatim", "forget"),
            marks.knowledge(sittings, "knowledge", "forget"),
            marks.gibberish(sittings, "gibberish", "forget"),
            marks.leakage(sittings, self.statistic_name, seed=self.seed),
            marks.knowledge(sittings, "utility", "utility"),
            marks.gibberish(sittings, "utility_gibberish", "utility"),
            marks.knowledge(sittings, "retain_knowledge", "retain"),
            marks.surprise(sittings, "forget_nll", "forget"),
            marks.surprise(sittings, "utility_nll", "utility"),
        ]
        if "utility" not in asked.questions and "utility" in asked.recitals:  # what can be said of texts alone
            measurements.append(marks.verbatim(sittings, "utility_verbatim", "utility"))
        courses = {}
        for name, run in (("scalability", self.scalability), ("sustainability", self.sustainability)):
            if unlearner is None:
                measurements.append(marks.unmeasured(name, "utility", "higher"))
            else:
                courses[name] = run(unlearner, before, request, reference=reference)
                measurements.append(courses[name].measurement)
        info = info_of(self)
        return Evidence(
            kind="forget",
            measurements=tuple(measurements),
            method=method or {},
            model={name: _description(sitting) for name, sitting in sittings.items()},
            data=request.describe(),
            seconds=time.monotonic() - began,
            extras={
                "audit": {"name": info.name, "paper": info.paper, "config": config_of(self)},
                "asked": asked.style.words + (f": {asked.style.why}" if asked.style.why else ""),
                "examples": self._examples(sittings),
                "membership": marks.attack_aucs(sittings),
                "requests": {name: course.curves for name, course in courses.items()},
            },
        )

    def exam(self, before: LM, request: ForgetRequest) -> Exam:
        """What this audit asks about a request; made once, it serves any number of models (`knowledge`, `verbatim`)."""
        return exam(self, before, request)

    def knowledge(self, asked: Exam, lm: LM, name: str = "forget", *, keep: bool = True) -> np.ndarray:
        """(N,) how well a model answers a set's questions (C2, C4), 0 to 100.  `keep`: write it to the cache."""
        return marks.answer_scores(Sitting(asked, lm, keep), name)

    def verbatim(self, asked: Exam, lm: LM, name: str = "forget", *, keep: bool = True) -> np.ndarray:
        """(N,) how well a model recites a set's documents (C1), 0 to 100."""
        return marks.recital_scores(Sitting(asked, lm, keep), name)

    def scalability(
        self,
        unlearner: Unlearner,
        lm: LM,
        request: ForgetRequest,
        folds: int | None = None,
        *,
        reference: LM | None = None,
    ) -> Course:
        """C5: forget sets of growing size, each holding the one before, each forgotten from `lm` itself."""
        nested = request.folds(folds or self.folds, nested=True, seed=self.seed)
        steps = ((lambda _, part=part: unlearner(lm, part)) for part in nested)
        return self._course("scalability", lm, request, nested, steps, reference)

    def sustainability(
        self,
        unlearner: Unlearner,
        lm: LM,
        request: ForgetRequest,
        folds: int | None = None,
        *,
        reference: LM | None = None,
    ) -> Course:
        """C6: disjoint forget sets one after the other, each forgotten from the model that the last one left behind.

        A method with a reference (NPO, KL) thereby takes the start of each request for it, as it must.
        """
        number = folds or self.folds
        disjoint = request.folds(number, nested=False, seed=self.seed)
        steps = ((lambda current, part=part: unlearner(current, part)) for part in disjoint)
        return self._course(
            "sustainability", lm, request, request.folds(number, nested=True, seed=self.seed), steps, reference
        )

    def _course(
        self,
        name: str,
        lm: LM,
        request: ForgetRequest,
        so_far: Sequence[ForgetRequest],
        steps: Any,
        reference: LM | None,
    ) -> Course:
        """Take each step in turn; after it, ask about `so_far`, all that was to be forgotten up to there."""
        whole = self.exam(lm, request)
        if "utility" not in whole.questions:
            blank = marks.unmeasured(name, "utility", "higher")
            return Course(replace(blank, note=marks.NEEDS["utility"]), {})
        curves = {"rows": [0.0], **{curve: [value] for curve, value in _point(Sitting(whole, lm)).items()}}
        current = lm
        for step, forgotten in zip(steps, so_far, strict=True):
            current = step(current)
            curves["rows"].append(float(len(forgotten.forget)))
            for curve, value in _point(Sitting(whole.about(lm, forgotten), current)).items():
                curves[curve].append(value)
        models = {"before": lm, "after": current, **({} if reference is None else {"reference": reference})}
        sittings = {model: Sitting(whole, one) for model, one in models.items()}
        told = ", ".join(f"{value:.1f}" for value in curves["utility"])
        note = f"utility before and after each of {len(so_far)} requests: {told}"
        return Course(replace(marks.knowledge(sittings, name, "utility"), note=note), curves)

    def _examples(self, sittings: dict[str, Sitting]) -> list[dict[str, Any]]:
        """A handful of generations side by side, of questions and of documents."""
        asked = sittings["before"].exam
        shown = []
        for name in ("forget", "utility"):
            if name in asked.questions:
                questions = asked.questions[name]
                said = {model: sitting.answers(name) for model, sitting in sittings.items()}
                shown += self._side_by_side(name, questions.shown, questions.truths, said)
            if name in asked.recitals and (name == "forget" or name not in asked.questions):
                beginnings, truths = sittings["before"].beginnings(name), sittings["before"].truths(name)
                said = {model: sitting.recital(name) for model, sitting in sittings.items()}
                shown += self._side_by_side(name, beginnings, truths, said)
        return shown

    def _side_by_side(
        self, name: str, prompts: Sequence[str], truths: Sequence[str], said: dict[str, list[str]]
    ) -> list[dict[str, Any]]:
        spread = np.linspace(0, len(truths) - 1, min(self.examples, len(truths))).round().astype(int)
        return [
            {
                "set": name,
                "prompt": prompts[row],
                "truth": truths[row],
                **{model: said[model][row] if model in said else None for model in marks.MODELS},
            }
            for row in spread.tolist()
        ]


def _point(sitting: Sitting) -> dict[str, float]:
    """One point of a course's curves."""
    found = {"utility": marks.answer_scores(sitting, "utility")}
    if "forget" in sitting.exam.questions:
        found["knowledge"] = marks.answer_scores(sitting, "forget")
    if "forget" in sitting.exam.recitals:
        found["verbatim"] = marks.recital_scores(sitting, "forget")
    return {curve: float(values.mean()) for curve, values in found.items()}


def _description(sitting: Sitting) -> dict[str, Any]:
    from palimpsest.models.guard import name_of

    lm = sitting.lm
    guard = {} if lm.guard is None else {"guard": name_of(lm.guard)}
    return {"source": lm.source, "sha256": sitting.sha256, **guard}


def _refuse_other_tokens(models: dict[str, LM]) -> None:
    words = models["before"].tokenizer.get_vocab()
    for name, lm in models.items():
        if lm.tokenizer.get_vocab() != words:
            raise InputError(f"before and {name} have different vocabularies: they cannot sit the same exam")
