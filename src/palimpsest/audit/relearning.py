"""Relearning: fine-tune a model a little and see how much of what was not shown comes back.

Facts that were only hidden return when their neighbours are taught, or even anything else; to a model that never knew
them, training on others teaches the form of an answer and no more.  So the curve of the reference, trained alike, is
subtracted by whoever reads ours.  (Sheet `sok_unlearning`, 2a; relearning attacks: Hu et al. 2024, arXiv:2406.13356.)
Shapes: P looks, N facts.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import numpy as np

from palimpsest.audit.attack import Access, Reading, Side
from palimpsest.audit.facts import Facts, known
from palimpsest.core import losses
from palimpsest.core.errors import InputError
from palimpsest.core.fit import fit
from palimpsest.core.seeds import derive, numpy_rng
from palimpsest.data.batches import Batches


@dataclass(frozen=True)
class Relearning:
    """Train on `records` and score facts that are not among them (with "same": the very same).

    "disjoint": all facts of the other half of the persons.  "few": `few` of these.  "benign": facts that were to be
    kept.  "same": the scored facts, to see how fast they come back.  The value of a fact is its mean over all looks
    after the first: a choice of the best look would flatter.
    """

    records: Literal["disjoint", "few", "benign", "same"] = "disjoint"
    looks: tuple[int, ...] = (5, 10, 20, 40)  # steps after which the model is asked
    lr: float = 1e-3  # about a third of the rate that a small model was trained with; 1e-5 for one of billions
    batch_size: int = 16
    few: int = 8

    teaches = True
    access: ClassVar[Access] = "finetune-api"

    def __post_init__(self) -> None:
        if not self.looks or min(self.looks) < 1 or list(self.looks) != sorted(set(self.looks)):
            raise InputError(f"looks must be steps in ascending order, not {self.looks}")
        if self.few < 1 or self.batch_size < 1 or not self.lr > 0:
            raise InputError("few and batch_size must be at least 1, and lr above 0")

    def __call__(self, side: Side) -> Reading:
        facts = side.facts
        curve = np.empty((len(self.looks) + 1, len(facts)))
        if self.records in ("same", "benign"):
            shown = facts if self.records == "same" else self._kept(side)
            curve[:] = self._course(side, shown, facts)
        else:
            for half in (0, 1):
                scored, rest = np.flatnonzero(facts.fold == half), np.flatnonzero(facts.fold != half)
                if self.records == "few":
                    rest = numpy_rng(side.seed, "few", half).permutation(rest)[: self.few]
                curve[:, scored] = self._course(side, facts.select(rest), facts.select(scored))
        trace = {"steps": [0, *self.looks], "known": curve.mean(1).tolist()}
        return Reading(curve[1:].mean(0), trace, curve)

    def _kept(self, side: Side) -> Facts:
        if side.kept is None:
            raise InputError("benign fine-tuning needs retain records that are questions")
        count = min(len(side.kept), max(len(side.facts) // 2, 1))
        return side.kept.select(numpy_rng(side.seed, "benign").permutation(len(side.kept))[:count])

    def _course(self, side: Side, shown: Facts, scored: Facts) -> np.ndarray:
        """(P, n): how well the scored facts are known before training on the shown ones, and at each look."""
        found = [known(side.lm, scored)]
        lm = side.lm.copy()
        lm.model.requires_grad_(True)
        encoded = lm.with_guard(None).encode(shown.pairs)

        def look(step: int, model: Any) -> bool:
            if step in self.looks:
                found.append(known(lm.with_model(model), scored))
            return False

        batches = Batches(encoded, min(self.batch_size, len(encoded)), derive(side.seed, "relearning"))
        fit(lm.model, losses.nll, batches, steps=self.looks[-1], lr=self.lr, seed=side.seed, until=look, progress="")
        return np.stack(found)


def steps_to(curve: np.ndarray, steps: np.ndarray, level: float) -> float:
    """The step at which a curve of means, (P,), first reaches `level`, between looks by a line; infinite if never."""
    above = np.flatnonzero(curve >= level)
    if len(above) == 0:
        return float("inf")
    last = int(above[0])
    if last == 0:
        return float(steps[0])
    rise = (level - curve[last - 1]) / (curve[last] - curve[last - 1])
    return float(steps[last - 1] + rise * (steps[last] - steps[last - 1]))


def savings(after: np.ndarray, reference: np.ndarray, steps: np.ndarray, level: float) -> float:
    """The share of the reference's steps that the model saves on the way to `level` (Ebbinghaus' measure of memory).

    Both curves are (P,) means over facts.  0: it learns as if anew; 1: it knows at once; below 0: it is slower than a
    model that never knew.  A curve that does not get there counts as there at its last look; NaN if both do not.
    """
    ours, theirs = (min(steps_to(curve, steps, level), float(steps[-1])) for curve in (after, reference))
    if max(after.max(), reference.max()) < level or theirs == 0:
        return float("nan")
    return 1 - ours / theirs
