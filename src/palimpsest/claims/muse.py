"""MUSE's claim: what passes for forgotten by recital and answers shows in privacy, utility and further requests.

A world of fictional people is learned by a small Llama; a fifth of them must go.  Seven unlearners get the same budget,
the same grid of learning rates and the paper's stopping rule: the first epoch after which knowledge of the forget set
is down to a retrained model's, at the gentlest rate that gets there.  Then MUSE's questions are put: C1 to C4 of the
whole request, C5 as utility after a quarter of it against the whole at once, C6 as utility after the first of four
successive quarters against the last.

The negative control takes approximate unlearning out and leaves the questions: every unlearned model is replaced by one
trained anew, from another seed, without the records.  If the six ways found leaks and losses there too, what they find
in unlearners would be the noise of the evaluation (two trainings that differ by their seed), and the claim empty.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from palimpsest.audit import Muse, marks, stop_when_forgotten
from palimpsest.audit.exam import Exam, Sitting
from palimpsest.claims import Expect, claim
from palimpsest.core.watch import Watch
from palimpsest.data.records import concat
from palimpsest.data.world import World
from palimpsest.forget.ascent import GradDiff, GradientAscent, KLMin
from palimpsest.forget.merge import TaskVector
from palimpsest.forget.preference import NPO
from palimpsest.models.kept import trained
from palimpsest.models.lm import LM
from palimpsest.models.train import Recipe

if TYPE_CHECKING:
    from palimpsest.data.request import ForgetRequest

STEPS = 60  # of each unlearner, at most
PASSES = 10  # over its request, at most, as in the paper
RATES = (1e-4, 3e-4, 1e-3)
BATCH = 16
FOLDS = 4
NEAR = 5.0  # points within which a score is as good as the retrained model's
QUIET = 10.0  # percent of leakage that would pass unnoticed

_UNLEARNERS: Mapping[str, Callable[..., Any]] = {
    "ga": GradientAscent,
    "ga_gdr": GradDiff,
    "ga_klr": KLMin,
    "npo": lambda **budget: NPO(retain_loss="none", **budget),
    "npo_gdr": NPO,
    "npo_klr": lambda **budget: NPO(retain_loss="kl", **budget),
    "task_vector": lambda **budget: TaskVector(scale=10.0, scales_tried=20, **budget),
}
_SUCCESSIVE = ("ga_gdr", "npo_gdr")  # also run on request after request


@claim(
    paper="muse",
    statement=(
        "Unlearners that bring recital and knowledge of the forget set down to a retrained model's miss its privacy, "
        "too low or too high, pay in utility, and pay more the larger the request and with every further one."
    ),
    paper_says={  # News, LLaMA-2-7B: the paper's main table
        "VerbMem and KnowMem of the forget set before, and retrained": "58.4 and 63.9, 20.8 and 33.1",
        "the same after GA, and after NPO+GDR": "0 and 0, 1.2 and 54.6",
        "PrivLeak before": -99.8,
        "PrivLeak after GA+GDR, NPO+GDR, GA+KLR and NPO+KLR": "108.1, 105.8, -96.1 and -95.8",
        "utility before, after GA and NPO, and after NPO+GDR": "55.2, 0 and 40.5",
        "scalability and sustainability": "utility falls with the size and with the number of requests (figures)",
    },
    expectations=(  # fixed before anything was tuned
        Expect("knowledge_before", minus="knowledge_after", at_least=30),  # C2 is cut
        Expect("verbatim_before", minus="verbatim_after", at_least=20),  # C1 is cut
        Expect("leakage_before", at_most=-80),  # the attack sees what the model before was trained on
        Expect("leakage_size", at_least=25),  # C3 is missed, one way or the other
        Expect("utility_before", minus="utility_after", at_least=10),  # C4 is paid
        Expect("utility_ga", at_most=25),
        Expect("utility_small", minus="utility_large", at_least=5),  # C5
        Expect("utility_first", minus="utility_last", at_least=5),  # C6
        Expect("standing", at_most=0.5),  # of seven unlearners, those near the retrained model in C1, C3 and C4 at once
    ),
    minutes=3,
    data="generated: 60 fictional people, their biographies, news and questions",
    note=(
        "Means over seven unlearners (GA and NPO, each plain, with retain likelihood and with retain KL; task vector); "
        "leakage_size is their median absolute leakage in percent. C5 and C6: GA and NPO, both with retain likelihood."
    ),
)
def measure(seed: int, mechanism: bool = True, scale: float = 1.0) -> dict[str, float]:
    stage = _Stage.set_up(seed, scale)
    if mechanism:
        whole = {name: stage.unlearned(name, stage.before, stage.request) for name in _UNLEARNERS}
        courses = [stage.course(name) for name in _SUCCESSIVE]
    else:
        whole = dict.fromkeys(_UNLEARNERS, stage.retrained(stage.request))
        courses = [[stage.retrained(stage.folds[0]), stage.retrained(stage.request)]]
    scores = {name: stage.scores(lm) for name, lm in whole.items()}
    before, reference = stage.scores(stage.before), stage.scores(stage.reference)
    values = {f"{what}_before": value for what, value in before.items()}
    values |= {f"{what}_reference": value for what, value in reference.items()}
    values |= {f"{what}_{name}": value for name, found in scores.items() for what, value in found.items()}
    values |= {f"{what}_after": _mean(found[what] for found in scores.values()) for what in before}
    values["leakage_size"] = float(np.median([abs(found["leakage"]) for found in scores.values()]))
    values["standing"] = float(sum(_stands(found, reference) for found in scores.values()))
    values["reached"] = _mean(found["knowledge"] <= reference["knowledge"] for found in scores.values())
    utility = [[stage.utility(lm) for lm in course] for course in courses]
    values["utility_first"] = values["utility_small"] = _mean(course[0] for course in utility)
    values["utility_last"] = _mean(course[-1] for course in utility)
    values["utility_large"] = _mean(scores[name]["utility"] for name in _SUCCESSIVE)
    return values


@dataclass(frozen=True)
class _Stage:
    """The models and the questions of one seed."""

    seed: int
    scale: float
    start: LM
    world: World
    request: ForgetRequest
    folds: list[ForgetRequest]
    muse: Muse
    before: LM
    reference: LM
    asked: Exam

    @staticmethod
    def set_up(seed: int, scale: float) -> _Stage:
        world = World(people=max(20, round(60 * scale)), facts=0, seed=seed)
        read = concat(world.train, world.documents("holdout"))  # names in unfamiliar tokens would give the holdout away
        start = LM.build(read, "llama-tiny", vocab_size=768, max_length=128, seed=seed)
        request = world.request()
        muse = Muse(demonstrations=0, seed=seed, samples=max(16, round(100 * scale)))
        folds = request.folds(FOLDS, nested=False, seed=seed)
        stage = _Stage(seed, scale, start, world, request, folds, muse, start, start, muse.exam(start, request))
        return replace(stage, before=stage.trained(None, seed), reference=stage.trained(request, seed))

    def trained(self, without: ForgetRequest | None, seed: int) -> LM:
        """The model trained on all rows, or on those that `without` need not forget; documents are read three times."""
        documents = [self.world.documents(split) for split in ("forget", "retain", "utility")]
        table = concat(self.world.train, *documents, *documents)
        if without is not None:
            table = without.without_forget(table)
        recipe = Recipe(steps=max(60, round(400 * self.scale)), lr=4e-3, batch_size=32, seed=seed)
        return trained(self.start, table, recipe, progress=False)

    def retrained(self, request: ForgetRequest) -> LM:
        """Exact unlearning from another seed."""
        return self.trained(request, self.seed + 1000)

    def unlearned(self, name: str, lm: LM, request: ForgetRequest) -> LM:
        """Forgetting by the stopping rule, at the gentlest rate that gets there; at the strongest if none does."""
        epoch = -(-len(request.forget) // BATCH)
        records = self.muse.samples  # all that will be asked, not only a cheap part
        until = stop_when_forgotten(self.muse, self.before, request, self.reference, every=epoch, records=records)
        for rate in RATES:
            steps = max(epoch, min(round(STEPS * self.scale), PASSES * epoch))
            method = _UNLEARNERS[name](steps=steps, lr=rate, batch_size=BATCH, warmup_epochs=0, seed=self.seed)
            after = method(lm, request, watch=Watch(until=until, progress=False))
            if until(0, after.model):
                break
        return after

    def course(self, name: str) -> list[LM]:
        """The model after each of the successive requests."""
        models: list[LM] = []
        for fold in self.folds:
            models.append(self.unlearned(name, models[-1] if models else self.before, fold))
        return models

    def scores(self, lm: LM) -> dict[str, float]:
        """C1 to C4 of the whole request."""
        models = {"before": self.before, "after": lm, "reference": self.reference}
        sittings = {name: Sitting(self.asked, model) for name, model in models.items()}
        leakage = marks.leakage(sittings, self.muse.statistic_name)
        found = {
            "verbatim": self.muse.verbatim(self.asked, lm).mean(),
            "knowledge": self.muse.knowledge(self.asked, lm).mean(),
            "leakage": leakage.after,
            "utility": self.utility(lm),
        }
        return {name: float(value) for name, value in found.items()}

    def utility(self, lm: LM) -> float:
        return float(self.muse.knowledge(self.asked, lm, "utility").mean())


def _stands(found: Mapping[str, float], reference: Mapping[str, float]) -> bool:
    near = all(abs(found[what] - reference[what]) <= NEAR for what in ("verbatim", "utility"))
    return near and abs(found["leakage"]) < QUIET


def _mean(values: Any) -> float:
    return float(np.mean(list(values)))
