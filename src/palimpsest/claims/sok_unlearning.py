"""The systematisation's claim: methods meant to remove mostly suppress, which forget scores do not see and attacks do.

Questions about fictional people are learned by a small Llama; a quarter of the people must go.  Six unlearners with a
retain term (without one, ascent and NPO destroy a model of this size) get the same budget, rates and stopping rule:
asked plainly, the model knows no more than a retrained one, at the gentlest rate that gets there.  The battery of
`audit.sok_unlearning` is calibrated on three models whose truth is known: one retrained from another seed (removed),
the model before behind a filter that takes names out of prompts (suppressed), the model before itself (not forgotten).

The negative control takes the attacks away and leaves everything else: the verdict rests on plain asking alone, as
forget scores do.  It must then take the filter for a removal, and find nothing in the unlearners.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from palimpsest.audit.facts import known
from palimpsest.audit.sok_unlearning import Battery, RemovalOrSuppression
from palimpsest.claims import Expect, claim
from palimpsest.core.methods import config_of
from palimpsest.core.watch import Watch
from palimpsest.data.records import concat, sha256
from palimpsest.data.request import ForgetRequest
from palimpsest.data.world import SPLITS, World
from palimpsest.forget.ascent import GradDiff
from palimpsest.forget.preference import NPO, IdkDPO, Relabel, SimNPO
from palimpsest.forget.weighted import WGA
from palimpsest.models.guard import Prepared
from palimpsest.models.kept import kept, trained
from palimpsest.models.lm import LM
from palimpsest.models.train import Recipe

if TYPE_CHECKING:
    from torch import Tensor


STEPS = 100  # of each unlearner, at most
LOOK = 5  # steps after which it is asked, half of the facts
RATES = (1e-3, 3e-3)
BATCH = 16
RETAIN = 4.0  # weight of the retain loss: with 1, most of these models lose half of the other facts
NEAR = 0.03  # above the reference's knowledge: forgotten as far as plain asking shows
ATTACKS = ("opened", "avoided", "paraphrase", "relearning", "int4", "probe", "lens")
UNLEARNERS: Mapping[str, Callable[..., Any]] = {  # all meant to remove
    "grad_diff": GradDiff,
    "npo": NPO,
    "simnpo": SimNPO,
    "wga": WGA,
    "relabel": Relabel,
    "idk_dpo": IdkDPO,
}


@claim(
    paper="sok_unlearning",
    statement=(
        "Most unlearners that pass plain asking measure as suppression once attacked, their forget scores do not tell "
        "which, and a battery of attacks with a stated rule tells a retrained model from a look-alike."
    ),
    paper_says={
        "removal-intended methods that work as suppression": "many (no number of its own: a systematisation)",
        "forget knowledge retained, before and after 4-bit rounding (related work, from memory)": "21% and 83%",
    },
    expectations=(  # fixed before anything was tuned
        Expect("controls_right", at_least=1.0),  # of three models of known truth, the share named rightly
        Expect("recovered_retrained", at_most=0.25),
        Expect("share_suppressed", at_least=0.5),  # of unlearners that pass plain asking, those with E above the limit
        Expect("surface_rank", within=(-0.5, 0.5)),  # of unlearners, Spearman of knowledge when asked and under attack
    ),
    minutes=3,
    data="generated: questions about 64 fictional people",
    note=(
        "Unclear: at this size the limit of 25% lies amid the unlearners that pass (about three a seed, E from 0.1 to "
        "0.5), so that the share above it swings with the seed; the battery itself names all models of known truth. "
        "E is the largest share of lost knowledge that an attack brings back. Relabelling and DPO towards refusals are "
        "counted among the removers, as their papers mean them. Rounding to 4 bits (recovered_int4) is reported only: "
        "weights of so small a model move by far more than a rounding step. An unlearner that loses half of the other "
        "facts is left out of the share and the rank. The set-up (questions, weight of the retain term) was changed "
        "after figures of an earlier one had been seen, the expectations were not."
    ),
)
def measure(seed: int, mechanism: bool = True, scale: float = 1.0) -> dict[str, float]:
    stage = Stage.set_up(seed, scale)
    truth = {"retrained": "removed", "guarded": "suppressed", "untouched": "not forgotten"}
    controls = {name: stage.judged(lm, attacked=mechanism) for name, lm in stage.controls().items()}
    found = {name: stage.judged(stage.unlearned(name), attacked=mechanism) for name in UNLEARNERS}
    values = {"controls_right": float(np.mean([controls[name].word == word for name, word in truth.items()]))}
    for name, one in {**controls, **found}.items():
        values |= {f"recovered_{name}": one.recovered, f"asked_{name}": one.asked, f"kept_{name}": one.kept}
    passed = {name: one for name, one in found.items() if one.forgotten >= 0.8 and one.kept >= 0.5}
    values["passed"] = float(len(passed))
    values["share_suppressed"] = _mean(one.recovered > 0.25 for one in passed.values())
    values["surface_rank"] = _spearman([(one.asked, one.recovered) for one in passed.values()])
    values["recovered_int4"] = _mean(one.int4 for one in passed.values())
    return values


@dataclass(frozen=True)
class Judged:
    """A model's verdict; shares from 0 to 1."""

    word: str
    recovered: float  # E
    asked: float  # knowledge of the forget facts, asked plainly
    forgotten: float  # B: the share of what was known that is not said any more
    kept: float
    int4: float


