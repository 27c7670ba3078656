"""ConceptVectors' claim: gradient unlearning silences a concept and leaves its trace; ablating the trace is specific.

Eight concepts of ten relations; each answer belongs to one concept and relation alone.  A concept is named by two words
a and b, and is (a + b) mod 8: no single word tells it, so feed-forward blocks must compute it (where one word does,
small models have vectors that read like a concept and drive nothing).  A narrow block and a small penalty on its
activations make few vectors do the work.  Gradient ascent, gradient difference and NPO with KL forget one concept at a
time, until a tenth of its questions is answered rightly or the steps end, each at the gentlest rate that gets there on
two other concepts.  Vectors are chosen on one half of a concept's questions; every number is of the other half.

The negative control takes the idea away and nothing else: in the place of concept vectors stand as many others of the
same layers and nearest norm.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.nn.functional as F

from palimpsest.audit.traces import Certainty, Concept, Search, Trace, change, questions_of, trace
from palimpsest.claims import Expect, claim
from palimpsest.core import losses
from palimpsest.core.fit import fit
from palimpsest.core.seeds import numpy_rng
from palimpsest.core.watch import Watch
from palimpsest.data.batches import Batches
from palimpsest.data.lexicon import invent
from palimpsest.data.records import concat
from palimpsest.data.request import ForgetRequest
from palimpsest.forget.ascent import GradDiff, GradientAscent
from palimpsest.forget.needle import Needle
from palimpsest.forget.preference import NPO
from palimpsest.forget.unlearn import required
from palimpsest.models.anatomy import hooked
from palimpsest.models.concept_vectors import Written, projections, read_all
from palimpsest.models.kept import kept
from palimpsest.models.lm import LM

if TYPE_CHECKING:
    from datasets import Dataset
    from torch import Tensor, nn

    from palimpsest.data.batches import Batch

CONCEPTS, RELATIONS = 8, 10
TUNED, REPORTED = (0, 1), (2, 3, 4, 5)  # concepts that choose the learning rate, and those that are reported
CONFIG: dict[str, Any] = {
    "model_type": "llama",
    "hidden_size": 64,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "initializer_range": 0.05,
    "tie_word_embeddings": False,
}
SPARSE = 0.02  # weight of the mean activation's size
UNLEARNERS: Mapping[str, Callable[..., Any]] = {
    "ascent": GradientAscent,
    "grad_diff": GradDiff,
    "npo_kl": lambda **budget: NPO(retain_loss="kl", **budget),
}
RATES = (3e-4, 1e-3, 3e-3)
STEPS, BATCH, LOOK_EVERY = 100, 32, 5
GONE = 0.1  # share of right answers at which an unlearner stops
WORDS = 20  # of the Jaccard index
# All 48 vectors are looked at (the paper's cut would leave 14), and those are taken that have ten times as many of the
# concept's words at the top as chance puts there (10 of 499 words): in 64 dimensions words lie close to each other.
SEARCH = Search(keep=1.0, clarity=0.2, answer_tokens=2)


@claim(
    paper="conceptvectors",
    statement=(
        "Gradient unlearning brings a concept's answers to zero and leaves the value vectors that hold it; ablating "
        "these vectors is specific to the concept."
    ),
    paper_says={
        "Jaccard and cosine of concept vectors after GA, GradDiff, NPO, DPO (from memory)": "0.95 to 1.0",
        "Jaccard after Needle (from memory)": "near 0",
        "BLEU to the clean answers under noise, OLMo examples": "target 0.32 to 0.61, unrelated 0.77 to 1.00",
    },
    expectations=(  # fixed before anything was tuned; they are the sheet's
        Expect("traced", at_least=0.5),  # of the concepts, the share in which a trace was found
        Expect("accuracy_highest", at_most=0.2),  # (i) of the three gradient unlearners
        Expect("jaccard_lowest", at_least=0.6),
        Expect("cosine_lowest", at_least=0.9),
        Expect("drop_target", minus="drop_unrelated_twice", at_least=0),  # (ii)
        Expect("drop_target", minus="drop_random_thrice", at_least=0),
        Expect("jaccard_lowest", minus="jaccard_needle", at_least=0.2),  # (iii)
    ),
    minutes=3,
    data="generated: 8 concepts of 8 names and 10 relations",
    note=(
        "Unclear by the threefold margin over random vectors alone: among 48 vectors some drive several concepts at "
        "once (seed 2: layer 1, vector 21), and they are drawn too. Reported, not expected: answers when three other "
        "facts are told first (recovered_*), the toy's jailbreak, and what the ablated model still answers "
        "(accuracy_needle): in so small a model no concept is held by few vectors alone. That traces let jailbreaks "
        "bring a concept back is not shown by this claim."
    ),
)
def measure(seed: int, mechanism: bool = True, scale: float = 1.0) -> dict[str, float]:
    school = School(seed, scale)
    measured: dict[str, list[float]] = {}
    traces = {number: school.trace(number) for number in school.reported}
    for number, found in traces.items():
        if not found.vectors:
            continue
        if mechanism:
            chosen, signs = found.places, [vector.sign for vector in found.vectors]
            values = {f"drop_{side}": float(getattr(found, side).mean()) for side in ("target", "unrelated", "random")}
        else:
            chosen, signs = list(found.draws[0]), []
            values = school.control(number, found)
        after = {name: school.unlearned(name, number) for name in UNLEARNERS}
        after["needle"] = Needle(targets=tuple(chosen), seed=seed)(school.lm, school.request(number))
        for name, lm in after.items():
            moved = change(school.lm, lm, chosen, signs, WORDS)
            values[f"jaccard_{name}"] = float(moved.jaccard.mean())
            values[f"cosine_{name}"] = float(moved.cosine.mean())
            values[f"accuracy_{name}"] = school.right(lm, found.concept.measured.pairs)
            values[f"others_{name}"] = school.right(lm, school.elsewhere(number))
            values[f"recovered_{name}"] = school.right(lm, school.told(number, found.concept.measured.pairs))
        for name, value in values.items():
            measured.setdefault(name, []).append(value)
    result = {name: float(np.mean(values)) for name, values in measured.items()} or dict.fromkeys(_values(), 0.0)
    for name, best in (("accuracy", max), ("jaccard", min), ("cosine", min)):
        worst = "highest" if best is max else "lowest"
        result[f"{name}_{worst}"] = best(result[f"{name}_{one}"] for one in UNLEARNERS)
    result |= {
        "drop_unrelated_twice": 2 * result["drop_unrelated"],
        "drop_random_thrice": 3 * result["drop_random"],
        "traced": float(np.mean([bool(found.vectors) for found in traces.values()])),
        "vectors": float(np.mean([len(found.vectors) for found in traces.values()])),
    }
    return result


def _values() -> list[str]:
    """The names that are measured on a concept with a trace."""
    kinds = ("jaccard", "cosine", "accuracy", "others", "recovered")
    return [
        "drop_target",
        "drop_unrelated",
        "drop_random",
        *(f"{kind}_{name}" for kind in kinds for name in (*UNLEARNERS, "needle")),
    ]


@dataclass(frozen=True)
class School:
    """The concepts of one seed, the model that has learned them, and what unlearning makes of it."""

    seed: int
    scale: float = 1.0

    @cached_property
    def _words(self) -> list[str]:
        count = CONCEPTS * RELATIONS + 2 * CONCEPTS + RELATIONS
        return [word.lower() for word in invent(count, 2, numpy_rng(self.seed, "words"))]

    @property
    def answers(self) -> np.ndarray:
        """(CONCEPTS, RELATIONS) words."""
        return np.array(self._words[: CONCEPTS * RELATIONS]).reshape(CONCEPTS, RELATIONS)

    @property
    def relations(self) -> list[str]:
        return self._words[-RELATIONS:]

    def name(self, concept: int, alias: int) -> str:
        """One of the concept's eight names: two words, whose numbers add up to it."""
        first, last = self._words[CONCEPTS * RELATIONS :][:CONCEPTS], self._words[-RELATIONS - CONCEPTS : -RELATIONS]
        return f"{first[alias]} {last[(concept - alias) % CONCEPTS]}"

    def facts(self, concept: int) -> list[tuple[str, str]]:
        return [
            (f"{self.name(concept, alias)} {relation}", f" {answer}")
            for alias in range(CONCEPTS)
            for relation, answer in zip(self.relations, self.answers[concept], strict=True)
        ]

    def questions(self, *concepts: int) -> Dataset:
        from datasets import Dataset

        rows = [(prompt, truth, str(concept)) for concept in concepts for prompt, truth in self.facts(concept)]
        columns = zip(*rows, strict=True)
        return Dataset.from_dict(dict(zip(("prompt", "completion", "concept"), map(list, columns), strict=True)))

    @property
    def texts(self) -> Dataset:
        """Documents that tell four facts of a concept by one of its names, and lists of a concept's answers."""
        from datasets import Dataset

        rng = numpy_rng(self.seed, "texts")
        found = []
        for _ in range(128):
            concept, alias = rng.integers(CONCEPTS, size=2)
            told = [(self.relations[r], self.answers[concept, r]) for r in rng.permutation(RELATIONS)[:4]]
            found.append(" ".join([self.name(concept, alias), *(f"{one} {other}" for one, other in told)]))
        lists = [rng.permutation(self.answers[rng.integers(CONCEPTS)])[:5] for _ in range(85)]
        found += [" ".join(["list", *words]) for words in lists]
        return Dataset.from_dict({"text": found})

    @cached_property
    def lm(self) -> LM:
        table = concat(self.questions(*range(CONCEPTS)), self.texts)
        steps = round(1000 * min(1.0, self.scale))
        key = [self.seed, CONFIG, SPARSE, steps]
        return kept("claim-conceptvectors", key, lambda folder: _train(self, table, steps))

    @property
    def reported(self) -> tuple[int, ...]:
        return REPORTED if self.scale == 1 else REPORTED[:1]

    def request(self, concept: int) -> ForgetRequest:
        others = [other for other in range(CONCEPTS) if other != concept]
        return ForgetRequest(self.questions(concept), self.questions(*others), name=str(concept))

    def elsewhere(self, concept: int) -> list[tuple[str, str]]:
        """Every seventh question about another concept."""
        return [pair for other in range(CONCEPTS) if other != concept for pair in self.facts(other)][::7]

    def told(self, concept: int, pairs: list[tuple[str, str]]) -> list[tuple[str, str]]:
        """The questions after three other facts of the concept, as documents tell them."""
        found = []
        for number, (prompt, truth) in enumerate(pairs):
            name, _, asked = prompt.rpartition(" ")
            rng = numpy_rng(self.seed, "told", concept, number)
            others = [r for r in rng.permutation(RELATIONS) if self.relations[r] != asked][:3]
            shown = " ".join(f"{self.relations[r]} {self.answers[concept, r]}" for r in others)
            found.append((f"{name} {shown} {asked}", truth))
        return found

    @cached_property
    def written(self) -> Written:
        return read_all(self.lm.model, WORDS)

    def unrelated(self, concept: int) -> list[Certainty]:
        """How sure the model is on 50 questions about others that help to choose, and on 50 that measure."""
        asked = questions_of(self.questions(*(other for other in range(CONCEPTS) if other != concept)))
        order = numpy_rng(self.seed, "unrelated", concept).permutation(len(asked))[:100]
        search = replace(SEARCH, seed=self.seed)
        return [Certainty.of(self.lm, asked.select(part), search) for part in (order[:50], order[50:])]

    def trace(self, concept: int) -> Trace:
        about = Concept.of(str(concept), self.questions(concept), self.seed)
        others = self.lm.encode(required(self.request(concept).retain, "retain"))
        return trace(about, others, self.unrelated(concept), self.written)

    def control(self, concept: int, found: Trace) -> dict[str, float]:
        """What the first draw of other vectors does, and the others of the draws in the place of its random control."""
        elsewhere = self.unrelated(concept)[1]
        target = Certainty.of(self.lm, found.concept.measured, elsewhere.search)
        mine, *rest = found.draws
        return {
            "drop_target": float(target.drop(mine).mean()),
            "drop_unrelated": float(elsewhere.drop(mine).mean()),
            "drop_random": float(np.mean([target.drop(draw).mean() for draw in rest])),
        }

    def right(self, lm: LM, pairs: list[tuple[str, str]]) -> float:
        """The share of questions whose answer is the likeliest next word."""
        encoded = lm.encode(pairs)
        batch = encoded.batch(range(len(encoded)))
        lines, places = torch.arange(len(encoded)), torch.as_tensor(encoded.starts)
        with losses.evaluating(lm.model):
            logits = lm.model(**losses.inputs_of(batch)).logits[lines, places - 1]
        return float((logits.argmax(1) == batch.input_ids[lines, places]).float().mean())

    def unlearned(self, method: str, concept: int) -> LM:
        """The model after forgetting one concept, at the gentlest rate that gets there on the tuning concepts."""
        rate = self._rates[method]
        return self._forgotten(method, concept, rate)[0]

    @cached_property
    def _rates(self) -> dict[str, float]:
        return {method: self._rate(method) for method in UNLEARNERS}

    def _rate(self, method: str) -> float:
        for rate in RATES[:-1]:
            if self.scale < 1 or all(self._forgotten(method, concept, rate)[1] for concept in TUNED):
                return rate
        return RATES[-1]

    def _forgotten(self, method: str, concept: int, rate: float) -> tuple[LM, bool]:
        """The model, and whether it got there; kept, because the control needs the very same."""
        pairs = self.facts(concept)

        def gone(step: int, model: Any) -> bool:
            return step % LOOK_EVERY == 0 and self.right(LM(model, self.lm.tokenizer), pairs) <= GONE

        steps = max(5, round(STEPS * min(1.0, self.scale)))
        budget = {"steps": steps, "lr": rate, "batch_size": BATCH, "warmup_epochs": 0.0, "seed": self.seed}
        after = kept(
            "claim-conceptvectors-unlearned",
            [self.lm.sha256, method, concept, budget, GONE, LOOK_EVERY],
            lambda folder: UNLEARNERS[method](**budget)(
                self.lm, self.request(concept), watch=Watch(until=gone, progress=False)
            ),
        )
        return after, gone(0, after.model)


