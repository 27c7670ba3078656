"""O3's claim: a soft gate and an orthogonal adapter serve a stream of requests without retain data, and keep the rest.

Eight subjects of invented facts, asked in natural words, are learned by a small Llama; four of them must go, one after
the other. Two others are near neighbours: they are asked in the same sentences about another profession, and share
their answers. Two are far away. One phrasing of each fact is held out. Every variant gets the same steps a request;
gradient difference and NPO are given the neighbours as retain records, and train all weights. The learning rate of
each was chosen from three on other facts (seed 1000), by the same score.

The negative control takes the idea out: no gate (every prompt gets the whole adapter) and no orthogonality.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np
from torch import Tensor

from palimpsest.claims import Expect, claim
from palimpsest.core.watch import Watch
from palimpsest.data.request import ForgetRequest
from palimpsest.data.subjects import NEAR, Fact, facts, table
from palimpsest.forget.ascent import GradDiff
from palimpsest.forget.eco import Question
from palimpsest.forget.o3 import O3, O3Guard
from palimpsest.forget.preference import NPO
from palimpsest.models.detector import Detector, features
from palimpsest.models.kept import kept, trained
from palimpsest.models.lm import LM
from palimpsest.models.train import Recipe

if TYPE_CHECKING:
    from datasets import Dataset

REQUESTS = ("composer", "chemist", "captain", "climber")  # in this order
FAR = ("chef", "striker")

STEPS = 40  # a request
BATCH = 32
RANK = 4
RATES = {"o3": 3e-3, "graddiff": 1e-3, "npo": 3e-4}
_QUIET = Watch(progress=False)


@claim(
    paper="o3",
    statement=(
        "Without any retained data, a detector of what belongs to a request, as a soft gate on one adapter that is "
        "trained orthogonally to its past, forgets a stream of requests and keeps near and far subjects."
    ),
    paper_says={
        "U2R on question answering: O3, next best": "4.70, 2.86",
        "ScienceQA, lambda 0.1 against 0: neighbours kept": "57.8 against 55.5",
        "the same: left of the forgotten": "27.0 against 29.6",
        "AUROC of the detector": "above 0.95 on both tasks",
    },
    expectations=(  # fixed before anything was tuned, from the sheet; points of right answers, chance being 25
        Expect("utility_before", minus="utility_o3", at_most=3),
        Expect("utility_before", minus="utility_sequential", at_least=15),
        Expect("worst_request", at_most=35),
        Expect("auroc_far", at_least=0.95),
        Expect("auroc_near", at_least=0.8),
        Expect("kept_o3", minus="kept_free", at_least=0),  # the orthogonality
        Expect("score_o3", minus="score_plain", at_least=1),  # else the novel parts are not what works
        Expect("score_o3", minus="score_graddiff", at_least=0),
        Expect("score_o3", minus="score_npo", at_least=0),
    ),
    minutes=3,
    data="generated: 256 facts of 8 subjects in natural words, 4 subjects to forget one after the other",
    note=(
        "All after the fourth request. forget: of the four requests, as trained on; unseen: the same in held-out "
        "phrasings; kept: mean of neighbours and utility (far subjects); score: kept less forget. sequential: no gate; "
        "free: lambda 0; hard: the gate opens from the lowest score of a request's own prompts on; oracle: the true "
        "subject opens it; separate: an adapter a request, the surest detector's; plain: lambda 0 and an untrained "
        "gate of nearest neighbours by cosine. came_back: the most that a request regains while later ones are served. "
        "It fails on the adapter: A is pushed away from what B was trained on, so earlier requests come back while "
        "later ones are served; without the penalty they hardly do. The gate alone does the keeping, and an untrained "
        "one of nearest neighbours does it as well at this scale."
    ),
)
def measure(seed: int, mechanism: bool = True, scale: float = 1.0) -> dict[str, float]:
    stage = _Stage.set_up(seed, scale)
    method, free = stage.method(), stage.method(orthogonality=0.0)
    if mechanism:
        gate = _Gate.learned(stage.prompts, [stage.detector(subject) for subject in REQUESTS])
    else:
        method, gate = free, _Gate.open(len(stage.prompts))
    loose = stage.adapters(free)
    held = stage.adapters(method) if mechanism else loose
    whole = np.ones(len(stage.prompts))
    points = {
        "before": stage.bare,
        "o3": stage.right(held[-1], gate.soft.max(1)),
        "free": stage.right(loose[-1], gate.soft.max(1)),
        "hard": stage.right(held[-1], gate.hard.max(1)),
        "oracle": stage.right(held[-1], stage.of(*REQUESTS).astype(float)),
        "plain": stage.right(loose[-1], stage.nearest().max(1)),
        "sequential": stage.right(loose[-1], whole),
        "separate": stage.separate(method, gate.soft),
        **{name: stage.points(stage.baseline(name)) for name in ("graddiff", "npo")},
    }
    values = {f"{what}_{name}": number for name, one in points.items() for what, number in stage.summary(one).items()}
    values["worst_request"] = max(float(points["o3"][stage.of(subject) & stage.told].mean()) for subject in REQUESTS)
    values["came_back"] = stage.came_back(held, gate.soft, points["o3"])
    values |= {f"auroc_{where}": number for where, number in stage.auroc(gate.scores).items()}
    values["loaded_far"] = float((gate.soft.max(1)[stage.of(*FAR)] > 0.1).mean())
    return values


@dataclass(frozen=True)
class _Gate:
    """What the detectors of the requests say of every prompt, (N, requests) each."""

    scores: np.ndarray
    soft: np.ndarray  # the weights
    hard: np.ndarray  # 1 from the lowest score of a request's own prompts on, else 0

    @staticmethod
    def learned(prompts: list[str], detectors: Sequence[Detector]) -> _Gate:
        scores = np.stack([one.score(features(prompts, one.encoder, one.factors)) for one in detectors], 1)
        soft = np.stack([one.weight_of(column) for one, column in zip(detectors, scores.T, strict=True)], 1)
        lowest = np.array([one.score(one.used.numpy()).min() for one in detectors])
        return _Gate(scores, soft, (scores >= lowest).astype(float))

    @staticmethod
    def open(prompts: int) -> _Gate:
        shape = (prompts, len(REQUESTS))
        return _Gate(np.zeros(shape), np.ones(shape), np.ones(shape))


@dataclass(frozen=True, eq=False)
class _Stage:
    """The model of one seed, and what it is asked: the requests' facts as it read them, and all as it did not."""

    seed: int
    scale: float
    facts: list[Fact]
    before: LM = field(repr=False)

    @staticmethod
    def set_up(seed: int, scale: float) -> _Stage:
        known = facts(seed, max(3, round(8 * scale)))
        config = {"model_type": "llama", "hidden_size": 64, "intermediate_size": 192, "num_hidden_layers": 2}
        config |= {"num_attention_heads": 4, "tie_word_embeddings": True, "initializer_range": 0.06}
        everything = table(known)
        start = LM.build(everything, config, vocab_size=768, max_length=64, seed=seed)
        recipe = Recipe(steps=max(60, round(350 * scale)), lr=4e-3, batch_size=48, seed=seed)
        return _Stage(seed, scale, known, trained(start, everything, recipe, progress=False))

    @cached_property
    def asked(self) -> list[tuple[Fact, int]]:
        """Facts with the number of the phrasing that is asked."""
        return [(one, 0) for one in self.facts if one.subject in REQUESTS] + [(one, 2) for one in self.facts]

    @cached_property
    def questions(self) -> list[Question]:
        return [
            Question(one.asked[place], tuple(f" {option}" for option in one.options), one.options.index(one.answer))
            for one, place in self.asked
        ]

    @property
    def prompts(self) -> list[str]:
        return [question.prompt for question in self.questions]

    @property
    def told(self) -> np.ndarray:
        """(N,) bool: the questions in a phrasing that was read."""
        return np.array([place != 2 for _, place in self.asked])

    def of(self, *subjects: str) -> np.ndarray:
        """(N,) bool: the questions about any of the subjects."""
        return np.array([one.subject in subjects for one, _ in self.asked])

    def request(self, *subjects: str) -> Dataset:
        return table([one for one in self.facts if one.subject in subjects])

    @property
    def budget(self) -> dict[str, Any]:
        return {"steps": max(4, round(STEPS * self.scale)), "batch_size": BATCH, "seed": self.seed}

    def method(self, **changes: Any) -> O3:
        settings = {"lr": RATES["o3"], "lora_rank": RANK, "lora_alpha": 2.0 * RANK}
        settings["detector_epochs"] = 2 if self.scale >= 1 else 0  # tuning takes longest of all at a small scale
        return O3(**self.budget, **(settings | changes))

    def detector(self, subject: str) -> Detector:
        return self.method().detector(self.before, self.request(subject), watch=_QUIET)

    def adapters(self, method: O3) -> list[dict[str, Tensor]]:
        """The adapter after each request."""
        found: list[dict[str, Tensor]] = []
        past: list[dict[str, Tensor]] = []
        for subject in REQUESTS:
            factors = method.adapter(self.before, self.request(subject), past, found[-1] if found else None, _QUIET)
            found.append(factors)
            past.append({name.removesuffix(".down"): value for name, value in factors.items() if ".down" in name})
        return found

    def right(self, factors: dict[str, Tensor], strength: np.ndarray) -> np.ndarray:
        """(N,) points of each question, with the adapter as strong as said for each prompt."""
        given = dict(zip(self.prompts, strength, strict=True))
        guarded = self.before.with_guard(_Given(factors, self.method().lora_alpha, (), strength=given))
        found, loaded = self.bare.copy(), np.flatnonzero(strength)
        if len(loaded):  # the others are answered by the very same model
            found[loaded] = self.points(guarded, loaded)
        return found

    @cached_property
    def bare(self) -> np.ndarray:
        return self.points(self.before)

    def points(self, lm: LM, rows: np.ndarray | None = None) -> np.ndarray:
        """Points of each question, or of some: 100 where the likeliest option a token is the right one."""
        questions = [self.questions[row] for row in (range(len(self.questions)) if rows is None else rows)]
        pairs = [(question.prompt, option) for question in questions for option in question.options]
        means = np.array([float(values.mean()) for values in lm.token_logprobs(pairs)]).reshape(-1, 4)
        return 100.0 * (means.argmax(1) == [question.right for question in questions])

    def separate(self, method: O3, soft: np.ndarray) -> np.ndarray:
        """With an adapter of its own for each request, of which a prompt gets the surest detector's."""
        chosen, strength = soft.argmax(1), soft.max(1)
        found = np.empty(len(self.questions))
        for number, subject in enumerate(REQUESTS):
            factors = method.adapter(self.before, self.request(subject), watch=_QUIET)
            mine = chosen == number
            found[mine] = self.right(factors, np.where(mine, strength, 0.0))[mine]
        return found

    def baseline(self, name: str) -> LM:
        """Weights trained request by request, with the neighbours as retain records."""
        key = [self.before.sha256, name, RATES[name], self.budget]
        return kept("claim-o3", key, lambda folder: self._baseline(name))

    def _baseline(self, name: str) -> LM:
        make: Callable[..., Any] = {"graddiff": GradDiff, "npo": NPO}[name]
        retain = self.request(*NEAR.values())
        lm = self.before
        for subject in REQUESTS:
            request = ForgetRequest(forget=self.request(subject), retain=retain)
            lm = make(lr=RATES[name], **self.budget)(lm, request, watch=_QUIET)
        return lm

    def nearest(self) -> np.ndarray:
        """(N, requests) 1 where the nearest prompt of a request is at least as near as 95% of its own are to another
        of them: the untrained gate."""
        asked = _directions(self.prompts)
        found = []
        for subject in REQUESTS:
            bank = _directions(self.request(subject)["prompt"])
            own = bank @ bank.T - 2 * np.eye(len(bank))
            found.append((asked @ bank.T).max(1) >= np.quantile(own.max(1), 0.05))
        return np.stack(found, 1).astype(float)

    def summary(self, points: np.ndarray) -> dict[str, float]:
        requests, told = self.of(*REQUESTS), self.told
        values = {
            "forget": points[requests & told].mean(),
            "unseen": points[requests & ~told].mean(),
            "neighbours": points[self.of(*NEAR.values()) & ~told].mean(),
            "utility": points[self.of(*FAR) & ~told].mean(),
        }
        values["kept"] = (values["neighbours"] + values["utility"]) / 2
        values["score"] = values["kept"] - values["forget"]
        return {name: float(value) for name, value in values.items()}

    def came_back(self, stream: list[dict[str, Tensor]], soft: np.ndarray, last: np.ndarray) -> float:
        rises = []
        for number, subject in enumerate(REQUESTS[:-1]):
            mine = self.of(subject) & self.told
            then = self.right(stream[number], soft[:, : number + 1].max(1))
            rises.append(float(last[mine].mean() - then[mine].mean()))
        return max(rises)

    def auroc(self, scores: np.ndarray) -> dict[str, float]:
        """How well each request's held-out phrasings are told from neighbours and from far subjects."""
        from sklearn.metrics import roc_auc_score

        found: dict[str, list[float]] = {"near": [], "far": []}
        for subject, column in zip(REQUESTS, scores.T, strict=True):
            others = {"far": self.of(*FAR)} | ({"near": self.of(NEAR[subject])} if subject in NEAR else {})
            for where, other in others.items():
                asked = (self.of(subject) | other) & ~self.told
                found[where].append(roc_auc_score(self.of(subject)[asked], column[asked]))
        return {where: float(np.mean(numbers)) for where, numbers in found.items()}


def _directions(texts: list[str]) -> np.ndarray:
    """(N, D) of length one: the sentence embeddings of the encoder as it came."""
    found = features(texts)[:, -1]
    return found / np.linalg.norm(found, axis=1, keepdims=True)


@dataclass(frozen=True, eq=False)
class _Given(O3Guard):
    """A guard that is told how much of the adapter each prompt gets."""

    strength: dict[str, float] = field(default_factory=dict)

    def weights(self, prompts: Sequence[str]) -> np.ndarray:
        return np.array([self.strength[prompt] for prompt in prompts])
