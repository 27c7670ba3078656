"""C-BOD's claim on a task whose truth is known: rewording lowers the score of models tuned to a benchmark's wording.

The answer to a question is a class, looked up in a table by two content words (two synonyms each) that stand among
six filler words.  Resampling fillers, flipping synonyms and moving words keeps the answer by construction.  A benchmark
is 400 fixed questions.  Four small Llamas get the same steps and batches: *skilled* (many other questions), *tuned*
(mostly the benchmark in its own wording), *mixed* (a fifth of it) and *paraphrased* (as much benchmark as tuned, but
every copy reworded anew).  The true overfit is the accuracy on the benchmark less that on fresh questions.

The negative control takes the benchmark's own wording out: the items that are compared with their rewordings are
themselves rewordings.  Models, rewordings and test are the same, and nobody may be flagged.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import pairwise

import numpy as np
from datasets import Dataset

from palimpsest.audit.cbod import CBOD
from palimpsest.audit.choices import Item, answered
from palimpsest.audit.mcnemar import Paired
from palimpsest.claims import Expect, claim
from palimpsest.core.records import Evidence
from palimpsest.core.seeds import numpy_rng
from palimpsest.data.lexicon import invent
from palimpsest.models.kept import trained
from palimpsest.models.lm import LM
from palimpsest.models.train import Recipe

KEYS, FILLERS, CLASSES, LENGTH = 10, 50, 4, 8  # content words of each kind, filler words, answers, words of a question
BENCHMARK, FRESH = 400, 400
WEAK, STRONG = 0.5, 1.5
NULLS = 6  # pairs of rewordings that are set against each other
_ARMS = {  # share of the batch from the benchmark, other questions, whether the benchmark's copies are reworded
    "skilled": (0.0, 4000, False),
    "tuned": (0.9, 1200, False),
    "mixed": (0.2, 1200, False),
    "paraphrased": (0.9, 1200, True),
}
_CONFIG = {
    "model_type": "llama",
    "hidden_size": 80,
    "intermediate_size": 208,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "initializer_range": 0.056,
    "tie_word_embeddings": True,
}


@claim(
    paper="cbod",
    statement=(
        "The drop under rewording detects tuning to a benchmark's wording, grows with the rewording's strength, is "
        "silent on a model that has the skill, and goes away when the benchmark is trained on in reworded form."
    ),
    paper_says={
        "MMLU, 26 models, mean relative drop at mu 1 (percent of the score)": 2.15,
        "models flagged, of 26": 20,
        "32 models (abstract of v2), mean relative drop": 2.75,
        "a clean and a tuned model side by side": "not measured by the paper",
    },
    expectations=(  # fixed before anything was tuned
        Expect("flagged_tuned", at_least=0.9),
        Expect("flagged_skilled", at_most=0.1),
        Expect("flagged_paraphrased", at_most=0.1),
        Expect("drop_tuned", at_least=10),
        Expect("drop_strong", minus="drop_weak", at_least=5),  # of the tuned model
        Expect("drop_tuned", minus="drop_skilled", at_least=10),
        Expect("left", at_most=0),  # drop of the paraphrased model less a fifth of the tuned model's: 80% is gone
        Expect("spearman", at_least=0.7),  # of drop and true overfit over the four models
        Expect("null_flags", at_most=0.1),
    ),
    minutes=3,
    data="generated: a table of 10 x 10 keys, 400 benchmark questions",
    note=(
        "Points of accuracy at mu 1 unless named. Larger and better models dropping more (the paper's trend) cannot be "
        "tested at this scale. Thirty pairs of rewordings, one of them flagged, leave null_flags undecided."
    ),
)
def measure(seed: int, mechanism: bool = True, scale: float = 1.0) -> dict[str, float]:
    task = Task(seed, max(80, round(BENCHMARK * scale)))
    models = {name: task.model(name, scale) for name in _ARMS}
    items = task.items if mechanism else task.reworded_items
    audit = CBOD(grid=(WEAK, STRONG), examples=0, seed=seed)
    values: dict[str, float] = {}
    for name, lm in models.items():
        tested = audit if name == "tuned" else replace(audit, grid=())
        found = tested(lm, items, task.rephrase)
        values[f"accuracy_{name}"] = _number(found, "reworded_accuracy", "before")
        values[f"drop_{name}"] = _number(found, "wording_drop")
        values[f"flagged_{name}"] = float(found.extras["outcome"] == "flagged")
        fresh = 100 * float(task.answers(lm, task.fresh).mean())
        values[f"overfit_{name}"] = 100 * float(task.answers(lm, task.items).mean()) - fresh
        if name == "tuned":
            drops = {row["mu"]: row["drop"] for row in found.extras["table"]}
            values |= {"drop_weak": drops[WEAK], "drop_strong": drops[STRONG]}
            values["power"] = found.extras["table"][0]["power"]
    values["left"] = values["drop_paraphrased"] - values["drop_tuned"] / 5
    values["spearman"] = _spearman([values[f"drop_{name}"] for name in _ARMS], [values[f"overfit_{a}"] for a in _ARMS])
    values["null_flags"] = task.null_flags(models["tuned"], audit.alpha)
    return values


@dataclass(frozen=True)
class Task:
    """The words, the table and the questions of one seed."""

    seed: int
    benchmark: int

    @cached_property
    def words(self) -> list[str]:
        names = invent(4 * KEYS + FILLERS + CLASSES, 2, numpy_rng(self.seed, "cbod words"))
        return [name.lower() for name in names]  # a capital would be kept as a name is

    @cached_property
    def keys(self) -> np.ndarray:
        """(2, KEYS, 2): the synonyms of each content word of both kinds."""
        return np.array(self.words[: 4 * KEYS]).reshape(2, KEYS, 2)

    @property
    def fillers(self) -> list[str]:
        return self.words[4 * KEYS : 4 * KEYS + FILLERS]

    @property
    def classes(self) -> tuple[str, ...]:
        return tuple(self.words[-CLASSES:])

    @cached_property
    def table(self) -> np.ndarray:
        """(KEYS, KEYS): the class of each pair."""
        return numpy_rng(self.seed, "cbod table").integers(CLASSES, size=(KEYS, KEYS))

    @cached_property
    def _content(self) -> dict[str, tuple[int, int]]:
        return {str(self.keys[kind, key, twin]): (kind, key) for kind, key, twin in np.ndindex(self.keys.shape)}

    @cached_property
    def items(self) -> list[Item]:
        return self._drawn(self.benchmark, "benchmark")

    @cached_property
    def fresh(self) -> list[Item]:
        return self._drawn(FRESH, "fresh")

    @cached_property
    def reworded_items(self) -> list[Item]:
        texts = self.rephrase([item.question for item in self.items], STRONG, -1)
        return [replace(item, question=text) for item, text in zip(self.items, texts, strict=True)]

    def _drawn(self, count: int, name: str) -> list[Item]:
        rng = numpy_rng(self.seed, "cbod questions", name)
        return [self._item(self._question(rng), number) for number in range(1, count + 1)]

    def _question(self, rng: np.random.Generator) -> str:
        words = [str(word) for word in rng.choice(self.fillers, LENGTH)]
        for kind, place in enumerate(rng.choice(LENGTH, 2, replace=False)):
            words[place] = str(self.keys[kind, rng.integers(KEYS), rng.integers(2)])
        return " ".join(words)

    def _item(self, question: str, number: int) -> Item:
        first, second = (key for _, key in sorted(self._content[w] for w in question.split() if w in self._content))
        return Item(question, self.classes, int(self.table[first, second]), number=number, render=_asked)

    def rephrase(self, questions: Sequence[str], mu: float, seed: int) -> list[str]:
        """Fillers drawn anew, synonyms flipped, words moved: each with a probability that grows with mu."""
        return [self._rephrased(question, mu, numpy_rng(seed, "cbod rephrase", mu, question)) for question in questions]

    def _rephrased(self, question: str, mu: float, rng: np.random.Generator) -> str:
        words = question.split()
        for place, word in enumerate(words):
            if word in self._content:
                if rng.random() < 0.4 * mu:
                    kind, key = self._content[word]
                    twins = self.keys[kind, key]
                    words[place] = str(twins[1] if word == twins[0] else twins[0])
            elif rng.random() < 0.5 * mu:
                words[place] = str(rng.choice(self.fillers))
        if rng.random() < 0.3 * mu:
            words = [words[place] for place in rng.permutation(len(words))]
        return " ".join(words)

    @cached_property
    def start(self) -> LM:
        texts = [f"{_asked(item.question)} {' '.join(self.classes)}" for item in self._drawn(1500, "tokenizer")]
        return LM.build(texts, _CONFIG, vocab_size=1024, max_length=48, seed=self.seed)

    def model(self, name: str, scale: float) -> LM:
        share, pool, reworded = _ARMS[name]
        others = self._drawn(max(200, round(pool * scale)), f"pool {pool}")
        rows = [(item, item.question) for item in others]
        copies = round(share / (1 - share) * len(others) / self.benchmark)
        texts = [item.question for item in self.items]
        for copy in range(copies):
            asked = self.rephrase(texts, 1.0 + copy % 2 / 2, 10_000 + copy) if reworded else texts
            rows += list(zip(self.items, asked, strict=True))
        table = Dataset.from_dict(
            {
                "prompt": [_asked(question) for _, question in rows],
                "completion": [f" {item.options[item.right]}" for item, _ in rows],
            }
        )
        recipe = Recipe(steps=max(30, round(500 * scale)), lr=4e-3, batch_size=64, seed=self.seed)
        return trained(self.start, table, recipe, progress=False)

    def answers(self, lm: LM, items: Sequence[Item], mu: float = 0.0, seed: int = 0) -> np.ndarray:
        questions = [item.question for item in items]
        return answered(lm, items, self.rephrase(questions, mu, seed) if mu else questions, "likelihood")

    def null_flags(self, lm: LM, alpha: float) -> float:
        """The share of pairs of rewordings that the test would flag, though neither is the benchmark's wording."""
        scores = [self.answers(lm, self.items, 1.0, 20_000 + draw) for draw in range(NULLS + 1)]
        pairs = [Paired(first, second) for first, second in pairwise(scores)]
        return float(np.mean([pair.p < alpha and pair.b > pair.c for pair in pairs]))


def _asked(question: str) -> str:
    return f"{question} ="


def _number(evidence: Evidence, name: str, side: str = "after") -> float:
    return float(getattr(evidence[name], side))


def _spearman(first: Sequence[float], second: Sequence[float]) -> float:
    """0 where one side does not vary at all."""
    from scipy import stats

    if np.ptp(first) == 0 or np.ptp(second) == 0:
        return 0.0
    return float(stats.spearmanr(first, second).statistic)
