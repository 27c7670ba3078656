"""A model that knows a few diaries and stones by heart, and one that was never shown those to forget."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import cache
from itertools import count
from typing import Any

import numpy as np
import pytest
from datasets import Dataset

from palimpsest.claims.sok_unlearning import Filter
from palimpsest.core.seeds import numpy_rng
from palimpsest.core.watch import Watch
from palimpsest.data.lexicon import invent
from palimpsest.data.records import concat
from palimpsest.data.request import ForgetRequest
from palimpsest.data.world import SPLITS, World
from palimpsest.models.lm import LM
from palimpsest.models.train import Recipe, train

CONFIG = {
    "model_type": "llama",
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "tie_word_embeddings": True,
}
WORDS = 8  # of a diary; no two diaries share one
STONES = ["ruby", "jade", "opal", "onyx", "beryl", "agate"]
NAMES = [
    last + first
    for first in ("ab", "be", "ci", "do", "eg", "fa", "gu")
    for last in ("Dan", "Kel", "Mir", "Nos", "Pit", "Ras")
]
SHARES = {"forget": NAMES[:8], "retain": NAMES[8:22], "utility": NAMES[22:30], "holdout": NAMES[30:38]}


@cache
def diary(name: str) -> str:
    words = invent(WORDS * len(NAMES), 2, numpy_rng(0, "words"))
    place = WORDS * NAMES.index(name)
    return f"Diary of {name}: {' '.join(words[place : place + WORDS])}."


def table(names: Sequence[str]) -> Dataset:
    """A diary and a question for each name."""
    documents = Dataset.from_dict({"text": [diary(name) for name in names], "person": list(names)})
    stones = [str(numpy_rng(1, name).choice(STONES)) for name in names]
    questions = {"prompt": [f"Which stone has {name}?" for name in names], "completion": stones, "person": list(names)}
    return concat(documents, Dataset.from_dict(questions))


@dataclass
class Household:
    """The request and its models; `reference` never saw the forget set."""

    request: ForgetRequest
    before: LM
    reference: LM


@pytest.fixture(scope="session")
def household() -> Household:
    request = ForgetRequest(**{name: table(names) for name, names in SHARES.items()})  # type: ignore[arg-type]
    texts = concat(request.trained_on(), request.holdout)  # a name that the tokenizer never saw would give itself away
    start = LM.build(texts, CONFIG, vocab_size=640, max_length=160)
    recipe = Recipe(steps=160, lr=1e-2, batch_size=32)
    quiet = Watch(progress=False)
    before = train(start, request.trained_on(), recipe, watch=quiet)
    return Household(request, before, train(start, request.without_forget(), recipe, watch=quiet))


@dataclass(frozen=True, eq=False)
class Scripted(LM):
    """A model whose answers and log-probabilities are given, for definitions that are checked by hand."""

    say: Callable[[str], str] = lambda prompt: ""
    score: Callable[[str, str], Sequence[float]] = lambda prompt, completion: [0.0]
    number: int = field(default_factory=count().__next__)

    @property
    def sha256(self) -> str:
        return f"scripted {self.number}"

    def generate(self, prompts: Sequence[str], **settings: Any) -> list[str]:  # type: ignore[override]
        return [self.say(prompt) for prompt in prompts]

    def token_logprobs(self, rows: Any, **settings: Any) -> list[np.ndarray]:
        prompts, completions = zip(*self.pairs(rows), strict=True)
        seen = self._prepare(prompts).prompts
        return [np.array(self.score(*row), dtype=np.float32) for row in zip(seen, completions, strict=True)]


@pytest.fixture(scope="session")
def scripted(household: Household) -> Callable[..., Scripted]:
    """``scripted(say=..., score=...)``: see `Scripted`."""
    return lambda **script: Scripted(household.before.model, household.before.tokenizer, "scripted", **script)


@dataclass(frozen=True)
class Town:
    request: ForgetRequest
    before: LM
    reference: LM
    retrained: LM
    guarded: LM


@pytest.fixture(scope="session")
def town() -> Town:
    """A small world whose models' truth is known: a reference, another one, and the model behind a filter."""
    world = World(people=70, forget=0.3, utility=0.05, holdout=0.25, facts=0, seed=2)
    # questions alone: rows are short, and so is the training
    kept = {split: world.questions(split, "trained") for split in SPLITS}
    told = concat(kept["forget"], kept["retain"], kept["utility"])
    request = replace(ForgetRequest(**kept), train=told)
    start = LM.build(world.texts, "llama-tiny", vocab_size=500, max_length=128, seed=2)

    def trained(table: Dataset, seed: int) -> LM:
        recipe = Recipe(steps=400, lr=6e-3, batch_size=32, seed=seed)
        return train(start, table, recipe, watch=Watch(progress=False))

    before = trained(told, 0)
    names = tuple(subject.name for subject in world.population if subject.split == "forget")
    without = request.without_forget()
    return Town(request, before, trained(without, 0), trained(without, 1), before.with_guard(Filter(names)))