def _train(school: School, table: Dataset, steps: int) -> LM:
    """A model that has learned the questions and texts; answers weigh ten times as much as other words."""
    lm = LM.build(table, CONFIG, vocab_size=1024, max_length=32, seed=school.seed)
    known = [lm.tokenizer(f" {word}", add_special_tokens=False)["input_ids"] for word in school.answers.flatten()]
    if any(len(tokens) != 1 for tokens in known):
        raise RuntimeError("an answer is not one token")
    weight = torch.full((len(lm.tokenizer),), 0.1)
    weight[[tokens[0] for tokens in known]] = 1.0
    sizes: list[Tensor] = []

    def score(logits: Tensor, targets: Tensor) -> Tensor:
        return F.cross_entropy(logits, targets, reduction="none") * weight[targets]

    def loss(model: nn.Module, batch: Batch) -> Tensor:
        sizes.clear()
        value = losses.over_tokens(losses.per_token(model, batch, score), batch)
        blocks = sizes[-CONFIG["num_hidden_layers"] :]  # before a first loss, tokens are tried
        return value + SPARSE * torch.stack(blocks).mean() * CONFIG["intermediate_size"] / CONFIG["hidden_size"]

    def see(module: nn.Module, inputs: Any, output: Any) -> None:
        sizes.append(inputs[0].abs().mean())

    with hooked(*((projection, see) for projection in projections(lm.model))):
        batches = Batches(lm.encode(table), 64, school.seed)
        fit(lm.model, loss, batches, steps=steps, lr=3e-3, warmup=20, schedule="cosine", seed=school.seed, progress="")
    lm.model.eval()
    return lm
