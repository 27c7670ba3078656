"""The survey's picture of its classes: anti-objectives destroy, a retain term and a bounded push save, merging costs.

A world of 120 fictional people, asked about in questions alone, is learned by a small Llama; a tenth of the people
must go.  Unlearners of the survey's three classes get the same steps and batches, a learning rate chosen by one rule on
other worlds (`choose_rates`), and stop at the first look at which four-way accuracy on the forget set is at most ten
points above chance.  Then ascent, gradient difference and NPO go on without a stop, at one learning rate and without
clipping.

Utility is the harmonic mean of accuracy on the retained people, accuracy on people and things that no unlearner saw,
and how far the perplexity of the latter's answers has stayed; `kept` is its share of what it was before.  Accuracy is
asked in phrasings held out from training.

The negative control takes the knowledge out of the retain term and leaves its likelihood, its budget and its texts: the
answers of the retain set are permuted among the questions of one attribute.  If utility were kept by that too, it would
not be the retained knowledge that keeps it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from palimpsest.audit.answers import forget_quality, model_utility, multiple_choice, truth_ratio
from palimpsest.claims import Expect, claim
from palimpsest.core.seeds import numpy_rng
from palimpsest.core.watch import Watch
from palimpsest.data.records import concat
from palimpsest.data.request import ForgetRequest
from palimpsest.data.world import OPTIONS, World
from palimpsest.forget.ascent import FinetuneRetain, GradDiff, GradientAscent
from palimpsest.forget.in_context import InContext
from palimpsest.forget.merge import TaskVector
from palimpsest.forget.preference import NPO
from palimpsest.models.kept import trained
from palimpsest.models.lm import LM
from palimpsest.models.train import Recipe

if TYPE_CHECKING:
    from datasets import Dataset
    from torch import nn

STEPS, LONG = 60, 240  # of each unlearner to its stop, and of those that go on
BATCH = 32
LOOK = 5  # steps between two looks at the forget set
FORGOTTEN = 1 / OPTIONS + 0.10  # accuracy at which the forget set counts as forgotten

UNLEARNERS: Mapping[str, Callable[..., Any]] = {
    "ga": GradientAscent,
    "npo": lambda **budget: NPO(retain_loss="none", **budget),
    "grad_diff": GradDiff,
    "npo_retain": NPO,
    "task_vector": lambda **budget: TaskVector(scale=10.0, scales_tried=20, **budget),
    "finetune": FinetuneRetain,  # what forgets by itself when training goes on
}
RATES = (1e-4, 3e-4, 1e-3, 3e-3)  # tried for every unlearner
CHOSEN = {**dict.fromkeys(UNLEARNERS, 3e-4), "task_vector": 1e-4, "finetune": 3e-3}  # by choose_rates()


@claim(
    paper="knowledge_unlearning",
    statement=(
        "Gradient ascent alone destroys the model; a retain term keeps its utility at equal forgetting; NPO drifts "
        "more slowly than ascent; merging forgets in one edit at a higher price; in-context forgetting leaves the "
        "weights' knowledge where it is."
    ),
    paper_says={
        "TOFU forget10 (reproduction), utility: before, GA, GradDiff, NPO with retain": "0.63, 0, 0.58, 0.54",
        "TOFU forget10 (reproduction), forget quality: GradDiff, NPO with retain": "1.8e-229, 0.42",
        "MUSE-Books (reproduction), knowledge retained: retrained, GA, GradDiff, NPO": "0.69, 0, 0.30, 0.55",
        "the survey itself": "a taxonomy without numbers of its own",
    },
    expectations=(  # fixed before anything was tuned
        Expect("kept_long_ga", at_most=0.25),
        Expect("kept_long_grad_diff", minus="kept_long_ga", at_least=0.2),
        Expect("kept_long_npo", minus="kept_long_ga", at_least=0.05),
        Expect("drift_ratio", at_most=0.5),  # slope of NPO's drift over that of ascent's
        Expect("kept_regularised", minus="kept_ga", at_least=0.2),  # at equal forgetting
        Expect("quality_npo_retain", minus="quality_grad_diff", at_least=0.0),  # log10 of the forget quality
        Expect("forget_before", minus="forget_task_vector", at_least=0.2),
        Expect("cost_task_vector", minus="cost_npo_retain", at_least=0.0),  # utility lost a point of accuracy forgotten
        Expect("probe_in_context", at_most=1e-6),  # change of the forget set's NLL without the prompt
    ),
    minutes=3,
    data="generated: 120 fictional people and 48 things, asked about in four phrasings",
    note=(
        "forget_* is four-way accuracy on the forget set (chance 0.25), kept_* utility as a share of that before, "
        "kept_regularised the mean of gradient difference and NPO with a retain term, quality_* log10 of the p-value "
        "of TOFU's forget quality. Where it fails at this scale: after 240 steps NPO without a retain term is as "
        "useless as ascent (it drifts about a third as fast, but AdamW takes full steps on a fading gradient), and a "
        "task vector costs less utility than NPO with a retain term at equal forgetting."
    ),
)
def measure(seed: int, mechanism: bool = True, scale: float = 1.0) -> dict[str, float]:
    stage = _Stage.set_up(seed, scale)
    request = stage.request if mechanism else stage.without_knowledge()
    models = {name: stage.unlearned(name, rate, request) for name, rate in CHOSEN.items()}
    values = {"forget_before": stage.accuracy(stage.before), "forget_reference": stage.accuracy(stage.reference)}
    for name, lm in models.items():
        values[f"forget_{name}"] = stage.accuracy(lm)
        values[f"kept_{name}"] = stage.kept(lm)
        values[f"quality_{name}"] = stage.quality(lm)
        forgotten = max(values["forget_before"] - values[f"forget_{name}"], 0.01)
        values[f"cost_{name}"] = (1 - values[f"kept_{name}"]) / forgotten
    values["kept_regularised"] = (values["kept_grad_diff"] + values["kept_npo_retain"]) / 2

    drifts = {name: stage.drift(name, CHOSEN["ga"], request) for name in ("ga", "npo", "grad_diff")}
    for name, (slope, lm) in drifts.items():
        values[f"slope_{name}"] = slope
        values[f"kept_long_{name}"] = stage.kept(lm)
    values["drift_ratio"] = values["slope_npo"] / values["slope_ga"]

    guarded = InContext(seed=seed)(stage.before, request)
    values["forget_in_context"] = stage.accuracy(guarded)
    bare = guarded.with_guard(None)
    values["probe_in_context"] = float(np.abs(bare.nll(request.forget) - stage.before.nll(request.forget)).max())
    return values


def choose_rates(seeds: Sequence[int] = (100, 101), scale: float = 1.0) -> dict[str, float]:
    """The learning rate of each unlearner, of `RATES`: how `CHOSEN` was found, on worlds that the claim never sees.

    Of the rates at which the forget set counts as forgotten at every seed, the one that keeps most utility on average;
    if there is none, the one that forgets most.
    """
    stages = [_Stage.set_up(seed, scale) for seed in seeds]
    chosen = {}
    for name in UNLEARNERS:
        found = {}
        for rate in RATES:
            models = [(stage, stage.unlearned(name, rate, stage.request)) for stage in stages]
            left = max(stage.accuracy(lm) for stage, lm in models)
            found[rate] = (min(-left, -FORGOTTEN), float(np.mean([stage.kept(lm) for stage, lm in models])))
        chosen[name] = max(found, key=lambda rate: found[rate])
    return chosen


@dataclass(frozen=True)
class _Stage:
    """The models and the questions of one seed."""

    seed: int
    scale: float
    request: ForgetRequest
    asked: Mapping[str, Dataset]  # questions in phrasings held out from training
    before: LM
    reference: LM

    @staticmethod
    def set_up(seed: int, scale: float) -> _Stage:
        people = max(30, round(120 * scale))
        world = World(people=people, seed=seed, forget=0.1, utility=0.2, holdout=0.1, facts=max(8, round(48 * scale)))
        told = {split: world.questions(split, "trained") for split in ("forget", "retain", "utility", "holdout")}
        train = concat(told["forget"], told["retain"], told["utility"])
        request = ForgetRequest(told["forget"], told["retain"], train=train, name="toy-TOFU")
        start = LM.build(concat(train, told["holdout"]), "llama-tiny", vocab_size=512, max_length=128, seed=seed)
        recipe = Recipe(steps=max(60, round(300 * scale)), lr=6e-3, batch_size=64, seed=seed)
        before = trained(start, train, recipe, progress=False)
        reference = trained(start, request.without_forget(), recipe, progress=False)
        asked = {split: world.questions(split, "held-out") for split in ("forget", "retain", "utility")}
        asked["retain"] = asked["retain"].select(
            range(0, len(asked["retain"]), 3)
        )  # enough to tell, at a third the time
        return _Stage(seed, scale, request, asked, before, reference)

    def without_knowledge(self) -> ForgetRequest:
        """The control's request: every retain question has another's answer, of the same attribute."""
        retain = self.request.retain
        assert retain is not None
        answers = np.array(retain["completion"], dtype=object)
        attributes = np.array(retain["attribute"])
        for attribute in np.unique(attributes):
            places = np.flatnonzero(attributes == attribute)
            answers[places] = numpy_rng(self.seed, "permuted", attribute).permutation(answers[places])
        columns = {"prompt": retain["prompt"], "completion": answers.tolist()}
        return replace(self.request, retain=type(retain).from_dict(columns), train=None)

    def steps(self, steps: int) -> int:
        return max(LOOK, round(steps * self.scale))

    def unlearned(self, name: str, rate: float, request: ForgetRequest) -> LM:
        """The model at the first look at which the forget set counts as forgotten, or after all steps."""

        def until(step: int, model: nn.Module) -> bool:
            return step % LOOK == 0 and self.accuracy(self.before.with_model(model)) <= FORGOTTEN

        method = UNLEARNERS[name](steps=self.steps(STEPS), lr=rate, batch_size=BATCH, warmup_epochs=0.0, seed=self.seed)
        return method(self.before, request, watch=Watch(until=until, progress=False))

    def drift(self, name: str, rate: float, request: ForgetRequest) -> tuple[float, LM]:
        """Nats a step by which the log-probability of the forget answers falls after `STEPS`; the model after `LONG`.

        The slope is the least-squares line's through mean log(pi / ref) of a row.
        """
        steps, long = self.steps(STEPS), self.steps(LONG)
        seen: dict[int, float] = {}
        start = self._logprobs(self.before)

        def look(step: int, model: nn.Module) -> bool:
            if step >= steps and step % max(1, steps // 4) == 0:
                now = self._logprobs(self.before.with_model(model))
                seen[step] = float(np.mean(start - now))
            return False

        budget = {"steps": long, "lr": rate, "batch_size": BATCH, "warmup_epochs": 0.0, "clip": None, "seed": self.seed}
        lm = UNLEARNERS[name](**budget)(self.before, request, watch=Watch(until=look, progress=False))
        slope, _ = np.polyfit(list(seen), list(seen.values()), 1)
        return float(slope), lm

    def accuracy(self, lm: LM, split: str = "forget") -> float:
        """Four-way accuracy by the options' log-probabilities."""
        table = self.asked[split]
        prompts, options, right = _choices(table)
        return float(multiple_choice(lm, prompts, options, right).mean())

    def kept(self, lm: LM) -> float:
        """Utility as a share of what it was before."""
        return self._utility(lm) / self._utility(self.before)

    def quality(self, lm: LM) -> float:
        """log10 of TOFU's forget quality, not below -300."""
        p = forget_quality(self._truth_ratios(lm).tolist(), self._truth_ratios(self.reference).tolist())
        return float(np.log10(max(p, 1e-300)))

    def _utility(self, lm: LM) -> float:
        lost = lm.nll(self.asked["utility"]).mean() - self.before.nll(self.asked["utility"]).mean()
        stayed = float(np.exp(-max(0.0, lost)))  # the ratio of perplexities
        return model_utility([self.accuracy(lm, "retain"), self.accuracy(lm, "utility"), stayed])

    def _truth_ratios(self, lm: LM) -> np.ndarray:
        prompts, options, right = _choices(self.asked["forget"])
        pairs = [[(prompt, option) for option in row] for prompt, row in zip(prompts, options, strict=True)]
        true = [row[place] for row, place in zip(pairs, right, strict=True)]
        wrong = [[pair for n, pair in enumerate(row) if n != place] for row, place in zip(pairs, right, strict=True)]
        return truth_ratio(lm, true, wrong)

    def _logprobs(self, lm: LM) -> np.ndarray:
        return np.array([row.sum(dtype=np.float64) for row in lm.token_logprobs(self.request.forget)])


def _choices(table: Dataset) -> tuple[list[str], list[list[str]], list[int]]:
    """Prompts, options as completions, and the place of the right one."""
    options = [[f" {option}" for option in row] for row in table["options"]]
    right = [row.index(answer) for row, answer in zip(table["options"], table["completion"], strict=True)]
    return list(table["prompt"]), options, right
