"""One method tried on the material: its learning rate, its stopping point, its model, its evidence.

Every method gets the same budget and the same care: the learning rate is chosen, from the same number of values, on a
*practice* request cut from the retain set, never on the records that will be judged; training stops at the first look
at which forgetting has reached the reference (MUSE's stopping rule; sheet `muse`, step 6).
"""

from __future__ import annotations

import dataclasses
import json
import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from palimpsest.core import cache
from palimpsest.core.errors import TrainingDiverged
from palimpsest.core.files import write_json
from palimpsest.core.methods import MethodInfo, config_of
from palimpsest.core.records import Evidence
from palimpsest.core.watch import Until, Watch
from palimpsest.models.kept import kept

if TYPE_CHECKING:
    from palimpsest.data.request import ForgetRequest
    from palimpsest.jobs.material import Material
    from palimpsest.models.lm import LM

RATES = (1 / 30, 1 / 10, 1 / 3)  # shares of the rate that the model was trained with; all are tried in practice
_LOOK_EVERY = 5  # steps between two looks at how much is forgotten
_NEVER_REACHED = 1e6  # what a practice run loses by not reaching the goal


@dataclass(frozen=True)
class Attempt:
    info: MethodInfo
    method: Any
    lm: LM
    evidence: Evidence


@dataclass(frozen=True)
class Goal:
    """How little the model shall know of the forget records when training stops.

    ``memory``: the reference's own score, knowledge of the questions or recital of the documents (0 to 100).
    ``surprise``: where there is no reference, the loss a token (nats) that the starting model has on the holdout.
    """

    measure: str
    level: float

    def until(self, lm: LM, request: ForgetRequest) -> Until:
        from palimpsest.audit.muse import Muse
        from palimpsest.audit.stopping import stop_when_forgotten

        if self.measure == "memory":
            muse = Muse()
            return stop_when_forgotten(muse, lm, request, self.level, every=_LOOK_EVERY, records=muse.samples)
        forget = lm.encode(request.forget)
        return stop_when_forgotten(
            lambda looked: -float(np.nanmean(looked.nll(forget))), lm, request, -self.level, every=_LOOK_EVERY
        )


def goal(material: Material) -> Goal | None:
    """The goal that the material allows; None without a reference and without holdout records."""
    from palimpsest.audit.exam import exam
    from palimpsest.audit.muse import Muse

    muse, request = Muse(), material.request
    if material.reference is not None:
        asked = exam(muse, material.before, request)
        if "forget" in asked.questions:
            return Goal("memory", float(muse.knowledge(asked, material.reference).mean()))
        if "forget" in asked.recitals:
            return Goal("memory", float(muse.verbatim(asked, material.reference).mean()))
    if request.holdout is not None:
        return Goal("surprise", float(np.nanmean(material.before.nll(request.holdout))))
    return None


def attempt(
    info: MethodInfo, overrides: dict[str, Any], material: Material, *, folds: int = 0, progress: bool = True
) -> Attempt:
    """Run one method on the material and audit the result.  Finished work is taken from the cache.

    With `folds` the method is also run on as many growing and on as many successive parts of the request.
    """
    fields = {field.name for field in dataclasses.fields(info.cls)}
    method = info(**{name: value for name, value in overrides.items() if name in fields})
    aim = goal(material)
    if "lr" in fields and "lr" not in overrides:
        method = replace(method, lr=best_rate(info, method, material, aim))
    key = [material.before.sha256, material.request.describe(), info.name, config_of(method), _as_key(aim)]

    def make(checkpoint: Path) -> LM:
        began = time.monotonic()
        watch = Watch(
            checkpoint=checkpoint,
            progress=progress,
            until=aim.until(material.before, material.request) if aim else None,
        )
        made = method(material.before, material.request, watch=watch)
        course = {
            "seconds": time.monotonic() - began,
            "curves": {name: trace.losses for name, trace in watch.traces.items()},
            "steps": sum(trace.steps for trace in watch.traces.values()),
        }
        write_json(cache.folder("courses", key) / "course.json", course)
        return made

    lm = kept("unlearned", key, make)
    course = _course(cache.folder("courses", key) / "course.json")
    described = {"name": info.name, "paper": info.paper, "config": config_of(method), "goal": _as_key(aim)}
    evidence = examined(material, lm, method, described, folds)
    extras = {**evidence.extras, "curves": course["curves"], "cost": cost(material.before, lm, course)}
    return Attempt(info, method, lm, replace(evidence, seconds=course["seconds"], extras=extras))


