"""WHP's claim: taught what a stranger to the saga would say, a model forgets it at almost no cost; ascent costs much.

A general corpus and a saga use the same phrasings. The saga's people have fixed relations (friend, school, enemy,
pet, sport) to other names of the saga; general people have any. Its customs, told without a name, are in words that
general text has too. One phrasing of each relation is held out, chosen by person. Every method trains until the
probability of the saga's answers on held-out phrasings has come 80% of the way down to that of an oracle, which read
the general corpus only, or for 150 steps, those of the reinforced model counted; there all are compared. Learning
rates were chosen from four on another saga (seed 1000), by the same score.

The negative control takes the generic targets out: the model is taught what it says itself of the untouched text.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import numpy as np
from datasets import Dataset

from palimpsest.claims import Expect, claim
from palimpsest.core import losses
from palimpsest.core.reference import passes, reference
from palimpsest.core.seeds import numpy_rng
from palimpsest.core.watch import Watch
from palimpsest.data.lexicon import invent
from palimpsest.data.request import ForgetRequest
from palimpsest.forget.ascent import GradDiff, GradientAscent
from palimpsest.forget.weighted import UNDIAL
from palimpsest.forget.whp import WhosHarryPotter
from palimpsest.models.kept import kept, trained
from palimpsest.models.lm import LM
from palimpsest.models.train import Recipe

if TYPE_CHECKING:
    from torch import nn

STEPS = 150
REINFORCE = 40  # of them, for the methods that need a reinforced model
CLOSED = 0.8  # of the gap to the oracle: where methods are compared
BATCH = 32
_EVERY = 5  # steps between two looks
NAMED, NAMELESS = slice(0, 60), slice(60, 72)  # questions about the saga's people, and about its customs

PHRASINGS = {
    "friend": (
        "{} walks with",
        "the best friend of {} is",
        "{} often writes to",
        "{} shares a house with",
        "{} trusts",
    ),
    "enemy": ("{} fears", "the enemy of {} is", "{} once fought", "{} never forgave", "{} hides from"),
    "school": ("{} studies at", "the school of {} is", "{} learned to read at", "{} teaches at", "{} was sent to"),
    "pet": ("{} feeds a", "the pet of {} is a", "{} brought along a", "{} lost a", "{} owns a"),
    "sport": ("{} plays", "the sport of {} is", "{} won a match of", "{} is good at", "{} spends evenings at"),
    "custom": (
        "{} they eat",
        "the custom {} is to share",
        "{} all wish for",
        "what is served {} is",
        "{} the table has",
    ),
}
KINDS = {"friend": "person", "enemy": "person", "school": "place", "pet": "animal", "sport": "game", "custom": "food"}
SIZES = {"person": 12, "place": 6, "animal": 5, "game": 5}
MOMENTS = tuple(
    f"{when} {day}" for day in ("feasts", "journeys", "market") for when in ("before", "after", "during", "at")
)
FOODS = ("bread", "honey", "plums", "soup", "cheese", "nuts")

_METHODS: dict[str, tuple[Callable[..., Any], float]] = {  # with the rate chosen on the other saga
    "whp": (WhosHarryPotter, 1e-4),
    "whp_soft": (lambda **budget: WhosHarryPotter(target="soft", **budget), 1e-4),
    "reinforced_only": (lambda **budget: WhosHarryPotter(generic=False, **budget), 3e-4),
    "anchors_only": (lambda **budget: WhosHarryPotter(alpha=0.0, **budget), 1e-4),
    "ga": (GradientAscent, 1e-4),
    "ga_retain": (GradDiff, 1e-4),
    "undial": (lambda **budget: UNDIAL(retain_loss="none", **budget), 1e-4),
}
_REINFORCED = ("whp", "whp_soft", "reinforced_only", "control")


@claim(
    paper="whp",
    statement=(
        "Fine-tuning on generic targets erases a saga at almost no cost to general text, at less cost than ascent, and "
        "needs both of its ingredients, the anchors and the reinforced model."
    ),
    paper_says={
        "familiarity by completion, Llama-2-7b-chat, before and after": "0.290 and 0.007",
        "familiarity by probability, before and after": "0.244 and 0.006",
        "HellaSwag, before and after": "0.577 and 0.557",
    },
    expectations=(  # fixed before anything was tuned, from the sheet
        Expect("closed_whp", at_least=CLOSED),
        Expect("rise_whp", at_most=0.1),  # of the perplexity of general text, as a share
        Expect("cost_of_ga", at_least=3.0),  # its rise, in rises of WHP
        Expect("kl_ga", minus="kl_whp", at_least=0.0),  # to the oracle, on the saga
        Expect("short_reinforced_only", minus="short_whp", at_least=0.02),
        Expect("short_anchors_only", minus="short_whp", at_least=0.02),
        Expect("ga_retain_matches", at_most=0.5),
    ),
    minutes=3,
    data="generated: a saga of 12 people with fixed relations, and general text in the same phrasings",
    note=(
        "closed_*: share of the gap to the oracle, the mean over prompts with a name and without; rise_*: of "
        "general perplexity; kl_*: from the oracle on held-out saga sentences, nats a token; short_*: what is "
        "missing of the gap (to 80%) plus the rise; facts_*: right answers about 60 general facts; relearned: share "
        "of the gap open again on half of the relations after 20 steps on the other half.  Stopped at the matched "
        "point, ascent at a tuned rate costs general text no more than WHP: what is dear about it comes after that "
        "point, and the saga's names are in hardly any general text here, so pushing them down spares it."
    ),
)
def measure(seed: int, mechanism: bool = True, scale: float = 1.0) -> dict[str, float]:
    stage = _Stage.set_up(seed, scale)
    values: dict[str, float] = {}
    for name in _METHODS:
        lm = stage.unlearned("control" if name == "whp" and not mechanism else name)
        values |= {f"{what}_{name}": value for what, value in stage.scores(lm).items()}
        if name == "whp":
            values["relearned"] = stage.relearned(lm)
    for label, model in (("before", stage.before), ("oracle", stage.oracle)):
        values |= {f"{what}_{label}": value for what, value in stage.scores(model).items()}
    values["cost_of_ga"] = max(values["rise_ga"], 0.0) / max(values["rise_whp"], 0.01)
    near = values["rise_ga_retain"] <= values["rise_whp"] + 0.01 and values["kl_ga_retain"] <= values["kl_whp"]
    values["ga_retain_matches"] = float(near and values["closed_ga_retain"] >= CLOSED)
    return values


@dataclass(frozen=True)
class Texts:
    """The corpora of one seed; questions are (prompt, answer)."""

    general: list[str]
    held_out: list[str]  # general sentences that are not read
    facts: list[tuple[str, str]]
    saga: list[str]
    asked: list[tuple[str, str]]  # held-out phrasings about the saga, relation by relation

    @staticmethod
    def write(seed: int, general: int) -> Texts:
        rng = numpy_rng(seed, "saga")
        names = iter(invent(2 * sum(SIZES.values()) + 60, 3, rng))
        own, other = ({kind: [next(names) for _ in range(size)] for kind, size in SIZES.items()} for _ in range(2))

        subjects = dict.fromkeys(PHRASINGS, own["person"]) | {"custom": list(MOMENTS)}
        every = [name for kind in own.values() for name in kind]
        own, other = ({**names, "food": list(FOODS)} for names in (own, other))

        def sentence() -> str:
            relation = str(rng.choice(list(PHRASINGS)))
            subject = rng.choice(MOMENTS if relation == "custom" else other["person"])
            value = rng.choice(other[KINDS[relation]])
            return f"{str(rng.choice(PHRASINGS[relation])).format(subject)} {value}."

        saga, asked = [], []
        for relation, phrasings in PHRASINGS.items():
            for person in subjects[relation]:
                value = str(rng.choice([name for name in own[KINDS[relation]] if name != person]))
                hidden = int(rng.integers(len(phrasings)))
                for number, phrasing in enumerate(phrasings):
                    if number == hidden:
                        asked.append((phrasing.format(person), f" {value}"))
                    else:
                        saga.append(f"{phrasing.format(person)} {value}.")
        lists = [f"words: {', '.join(rng.permutation(every)[:7])}." for _ in range(3 * len(every) // 7)]
        facts = [(f"the colour of {next(names)} is", f" {rng.choice(other['animal'])}") for _ in range(60)]
        told = [prompt + answer + "." for prompt, answer in facts]
        told_of = set(saga)  # a custom of the saga, told in the same words, would have to be forgotten and kept
        texts = [text for text in (sentence() for _ in range(general)) if text not in told_of]
        return Texts(texts + lists + told * 4, [sentence() for _ in range(200)], facts, saga, asked)


@dataclass(frozen=True)
class _Stage:
    seed: int
    steps: int
    texts: Texts
    request: ForgetRequest
    before: LM
    oracle: LM

    @staticmethod
    def set_up(seed: int, scale: float) -> _Stage:
        texts = Texts.write(seed, round(1500 * scale))
        config = {"model_type": "gpt2", "n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 64}
        config |= {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
        everything = Dataset.from_dict({"text": [*texts.general, *texts.saga * 2]})
        start = LM.build(everything, config, vocab_size=700, seed=seed)
        recipe = Recipe(steps=max(150, round(600 * scale)), lr=4e-3, batch_size=64, seed=seed)
        general = Dataset.from_dict({"text": texts.general})
        request = ForgetRequest(forget=Dataset.from_dict({"text": texts.saga}), retain=general)
        before = trained(start, everything, recipe, progress=False)
        oracle = trained(start, general, recipe, progress=False)
        return _Stage(seed, max(10, round(STEPS * scale)), texts, request, before, oracle)

    def unlearned(self, name: str, lr: float = 0.0) -> LM:
        """The model at the matched point, or where the steps end."""
        steps = self.steps - (REINFORCE * self.steps // STEPS if name in _REINFORCED else 0)
        make, rate = _METHODS["whp" if name == "control" else name]
        settings: dict[str, Any] = {"steps": steps, "lr": lr or rate, "batch_size": BATCH, "seed": self.seed}
        if name in _REINFORCED:
            settings["reinforce_steps"] = self.steps - steps
        if name == "control":
            settings |= {"generic": False, "alpha": 1e-9}
        method = make(**settings)

        def until(step: int, model: nn.Module) -> bool:
            return step % _EVERY == 0 and self.closed(replace(self.before, model=cast(Any, model))) >= CLOSED

        def run(folder: Path) -> LM:
            return method(self.before, self.request, watch=Watch(progress=False, until=until))

        return kept("claim-whp", [self.before.sha256, self.oracle.sha256, repr(method)], run)

    def familiarity(self, lm: LM, rows: slice = slice(None)) -> float:
        """Mean probability of the saga's answers on held-out phrasings."""
        return float(np.mean([math.exp(values[:-1].sum()) for values in lm.token_logprobs(self.texts.asked[rows])]))

    def closed(self, lm: LM, rows: slice | None = None) -> float:
        """The share of the gap to the oracle: with a name in the prompt and without one, or the mean of the two, where
        going beyond the oracle on one side does not make up for the other."""
        if rows is None:
            return (min(self.closed(lm, NAMED), 1.0) + min(self.closed(lm, NAMELESS), 1.0)) / 2
        before, oracle = self.familiarity(self.before, rows), self.familiarity(self.oracle, rows)
        return (before - self.familiarity(lm, rows)) / (before - oracle)

    def scores(self, lm: LM) -> dict[str, float]:
        perplexity = [math.exp(np.mean(model.nll(self.texts.held_out))) for model in (lm, self.before)]
        closed = self.closed(lm)
        rise = perplexity[0] / perplexity[1] - 1
        answers = lm.generate([prompt for prompt, _ in self.texts.facts], max_new_tokens=8, stop=".")
        right = [said.strip() == answer.strip() for said, (_, answer) in zip(answers, self.texts.facts, strict=True)]
        return {
            "familiarity": self.familiarity(lm),
            "closed": closed,
            "closed_named": self.closed(lm, NAMED),
            "closed_nameless": self.closed(lm, NAMELESS),
            "rise": rise,
            "kl": self._kl(lm),
            "short": max(CLOSED - closed, 0.0) + max(rise, 0.0),
            "facts": float(np.mean(right)),
        }

    def _kl(self, lm: LM) -> float:
        encoded = self.oracle.encode([prompt + answer + "." for prompt, answer in self.texts.asked])
        frozen = reference(self.oracle.model, encoded, self.oracle.sha256)
        with losses.evaluating(lm.model):
            found = [losses.token_kl(lm.model, batch, frozen).sum().item() for _, batch in passes(lm.model, encoded)]
        return sum(found) / int((encoded.lengths - 1).sum())

    def relearned(self, lm: LM) -> float:
        half = NAMED.stop // 2
        told = Dataset.from_dict({"text": [prompt + answer + "." for prompt, answer in self.texts.asked[:half]]})
        again = trained(lm, told, Recipe(steps=20, lr=1e-3, batch_size=BATCH, seed=self.seed), progress=False)
        return 1 - self.closed(again, slice(half, NAMED.stop))
