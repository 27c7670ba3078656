"""One method tried on the material: its learning rate, its stopping point, its model, its evidence.

Every method gets the same budget and the same care: the learning rate is chosen, from the same number of values, on a
*practice* request cut from the retain set, never on the records that will be judged; training stops at the first look
at which forgetting has reached the reference (MUSE's stopping rule; sheet `muse`, step 6).
"""

from __future__ import annotations

import dataclasses
import json
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from palimpsest.core import cache
from palimpsest.core.errors import TrainingDiverged
from palimpsest.core.files import write_json
from palimpsest.core.methods import MethodInfo, config_of
from palimpsest.core.records import Evidence
from palimpsest.core.seeds import numpy_rng
from palimpsest.core.watch import Until, Watch
from palimpsest.models.kept import kept

if TYPE_CHECKING:
    from torch import nn

    from palimpsest.data.request import ForgetRequest
    from palimpsest.jobs.material import Material
    from palimpsest.models.lm import LM

RATES = (1.0, 10.0, 100.0)  # multiples of the method's own learning rate that are tried in practice
_LOOK_EVERY = 5  # steps between two looks at how much is forgotten
_LOOK_ROWS = 64


@dataclass(frozen=True)
class Attempt:
    info: MethodInfo
    method: Any
    lm: LM
    evidence: Evidence
    seconds: float  # of the method alone
    steps: int


def attempt(info: MethodInfo, overrides: dict[str, Any], material: Material, *, progress: bool = True) -> Attempt:
    """Run one method on the material and audit the result.  Finished work is taken from the cache."""
    from palimpsest.audit.muse import Muse

    fields = {field.name for field in dataclasses.fields(info.cls)}
    method = info(**{name: value for name, value in overrides.items() if name in fields})
    level = forgotten_level(material)
    if "lr" in fields and "lr" not in overrides and material.made_here:
        method = replace(method, lr=best_rate(method, material, level))
    began = time.monotonic()
    watch = Watch(progress=progress)
    key = [material.before.sha256, material.request.describe(), info.name, config_of(method), level]
    lm = kept(
        "unlearned",
        key,
        lambda folder: method(
            material.before,
            material.request,
            watch=replace(watch, checkpoint=folder, until=until_forgotten(material.before, material.request, level)),
        ),
    )
    seconds = time.monotonic() - began
    trace = watch.traces.get("forget")
    described = {"name": info.name, "paper": info.paper, "config": config_of(method)}
    evidence = Muse()(material.before, lm, material.request, material.reference, method=described)
    curves = {name: trace.losses for name, trace in watch.traces.items()}
    evidence = replace(evidence, seconds=seconds, extras={**evidence.extras, "curves": curves})
    return Attempt(info, method, lm, evidence, seconds, trace.steps if trace else 0)


def forgotten_level(material: Material) -> float | None:
    """The loss a token at which the forget records count as forgotten, in nats.

    The reference's loss on them; without a reference, the starting model's loss on the holdout; without either, None.
    """
    if material.reference is not None:
        return float(np.nanmean(material.reference.nll(material.request.forget)))
    if material.request.holdout is not None:
        return float(np.nanmean(material.before.nll(material.request.holdout)))
    return None


def until_forgotten(lm: LM, request: ForgetRequest, level: float | None) -> Until | None:
    """A stop rule: the mean loss a token on (a seeded sample of) the forget records has reached `level`."""
    if level is None:
        return None
    rows = numpy_rng(0, "look").permutation(len(request.forget))[:_LOOK_ROWS]
    encoded = lm.encode(request.forget.select(sorted(rows)))

    def until(step: int, model: nn.Module) -> bool:
        if step % _LOOK_EVERY:
            return False
        training = model.training
        looked = replace(lm, model=model.eval(), guard=None)
        reached = float(np.nanmean(looked.nll(encoded))) >= level
        model.train(training)
        return reached

    return until


def best_rate(method: Any, material: Material, level: float | None) -> float:
    """The learning rate, of `RATES` times the method's own, that serves best on a practice request.

    Among those that reach the level, the one after which the utility records are least surprising; if none reaches it,
    the one that came nearest.  The practice request forgets records of the retain set, as many as are really to go.
    """
    if level is None or material.request.retain is None:
        return method.lr
    key = [material.before.sha256, material.request.describe(), type(method).__name__, config_of(method), level, RATES]

    def build(folder: Path) -> None:
        practice = practice_request(material.request, method.seed)
        scores = [_score(replace(method, lr=method.lr * rate), material.before, practice, level) for rate in RATES]
        write_json(folder / "rate.json", {"lr": method.lr * RATES[int(np.argmax(scores))]})

    return cache.cached("rates", key, build, lambda folder: json.loads((folder / "rate.json").read_text())["lr"])


def practice_request(request: ForgetRequest, seed: int) -> ForgetRequest:
    """Another request of about the same size, cut from the retain set by groups of rows that belong together."""
    assert request.retain is not None
    folds = max(2, round(len(request.retain) / len(request.forget)))
    everything = replace(request, forget=request.retain, retain=None, train=None)
    part = everything.folds(folds, nested=False, seed=seed)[0].forget
    rest = replace(request, forget=part, retain=None, train=None).without_forget(request.retain)
    return replace(request, forget=part, retain=rest, train=None, name=f"{request.name}-practice")


def _score(method: Any, lm: LM, practice: ForgetRequest, level: float) -> float:
    """How well a learning rate served: minus the loss on the utility records, minus 1000 a nat missing to the level."""
    try:
        after = method(lm, practice, watch=Watch(progress=False, until=until_forgotten(lm, practice, level)))
    except TrainingDiverged:
        return -np.inf
    useful = float(np.nanmean(after.nll(practice.utility or practice.retain)))  # type: ignore[arg-type]
    missing = max(0.0, 0.9 * level - float(np.nanmean(after.nll(practice.forget))))
    return -useful - 1000 * missing
