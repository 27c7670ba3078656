"""MEND's claim on a tiny GPT: distilled with the prompt's answers as a teacher, vectors are worth most of the prompt.

12 words in 4 hidden classes; a task gives each class one of four labels.  A GPT of 2 layers learns in context from
sequences of 16 labelled words and is then frozen.  Distillers that write 4 vectors for 16 demonstrations (33 tokens)
are trained on 200 tasks, all with the same number of steps, and tested on the other 56.
Negative control: the distillation signal is switched off, and nothing else: the teacher's answers enter neither stage.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

import palimpsest
from palimpsest.claims.definition import Expect, claim
from palimpsest.core import cache
from palimpsest.core.fit import fit
from palimpsest.core.seeds import numpy_rng
from palimpsest.core.watch import Watch
from palimpsest.data.text_tasks import TextTask
from palimpsest.learn.incontext.mend import MEND, FittedMEND, HyperTuning, PromptedTasks, PromptTuning
from palimpsest.learn.incontext.prompting import PrefixPredictor, in_context, zero_shot
from palimpsest.models.kept import kept
from palimpsest.models.lm import LM
from palimpsest.models.prefix import cost

CLASSES, WORDS, LABELS, SHOWN = 4, 3, 4, 16
USUAL = 0.3  # share of the model's sequences that are of one and the same task, which ends the plateau
HELD_OUT, QUERIES = 56, 27  # of 256 tasks; 56 x 27 = 1512 queries
CONFIG = {
    "model_type": "gpt2",
    "n_embd": 64,
    "n_layer": 2,
    "n_head": 4,
    "n_positions": 64,
    "initializer_range": 0.0625,
    "resid_pdrop": 0.0,
    "embd_pdrop": 0.0,
    "attn_pdrop": 0.0,
}
LM_STEPS, LM_BATCH, LM_LR = 1000, 32, 2e-3
FIRST, SECOND = 80, 200  # steps of the two stages; arms with one stage take all of them in it
COMMON: dict[str, Any] = {"vectors": 4, "demonstrations": SHOWN, "batch_size": 32}
RATE = 1e-3


@claim(
    paper="mend",
    statement=(
        "A distiller taught by the frozen model's own answers to the full prompt makes better vectors than one trained "
        "on outputs alone with as many steps; both are far above no prompt and a static one, and near the full prompt."
    ),
    paper_says={
        "seven partitions of MetaICL, GPT-2 large, XL and T5-lm-large": "matches or beats full in-context learning",
        "FLOPs saved": "up to 75 %",
        "time saved": "33 %",
    },
    expectations=(  # the sheet's; its words "far" and "a few points" are read as 10 and 5
        Expect("in_context", at_least=90.0),
        Expect("static", within=(20.0, 30.0)),  # chance
        Expect("mend", minus="hyper_tuning", at_least=0.5),
        Expect("mend", minus="static", at_least=10.0),
        Expect("hyper_tuning", minus="static", at_least=10.0),
        Expect("mend", minus="zero_shot", at_least=10.0),
        Expect("in_context", minus="mend", at_most=5.0),
        Expect("agreement_mend", minus="agreement_hyper_tuning", at_least=0.5),
    ),
    minutes=3,
    data="generated: 12 words in 4 classes, 256 tasks of which 56 are held out",
    note=(
        "Accuracies and agreements with the model's own answers to the full prompt in percent, on 1512 queries of "
        "held-out tasks; mend_seen: on tasks of the training. flops_*: of one query of 2 tokens behind a kept prefix. "
        "The sheet has two labels, 8 classes and 48 words; on pilot seed 100 the model did not learn such tasks in "
        "context in this budget, so there are four labels, 4 classes and 12 words, and chance is 25 where it was 50. "
        "The rate is the better of 0.001 and 0.003 on that seed, for MEND and HyperTuning alike. "
        "Left open: after so few steps the distillers are far from the full prompt and differ more between seeds than "
        "from one another, and in one seed the model itself had not learnt in context."
    ),
)
def measure(seed: int, mechanism: bool = True, scale: float = 1.0) -> dict[str, float]:
    world = Words(seed, scale)
    first, second = (max(2, round(steps * scale)) for steps in (FIRST, SECOND))
    stages: dict[str, Any] = {"pretraining_steps": first, "steps": second, "seed": seed}
    stages |= {"lr": RATE, "pretraining_lr": RATE, **COMMON}
    signal: dict[str, Any] = {} if mechanism else {"kl_weight": 0.0, "pretrain_on": "nll"}
    arms = {
        "mend": MEND(**stages | signal),
        "hyper_tuning": HyperTuning(**stages),
        "static": PromptTuning(**stages | {"pretraining_steps": 0, "steps": first + second}),
        "kl_only": MEND(**stages | (signal or {"prediction_weight": 0.0})),
    }
    tests = world.tests(world.held_out, QUERIES if scale >= 1 else 2)
    lm = world.trained
    teacher = [in_context(lm, task, SHOWN) for task, _ in tests]
    answers = [predictor([text for text, _ in queries]) for predictor, (_, queries) in zip(teacher, tests, strict=True)]
    found = {"in_context": accuracy(teacher, tests), "zero_shot": accuracy([zero_shot(lm, t) for t, _ in tests], tests)}
    for name, learner in arms.items():
        fitted = world.distilled(learner)
        predictors: list[PrefixPredictor] = [fitted.adapt(task) for task, _ in tests]
        found[name] = accuracy(predictors, tests)
        if name in ("mend", "hyper_tuning"):
            said = [p([text for text, _ in queries]) for p, (_, queries) in zip(predictors, tests, strict=True)]
            found[f"agreement_{name}"] = 100 * float(np.mean(np.concatenate(said) == np.concatenate(answers)))
            seen = world.tests(world.training[:HELD_OUT], 9 if scale >= 1 else 2)
            found[f"{name}_seen"] = accuracy([fitted.adapt(task) for task, _ in seen], seen)
    shown = len(teacher[0].prefix.vectors)
    for name, places in (("in_context", shown), ("mend", COMMON["vectors"])):
        spent = cost(lm, places, 2)
        found |= {f"places_{name}": float(places), f"kept_{name}": float(spent.kept), f"flops_{name}": spent.query}
    return found


def accuracy(predictors: list[PrefixPredictor], tests: list[tuple[TextTask, list[tuple[str, str]]]]) -> float:
    """Percent of all queries that are answered right."""
    right = []
    for predictor, (task, queries) in zip(predictors, tests, strict=True):
        said = predictor([text for text, _ in queries])
        right += [task.options[answer] == label for answer, (_, label) in zip(said, queries, strict=True)]
    return 100 * float(np.mean(right))


@dataclass(frozen=True)
class Words:
    """Words in classes, tasks that label classes, and the model that learns such tasks from its context."""

    seed: int
    scale: float = 1.0

    @cached_property
    def _syllables(self) -> list[str]:
        pairs = [first + vowel for first in "bdfgklmnprstvz" for vowel in "aeiou"]
        return numpy_rng(self.seed, "words").permutation(pairs).tolist()

    @cached_property
    def words(self) -> np.ndarray:
        """(classes, words)"""
        return np.array(self._syllables[: CLASSES * WORDS]).reshape(CLASSES, WORDS)

    @property
    def labels(self) -> tuple[str, ...]:
        return tuple(self._syllables[CLASSES * WORDS : CLASSES * WORDS + LABELS])

    @cached_property
    def _order(self) -> list[int]:
        return numpy_rng(self.seed, "tasks").permutation(LABELS**CLASSES).tolist()

    @property
    def held_out(self) -> list[int]:
        return self._order[:HELD_OUT]

    @property
    def training(self) -> list[int]:
        return self._order[HELD_OUT:]

    def drawn(self, rng: np.random.Generator, numbers: np.ndarray, count: int) -> tuple[np.ndarray, np.ndarray]:
        """(B, `count`) words and labels of tasks (B,): each class as often among the first 16, in any order."""
        rows = np.arange(len(numbers))[:, None]
        even = np.tile(np.arange(CLASSES), SHOWN // CLASSES)[rng.random((len(numbers), SHOWN)).argsort(1)]
        classes = np.concatenate([even, rng.integers(CLASSES, size=(len(numbers), max(0, count - SHOWN)))], 1)
        classes = classes[:, :count]
        words = rng.integers(WORDS, size=classes.shape)
        return classes * WORDS + words, numbers[rows] // LABELS**classes % LABELS

    def task(self, number: int, name: str, count: int) -> TextTask:
        rng = numpy_rng(self.seed, name, number)
        words, labels = self.drawn(rng, np.array([number]), count)
        flat = self.words.reshape(-1)
        pairs = ((f" {flat[word]}", self.labels[label]) for word, label in zip(words[0], labels[0], strict=True))
        return TextTask(f"task {number}", tuple(pairs), self.labels)

    def tests(self, numbers: list[int], queries: int) -> list[tuple[TextTask, list[tuple[str, str]]]]:
        """For each task its demonstrations, and queries."""
        found = []
        for number in numbers:
            whole = self.task(number, "test", SHOWN + queries)
            found.append((replace(whole, examples=whole.examples[:SHOWN]), list(whole.examples[SHOWN:])))
        return found

    @cached_property
    def untrained(self) -> LM:
        rng = numpy_rng(self.seed, "tokenizer")
        known = self._syllables[: CLASSES * WORDS + LABELS]
        texts = [" " + " ".join(rng.choice(known, 30)) for _ in range(300)]
        return LM.build(texts, CONFIG, vocab_size=420, seed=self.seed)

    @cached_property
    def _ids(self) -> np.ndarray:
        """The tokens of all words, then of the labels."""
        known = self._syllables[: CLASSES * WORDS + LABELS]
        found = [self.untrained.tokenizer(f" {word}", add_special_tokens=False)["input_ids"] for word in known]
        if any(len(ids) != 1 for ids in found):
            raise RuntimeError("a word is not one token")
        return np.array(found)[:, 0]

    def batch(self, step: int) -> dict[str, Tensor]:
        """Sequences of training tasks, for the model: 16 examples and one more."""
        rng = numpy_rng(self.seed, "sequences", step)
        numbers = rng.choice(self.training, LM_BATCH)
        numbers[rng.random(LM_BATCH) < USUAL] = self.training[0]
        words, labels = self.drawn(rng, numbers, SHOWN + 1)
        tokens = np.stack([self._ids[words], self._ids[CLASSES * WORDS + labels]], axis=2).reshape(LM_BATCH, -1)
        start = np.full((LM_BATCH, 1), self.untrained.tokenizer.bos_token_id)
        return {"ids": torch.from_numpy(np.concatenate([start, tokens], axis=1))}

    @cached_property
    def trained(self) -> LM:
        steps = max(2, round(LM_STEPS * self.scale))

        def make(folder: Any) -> LM:
            lm = self.untrained.copy()
            settings: dict[str, Any] = {"steps": steps, "lr": LM_LR, "seed": self.seed}
            fit(lm.model, _label_loss, self.batch, progress="", **settings)
            return lm

        return kept("claim-mend", [CONFIG, LM_BATCH, LM_LR, steps, self.seed], make)

    def distilled(self, learner: MEND) -> FittedMEND:
        """The learner trained on the training tasks and on sequences of theirs as text; kept in the cache."""
        tasks = [self.task(number, "train", 48) for number in self.training]
        texts = []
        for number in self.training:
            whole = self.task(number, "text", 20)
            texts.append("".join(f"{word} {label}" for word, label in whole.examples))
        # the control's MEND and HyperTuning are the same settings of one method, and trained once
        static = isinstance(learner, PromptTuning)
        key = [palimpsest.__version__, torch.__version__, static, asdict(learner), self.trained.sha256, self.seed]

        def build(folder: Any) -> None:
            learner.meta_fit(PromptedTasks(self.trained, tasks, texts), watch=Watch(progress=False)).write(folder)

        return cache.cached("claim-mend-distilled", key, build, learner.read)


def _label_loss(model: Any, batch: dict[str, Tensor]) -> Tensor:
    """On the labels alone: they stand at every second place."""
    logits = model(input_ids=batch["ids"], use_cache=False).logits[:, 1:-1:2]
    return F.cross_entropy(logits.flatten(0, 1), batch["ids"][:, 2::2].flatten())
