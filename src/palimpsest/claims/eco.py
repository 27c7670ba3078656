"""ECO's claim: a gate and corrupted embeddings answer like a model that was never told, and cost nothing off scope.

A world of fictional people is learned by a small Llama, and by its oracle without a fifth of them. The gate learns
from questions in the phrasings that were trained on and is tested on held-out ones. Gradient difference and NPO get
60 steps and their learning rate from a practice request (people to be retained who play the forget set), by the same
score that is compared. Refusal stands behind the same gate.

The negative control takes the corruption out (a strength of 0) and leaves the gate, the search and the baselines.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from palimpsest.claims import Expect, claim
from palimpsest.core.watch import Watch
from palimpsest.data.lexicon import PEOPLE
from palimpsest.data.records import content_hashes
from palimpsest.data.world import World
from palimpsest.forget.ascent import GradDiff
from palimpsest.forget.eco import ECO, EcoGuard, Question, right_answers
from palimpsest.forget.preference import NPO
from palimpsest.models.kept import kept, trained
from palimpsest.models.lm import LM
from palimpsest.models.train import Recipe

if TYPE_CHECKING:
    from datasets import Dataset

    from palimpsest.data.request import ForgetRequest

STEPS = 60  # of the gradient baselines
RATES = (1e-4, 3e-4, 1e-3)
WIDTHS = (64, 128)


@claim(
    paper="eco",
    statement=(
        "A gate with corrupted prompt embeddings brings forget questions to a never-taught model's level and leaves "
        "all other prompts untouched, with a strength found in a handful of looks that does not grow with the model."
    ),
    paper_says={
        "Zephyr-7B, WMDP bio / chem / cyber (before 64 / 48 / 43)": "25 / 26 / 24",
        "Zephyr-7B, MMLU (before 59)": 59.0,
        "TOFU, forget quality": "above 0.9 at unchanged utility (from memory of the tables)",
    },
    expectations=(  # fixed before anything was tuned, from the sheet
        Expect("forget_before", at_least=0.9),
        Expect("forget_eco", at_most=0.4),  # four options: chance is 0.25
        Expect("forget_eco", minus="forget_oracle", within=(-0.15, 0.1)),
        Expect("utility_before", minus="utility_eco", at_most=0.01),
        Expect("change_of_prompts_let_through", at_most=0.0),
        Expect("gap_found", at_most=0.03),  # of the share of right answers from chance, where the search ends
        Expect("looks", at_most=40),
        Expect("looks_wide", minus="looks", at_most=10),  # twice the width
        Expect("distance_refusal", minus="distance_eco", at_least=0.1),  # from the oracle's answers
        Expect("short_npo", minus="short_eco", at_least=0.05),
        Expect("short_graddiff", minus="short_eco", at_least=0.05),
    ),
    minutes=3,
    data="generated: 50 fictional people and questions about them",
    note=(
        "short_*: points above the oracle on forget questions plus points of utility lost.  distance_*: total "
        "variation between the distributions over an attribute's twelve answers and anything else.  utility: held-out "
        "questions on retained people; strangers_lost: the same lost on people the gate was not trained with.  "
        "misspelt: right answers to forget questions whose names are written small."
    ),
)
def measure(seed: int, mechanism: bool = True, scale: float = 1.0) -> dict[str, float]:
    stage = _Stage.set_up(seed, scale, WIDTHS[0])
    before = stage.before
    method = ECO(seed=seed, records=max(16, round(96 * scale)))
    corruption, search = method.search(before, stage.request.forget)
    after = replace(method, strength=corruption.strength)(before, stage.request)
    guard: Any = after.guard
    if not mechanism:
        guard = EcoGuard(tuple(replace(s, corruption=replace(s.corruption, strength=0.0)) for s in guard.scopes))
        after = before.with_guard(guard)
    wide = _Stage.set_up(seed, scale, WIDTHS[1], oracle=False)
    _, wide_search = method.search(wide.before, wide.request.forget)
    values = {f"forget_{name}": right_answers(lm, stage.forget) for name, lm in stage.models(after).items()}
    values |= {f"utility_{name}": right_answers(lm, stage.retain) for name, lm in stage.models(after).items()}
    values |= {"looks": len(search.tried), "looks_wide": len(wide_search.tried)}
    values |= {"gap_found": search.loss, "gap_found_wide": wide_search.loss}
    for name, baseline in (("npo", NPO), ("graddiff", GradDiff)):
        lm = stage.tuned(baseline)
        values |= {
            f"forget_{name}": right_answers(lm, stage.forget),
            f"utility_{name}": right_answers(lm, stage.retain),
        }
        values[f"distance_{name}"] = stage.distance(lm)
        values[f"short_{name}"] = stage.short(values[f"forget_{name}"], values[f"utility_{name}"], values)
    values["short_eco"] = stage.short(values["forget_eco"], values["utility_eco"], values)
    values["distance_eco"], values["distance_before"] = stage.distance(after), stage.distance(before)
    fires = guard.detected([question.prompt for question in stage.forget]) >= 0
    values["distance_refusal"] = stage.distance(before, refused=fires)
    values["missed"] = float(1 - fires.mean())
    values["false_alarms"] = float((guard.detected([question.prompt for question in stage.retain]) >= 0).mean())
    values["change_of_prompts_let_through"] = _change(before, after, guard, [*stage.retain, *stage.strangers])
    values["strangers_lost"] = right_answers(before, stage.strangers) - right_answers(after, stage.strangers)
    small = [replace(question, prompt=question.prompt.lower()) for question in stage.forget]
    values["misspelt"], values["misspelt_before"] = right_answers(after, small), right_answers(before, small)
    return {name: float(value) for name, value in values.items()}


@dataclass(frozen=True)
class _Stage:
    """The models and the questions of one seed."""

    seed: int
    steps: int
    world: World
    request: ForgetRequest
    before: LM
    oracle: LM

    @staticmethod
    def set_up(seed: int, scale: float, width: int, *, oracle: bool = True) -> _Stage:
        world = World(people=max(20, round(50 * scale)), facts=0, seed=seed)
        config = {"model_type": "llama", "hidden_size": width, "intermediate_size": 3 * width, "num_hidden_layers": 2}
        config |= {"num_attention_heads": 4, "tie_word_embeddings": True}
        request = _of_questions(world.request())
        assert request.train is not None
        start = LM.build(world.train, config, vocab_size=768, max_length=128, seed=seed)
        recipe = Recipe(steps=max(150, round(480 * scale)), lr=4e-3 * (64 / width), batch_size=48, seed=seed)
        before = trained(start, request.train, recipe, progress=False)
        other = trained(start, request.without_forget(), recipe, progress=False) if oracle else start
        return _Stage(seed, max(5, round(STEPS * scale)), world, request, before, other)

    @property
    def forget(self) -> list[Question]:
        return _asked(self.world.questions("forget", "held-out"))

    @property
    def retain(self) -> list[Question]:
        return _asked(self.world.questions("retain", "held-out"))

    @property
    def strangers(self) -> list[Question]:
        return _asked(self.world.questions("utility", "held-out"))

    def models(self, after: LM) -> dict[str, LM]:
        return {"before": self.before, "eco": after, "oracle": self.oracle}

    def short(self, forget: float, utility: float, values: dict[str, float]) -> float:
        return max(forget - values["forget_oracle"], 0.0) + max(values["utility_before"] - utility, 0.0)

    def tuned(self, baseline: Callable[..., Any]) -> LM:
        """The baseline on the request, at the rate that falls least short on the practice request."""
        key = [self.before.sha256, self.oracle.sha256, baseline.__name__, self.steps, RATES, self.seed]
        return kept("claim-eco", key, lambda folder: self._tuned(baseline))

    def _tuned(self, baseline: Callable[..., Any]) -> LM:
        quiet = Watch(progress=False)
        budget = {"steps": self.steps, "batch_size": 32, "seed": self.seed}
        practice = self._practice()
        forget = _asked(_questions(practice.forget))
        retain = _asked(_questions(practice.retain))
        chance = right_answers(self.oracle, self.forget)
        losses = []
        for rate in RATES:
            lm = baseline(lr=rate, **budget)(self.before, practice, watch=quiet)
            losses.append(max(right_answers(lm, forget) - chance, 0.0) + 1 - right_answers(lm, retain))
        return baseline(lr=RATES[int(np.argmin(losses))], **budget)(self.before, self.request, watch=quiet)

    def _practice(self) -> ForgetRequest:
        retain = self.request.retain
        assert retain is not None
        whole = replace(self.request, forget=retain, retain=None, train=None)
        part = whole.folds(3, nested=False, seed=self.seed)[0].forget
        gone = set(content_hashes(part))
        rest = retain.select([row for row, content in enumerate(content_hashes(retain)) if content not in gone])
        return replace(self.request, forget=part, retain=rest, train=None)

    def distance(self, lm: LM, refused: np.ndarray | None = None) -> float:
        """Mean total variation from the oracle's answers to the forget questions; a refused one says none of them."""
        own, oracle = self._answers(lm), self._answers(self.oracle)
        if refused is not None:
            own[refused] = [0.0] * (own.shape[1] - 1) + [1.0]
        return float(np.abs(own - oracle).sum(1).mean() / 2)

    def _answers(self, lm: LM) -> np.ndarray:
        """(questions, 13): the probability of each of the attribute's twelve answers, and of anything else."""
        table = self.world.questions("forget", "held-out")
        pools = {attribute.name: attribute.values for attribute in PEOPLE}
        pairs = [(row["prompt"], f" {value}") for row in table.to_list() for value in pools[row["attribute"]]]
        sums = np.array([values.sum(dtype=np.float64) for values in lm.token_logprobs(pairs)]).reshape(len(table), -1)
        shares = np.exp(sums)
        return np.concatenate([shares, np.clip(1 - shares.sum(1, keepdims=True), 0, 1)], 1)


def _change(before: LM, after: LM, guard: EcoGuard, questions: Sequence[Question]) -> float:
    """The largest change of a token's log-probability over the questions that the gate lets through."""
    pairs = [(question.prompt, question.options[question.right]) for question in questions]
    through = guard.detected([prompt for prompt, _ in pairs]) < 0
    found = zip(before.token_logprobs(pairs), after.token_logprobs(pairs), through, strict=True)
    return max((float(np.abs(one - other).max()) for one, other, passed in found if passed), default=0.0)


def _of_questions(request: ForgetRequest) -> ForgetRequest:
    """The request without its documents: the models read and forget questions alone, in a third of the time."""
    tables = {name: _questions(getattr(request, name)) for name in ("forget", "retain", "train")}
    return replace(request, **tables)


def _questions(table: Dataset | None) -> Dataset:
    assert table is not None
    return table.select([row for row, kind in enumerate(table["kind"]) if kind == "question"])


def _asked(table: Dataset) -> list[Question]:
    return [
        Question(
            row["prompt"], tuple(f" {option}" for option in row["options"]), row["options"].index(row["completion"])
        )
        for row in table.to_list()
    ]