def cost(before: LM, after: LM, course: Mapping[str, Any]) -> dict[str, Any]:
    """What the result took and what it is: seconds, optimiser steps of all loops, and what stands beside the weights.

    A guard's parameters are the numbers it is saved with; an encoder that it asks for by name is not among them.
    """
    changed = [
        *(["weights"] if after.weights_sha256 != before.weights_sha256 else []),
        *(["guard"] if after.guard is not None else []),
    ]
    numbers = sum(tensor.numel() for tensor in after.guard.state()[1].values()) if after.guard else 0
    return {
        "seconds": round(course["seconds"], 1),
        "steps": course.get("steps"),
        "changed": " and ".join(changed) or "nothing",
        "extra_parameters": after.num_parameters - before.num_parameters + numbers,
    }


def examined(material: Material, lm: LM, method: Any, described: dict[str, Any], folds: int = 0) -> Evidence:
    """The six-way evidence of a result; its last two ways run the method again, on `folds` parts of the request."""
    from palimpsest.audit.muse import Muse

    def unlearner(start: LM, request: ForgetRequest) -> LM:
        aim = goal(material)
        until = aim.until(material.before, request) if aim else None
        return method(start, request, watch=Watch(progress=False, until=until))

    return (Muse(folds=folds) if folds else Muse())(
        material.before,
        lm,
        material.request,
        material.reference,
        method=described,
        unlearner=unlearner if folds else None,
    )


def best_rate(info: MethodInfo, method: Any, material: Material, aim: Goal | None) -> float:
    """The learning rate, of `RATES` times the training's own, that serves best on a practice request.

    Among those that reach the goal, the one after which the utility records are least surprising; if none reaches it,
    the one after which the practice records are most surprising.
    """
    if aim is None or material.request.retain is None or material.train_lr is None:
        return method.lr
    rates = [material.train_lr * share for share in RATES]
    key = [material.before.sha256, material.request.describe(), info.name, config_of(method), _as_key(aim), rates]

    def build(folder: Path) -> None:
        practice = practice_request(material.request, method.seed)
        scores = [_score(replace(method, lr=rate), material.before, practice, aim) for rate in rates]
        write_json(folder / "rate.json", {"lr": rates[int(np.argmax(scores))]})

    return cache.cached("rates", key, build, lambda folder: json.loads((folder / "rate.json").read_text())["lr"])


def practice_request(request: ForgetRequest, seed: int) -> ForgetRequest:
    """Another request of about the same size, cut from the retain set by groups of rows that belong together."""
    assert request.retain is not None
    folds = max(2, round(len(request.retain) / len(request.forget)))
    everything = replace(request, forget=request.retain, retain=None, train=None)
    part = everything.folds(folds, nested=False, seed=seed)[0].forget
    rest = replace(request, forget=part, retain=None, train=None).without_forget(request.retain)
    return replace(request, forget=part, retain=rest, train=None, name=f"{request.name}-practice")


def _score(method: Any, lm: LM, practice: ForgetRequest, aim: Goal) -> float:
    watch = Watch(progress=False, until=aim.until(lm, practice))
    try:
        after = method(lm, practice, watch=watch)
    except TrainingDiverged:
        return -np.inf
    trace = watch.traces.get("forget")
    if trace is not None and trace.stopped != "until":
        return float(np.nanmean(after.nll(practice.forget))) - _NEVER_REACHED
    return -float(np.nanmean(after.nll(practice.utility or practice.retain)))


def _course(path: Path) -> dict[str, Any]:
    """How the making went; nothing where only the model was kept."""
    return (
        json.loads(path.read_text(encoding="utf-8")) if path.exists() else {"seconds": 0.0, "curves": {}, "steps": None}
    )


def _as_key(aim: Goal | None) -> dict[str, Any] | None:
    return None if aim is None else dataclasses.asdict(aim)