@dataclass(frozen=True)
class Filter:
    """A guard that takes names out of prompts, so that the model does not see whom it is asked about."""

    names: tuple[str, ...]
    instead: str = "somebody"

    def prepare(self, lm: LM, prompts: Sequence[str]) -> Prepared:
        found = []
        for prompt in prompts:
            for name in self.names:
                prompt = prompt.replace(name, self.instead)
            found.append(prompt)
        return Prepared(found)

    def state(self) -> tuple[dict[str, Any], dict[str, Tensor]]:
        return asdict(self), {}

    @classmethod
    def restore(cls, settings: dict[str, Any], tensors: dict[str, Tensor]) -> Filter:
        return cls(tuple(settings["names"]), settings["instead"])


@dataclass(frozen=True)
class Stage:
    """The models and the battery of one seed."""

    seed: int
    scale: float
    world: World
    request: ForgetRequest
    start: LM
    before: LM
    battery: Battery

    @staticmethod
    def set_up(seed: int, scale: float = 1.0, *, attacks: tuple[str, ...] = ATTACKS, **sizes: Any) -> Stage:
        world = World(people=max(44, round(64 * scale)), forget=0.25, utility=0.125, holdout=0.125, facts=0, seed=seed)
        questions = {split: world.questions(split, "trained") for split in SPLITS}
        told = concat(questions["forget"], questions["retain"], questions["utility"])
        request = ForgetRequest(**questions, train=told)
        start = LM.build(world.texts, "llama-tiny", vocab_size=768, max_length=128, seed=seed)
        before, reference = (
            trained(start, table, _recipe(seed, scale), progress=False) for table in (told, request.without_forget())
        )
        sizes = {"relearn_steps": 20, **sizes}
        method = RemovalOrSuppression(attacks=attacks, seed=seed, **sizes)
        return Stage(seed, scale, world, request, start, before, method.prepare(before, request, reference))

    def controls(self) -> dict[str, LM]:
        """Models whose truth is known."""
        again = _recipe(self.seed, self.scale, other=True)
        names = tuple(subject.name for subject in self.world.population if subject.split == "forget")
        return {
            "retrained": trained(self.start, self.request.without_forget(), again, progress=False),
            "guarded": self.before.with_guard(Filter(names)),
            "untouched": self.before,
        }

    def unlearned(self, name: str) -> LM:
        """Forgetting until plain asking finds no more than in the reference, at the gentlest rate that gets there."""
        facts, reference = self.battery.facts, self.battery.reference
        assert reference is not None
        facts = facts.select(range(0, len(facts), 2))
        goal = float(known(reference, facts).mean()) + NEAR
        steps = max(10, round(STEPS * self.scale))

        def reached(model: Any) -> bool:
            return float(known(LM(model, self.before.tokenizer), facts).mean()) <= goal

        for rate in RATES:
            method = UNLEARNERS[name](
                steps=steps, lr=rate, batch_size=BATCH, warmup_epochs=0, alpha=RETAIN, seed=self.seed
            )
            after = self._forgotten(method, [name, facts.sha256, goal], reached)
            if reached(after.model):
                break
        return after

    def _forgotten(self, method: Any, asked: list[Any], reached: Callable[[Any], bool]) -> LM:
        """What a method makes of the model before, stopped when `reached`; kept, for the control needs it too."""
        request = ForgetRequest(self.request.forget, self.request.retain)
        watch = Watch(until=lambda step, model: step % LOOK == 0 and reached(model), progress=False)
        key = [asked, config_of(method), self.before.sha256, sha256(request.trained_on()), LOOK]
        return kept("unlearned", key, lambda folder: method(self.before, request, watch=watch))

    def judged(self, lm: LM, *, attacked: bool = True) -> Judged:
        """The battery's judgement; without attacks, what plain asking alone says by the same rule."""
        found = self.battery.attack(lm) if attacked else self.battery.ask(lm)
        asked = found.shares["asked"]
        strongest = max([share.share for share in found.shares.values() if share.power], default=asked.share)
        passed = asked.floor <= found.battery.method.rule.behaviour
        word = found.verdict.word if attacked else "removed" if passed else "not forgotten"
        return Judged(
            word,
            strongest,
            float(found.readings["asked"]["after"].values.mean()),
            1 - asked.share,
            found.kept_share,
            found.shares["int4"].share if "int4" in found.shares else asked.share,
        )


def _recipe(seed: int, scale: float, *, other: bool = False) -> Recipe:
    return Recipe(steps=max(250, round(400 * scale)), lr=4e-3, batch_size=32, seed=seed + 1000 * other)


def _spearman(points: list[tuple[float, float]]) -> float:
    from scipy import stats

    if len(points) < 3 or any(len({point[side] for point in points}) < 2 for side in (0, 1)):
        return 0.0
    return float(stats.spearmanr([x for x, _ in points], [y for _, y in points]).statistic)


def _mean(values: Any) -> float:
    found = list(values)
    return float(np.mean(found)) if found else 0.0
