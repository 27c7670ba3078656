"""UOE's claim: on a mixture of experts, unlearning the one responsible expert keeps what free unlearning destroys.

Six topics of invented facts are learned by a small Qwen2-MoE; one topic must go, by gradient ascent.  Large mixtures
send a subject to few experts, which a small one does not do by itself: a small routing loss plants it, and a second
model without it shows what happens where experts have not specialised.  All variants get the same steps, batches and
grid of learning rates, and are compared where they first answer the forgotten topic at chance (at most 30%, of four
answers), each at the rate of the grid that keeps most; a variant that never gets there is worth chance.

The negative control switches the attribution off, and nothing else: a random expert is trained in the place of the
responsible one, with its router, anchor and budget.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import suppress
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from palimpsest.claims import Expect, claim
from palimpsest.core import losses
from palimpsest.core.errors import TrainingDiverged
from palimpsest.core.fit import fit
from palimpsest.core.seeds import numpy_rng
from palimpsest.core.watch import Watch
from palimpsest.data.batches import Batch, Batches, Encoded
from palimpsest.forget.ascent import GradientAscent
from palimpsest.forget.uoe import UOE
from palimpsest.models.experts import affinity, concentration, mixtures, overlap, routing, row_means, selections
from palimpsest.models.kept import kept
from palimpsest.models.lm import LM

if TYPE_CHECKING:
    from datasets import Dataset

TOPICS = 6
FORGET = 1
RELATIONS = ("colour", "metal", "river", "season")
VALUES = 4  # answers to a relation, each topic having its own
SPECIALISED = 0.01  # weight of the planted routing loss
CONFIG = {
    "model_type": "qwen2_moe",
    "hidden_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "num_experts": 12,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 96,
    "shared_expert_intermediate_size": 16,
    "tie_word_embeddings": True,
    "initializer_range": 0.06,
}
RATES = (1e-3, 3e-3, 1e-2)  # of the sheet's grid; at 3e-4 no confined variant gets there within the steps
STEPS = 80
BATCH = 16
LOOK_EVERY = 2  # steps
CHANCE = 100 / VALUES
GONE = 0.30  # share of right answers, of four, at which the topic counts as forgotten

EXPECTATIONS = (  # fixed before anything was tuned; they are the sheet's
    Expect("concentration", at_least=5),  # the planted specialisation is that of large mixtures
    Expect("shift_full", at_least=0.2),  # (a) free unlearning moves the routing
    Expect("shift_full_half", minus="shift_uoe", at_least=0),
    Expect("utility_uoe", minus="utility_full", at_least=5),  # (b) points of retained answers
    Expect("utility_uoe", minus="utility_random", at_least=5),  # (c) the attribution matters
    Expect("shift_free", minus="shift_uoe", at_least=0),  # (d) the anchor holds the routing
    Expect("utility_uoe", minus="utility_free", at_least=-2),
    Expect("utility_uoe_unspecialised", minus="utility_full_unspecialised", at_most=0),  # the condition of it all
)


@claim(
    paper="uoe",
    statement="Unlearning the one expert that a topic is sent to keeps more of the other topics than unlearning all.",
    paper_says={
        "MMLU after gradient ascent, Qwen, WMDP": "0.339 of 0.598; with UOE 0.501",
        "MMLU after gradient ascent, DeepSeek, WMDP": "0.315 of 0.555; with UOE 0.510",
        "MMLU with the anchor at 0, 1, 100 (RWKU)": "0.5435, 0.5485, 0.5471",
        "RMU with a random expert, DeepSeek, RWKU": "forget 0.118 left of 0.538, with UOE 0.013",
    },
    expectations=EXPECTATIONS,
    minutes=3,
    data="generated: 480 facts of 6 topics, 4 relations with 4 answers each",
    note=(
        "Training all experts destroys the other topics, as the paper says, and one expert spares them. But in a "
        "mixture this small any one expert does nearly as well as the responsible one, only in more steps; so few "
        "steps are needed that the routing barely moves by itself, while the anchor's own pull towards the expert "
        "counts as a move; and confinement helps without specialisation too."
    ),
)
def measure(seed: int, mechanism: bool = True, scale: float = 1.0) -> dict[str, float]:
    world = Topics(max(4, round(20 * scale)), seed)
    special = Trial.of(world, SPECIALISED, seed, scale)
    plain = Trial.of(world, 0.0, seed, scale)
    measured = {
        "concentration": concentration(affinity(special.lm.model, special.forget, "softmax")),
        "known_before": 100 * special.right(special.lm, special.forget),
        "utility_before": 100 * special.right(special.lm, special.retain),
    }
    for name, trial in (("", special), ("_unspecialised", plain)):
        drawn = trial.random_experts(2)
        chosen = UOE(seed=seed).attribute(trial.lm, trial.request)[0] if mechanism else drawn[:1]
        variants: dict[str, dict[str, Any]] = {"full": {}, "uoe": {"targets": chosen}}
        if trial is special:
            variants |= {"random": {"targets": drawn[1:]}, "free": {"targets": chosen, "anchor": 0.0}}
        for variant, settings in variants.items():
            utility, shift, steps = trial.best(settings)
            measured[f"utility_{variant}{name}"] = utility
            measured[f"shift_{variant}{name}"] = shift
            measured[f"steps_{variant}{name}"] = steps
    measured["shift_full_half"] = measured["shift_full"] / 2
    return measured


@dataclass(frozen=True)
class Topics:
    """Invented facts: each topic has its own entities, answers and words around them, and the same four relations."""

    entities: int
    seed: int

    @cached_property
    def facts(self) -> list[tuple[int, str, str, tuple[str, ...]]]:
        """(topic, prompt, right answer, all answers to its relation)."""
        rng = numpy_rng(self.seed, "facts")
        words = iter(_words(rng))
        found = []
        for topic in range(TOPICS):
            answers = {relation: tuple(next(words) for _ in range(VALUES)) for relation in RELATIONS}
            around = [next(words) for _ in range(6)]
            for name in [next(words) for _ in range(self.entities)]:
                for relation, known in answers.items():
                    first, second = rng.choice(around, 2, replace=False)
                    prompt = f"in {first} {second} the {relation} of {name} is"
                    found.append((topic, prompt, known[int(rng.integers(VALUES))], known))
        return found

    def table(self, topics: set[int]) -> Dataset:
        from datasets import Dataset

        rows = [(prompt, right, list(known)) for topic, prompt, right, known in self.facts if topic in topics]
        columns = zip(*rows, strict=True)
        return Dataset.from_dict(dict(zip(("prompt", "completion", "options"), map(list, columns), strict=True)))


def _words(rng: np.random.Generator) -> Iterator[str]:
    """Two-syllable words, all different."""
    syllables = [first + vowel for first in "bdfgklmnprstvz" for vowel in "aeiou"]
    pairs = [one + other for one in syllables for other in syllables if one != other]
    return iter(rng.permutation(pairs).tolist())


@dataclass(frozen=True, eq=False)
class Trial:
    """A trained mixture, and the topic that it must forget."""

    lm: LM
    world: Topics
    seed: int
    scale: float

    @staticmethod
    def of(world: Topics, planted: float, seed: int, scale: float) -> Trial:
        table = world.table(set(range(TOPICS)))
        steps = round(400 * min(1.0, scale))
        key = [asdict(world), CONFIG, planted, seed, steps]
        return Trial(
            kept("claim-uoe", key, lambda folder: _train(world, table, planted, seed, steps)), world, seed, scale
        )

    @property
    def steps(self) -> int:
        """The most steps that a variant gets."""
        return max(6, round(STEPS * min(1.0, self.scale)))

    @cached_property
    def request(self) -> Any:
        from palimpsest.data.request import ForgetRequest

        return ForgetRequest(forget=self.world.table({FORGET}))

    @cached_property
    def forget(self) -> Encoded:
        return self.lm.encode(self.world.table({FORGET}))

    @cached_property
    def retain(self) -> Encoded:
        return self.lm.encode(self.world.table(set(range(TOPICS)) - {FORGET}))

    def random_experts(self, count: int) -> tuple[tuple[int, int], ...]:
        """Experts drawn blindly from all layers."""
        found = mixtures(self.lm.model)
        places = numpy_rng(self.seed, "random experts").permutation(len(found) * found[0].count)[:count].tolist()
        return tuple((found[place // found[0].count].layer, place % found[0].count) for place in places)

    def best(self, settings: dict[str, Any]) -> tuple[float, float, float]:
        """Retained answers (%), share of experts moved, and steps, at the rate of the grid that keeps most."""
        tried = [self.at(rate, settings) for rate in (RATES if self.scale == 1 else RATES[-1:])]
        reached = [one for one in tried if one[2] < self.steps]
        return max(reached) if reached else (CHANCE, max(one[1] for one in tried), float(self.steps))

    def at(self, rate: float, settings: dict[str, Any]) -> tuple[float, float, float]:
        """The same at one learning rate; all steps of the budget if the topic was not forgotten before."""
        taken = self.steps

        def forgotten(step: int, model: Any) -> bool:
            nonlocal taken
            if (
                step % LOOK_EVERY == 0
                and step < self.steps
                and self.right(self.lm.with_model(model), self.forget) <= GONE
            ):
                taken = step
                return True
            return False

        budget: dict[str, Any] = {"steps": self.steps, "lr": rate, "batch_size": BATCH, "warmup_epochs": 0.0}
        budget |= {"weight_decay": 0.0, "seed": self.seed}
        method: Any = UOE(loss="gradient-ascent", **budget, **settings) if settings else GradientAscent(**budget)
        after = None
        with suppress(TrainingDiverged):
            after = method(self.lm, self.request, watch=Watch(until=forgotten, progress=False))
        if after is None:
            return CHANCE, 1.0, float(self.steps)
        moved = 1 - overlap(selections(after.model, self.forget), self.start)
        return 100 * self.right(after, self.retain), moved, float(taken)

    @cached_property
    def start(self) -> list[Tensor]:
        return selections(self.lm.model, self.forget)

    def right(self, lm: LM, encoded: Encoded) -> float:
        """The share of questions whose right answer is the likeliest of the relation's four (by its first token)."""
        batch = encoded.batch(range(len(encoded))).to(lm.device)
        place = torch.as_tensor(encoded.starts)
        line = torch.arange(len(encoded))
        with losses.evaluating(lm.model):
            logits = lm.model(**losses.inputs_of(batch)).logits[line, place - 1]
        mine = batch.input_ids[line, place]
        options = self._options[mine]
        return float((logits.gather(1, options).argmax(1) == (options == mine[:, None]).int().argmax(1)).float().mean())

    @cached_property
    def _options(self) -> Tensor:
        """(V, 4): by the first token of an answer, the first tokens of all answers to its relation."""
        table = torch.zeros(len(self.lm.tokenizer), VALUES, dtype=torch.int64)
        for known in {known for _, _, _, known in self.world.facts}:
            firsts = [self.lm.tokenizer(f" {word}", add_special_tokens=False)["input_ids"][0] for word in known]
            if len(set(firsts)) < VALUES:
                raise RuntimeError(f"the answers {known} do not differ in their first token")
            table[firsts] = torch.tensor(firsts)
        return table


def _train(world: Topics, table: Dataset, planted: float, seed: int, steps: int) -> LM:
    """A mixture that has learned all facts; with `planted`, each topic at a pair of experts of every layer."""
    lm = LM.build(table, CONFIG, vocab_size=1200, seed=seed)
    topics = torch.tensor([topic for topic, _, _, _ in world.facts])
    found = mixtures(lm.model)

    def loss(model: nn.Module, batch: Batch) -> Tensor:
        with routing(found) as seen:
            value = losses.nll(model, batch)
        if planted:
            pair = 2 * topics[batch.rows][:, None] + torch.arange(2)
            for calls in seen:
                # the last call: before a first loss, a few tokens are tried on the model
                routed = calls[-1].probabilities.view(*batch.input_ids.shape, -1)
                own = routed.gather(2, pair[:, None].expand(-1, routed.shape[1], -1)).sum(2).clamp(min=1e-9)
                value = value - planted * losses.over_rows(row_means(own.log().flatten(), batch), batch)
        return value

    batches = Batches(lm.encode(table), min(64, len(table)), seed)
    fit(lm.model, loss, batches, steps=steps, lr=2e-3, warmup=20, schedule="cosine", seed=seed, progress="")
    lm.model.eval()
    return lm
