"""Skill unlearning's claim: a skill shows in the feed-forward neurons, enough to shift it away there, or to refuse it.

A small Llama learns four skills: reversing and sorting lists, adding one to digits, and the homes of invented people.
One must go (reversing, then adding).  Neuron Adjust and selective pruning are run at a grid of shares of neurons, and
judged by the lowest accuracy on the skill that leaves every other skill at 90% or more; Key Space Detection once with
place and size chosen on held-out prompts, once as released.  Probes are of two phrasings; a third, which the model was
never trained on, is what all are tested on.  Accuracies are relative to the model's own before.

The negative control switches off what tells the skill: the same probe records, mixed so that the forget probes hold as
much of every other skill as the retain probes do.  Methods, budgets and tests stay.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from palimpsest.claims import Expect, claim
from palimpsest.core.seeds import numpy_rng
from palimpsest.data.request import ForgetRequest
from palimpsest.forget.key_space import KeySpace, KeySpaceDetection, prompts_of, queries
from palimpsest.forget.probing import Moments, pooled_keys
from palimpsest.forget.skill_unlearning import NeuronAdjust, SelectivePruning
from palimpsest.models.kept import trained
from palimpsest.models.lm import LM
from palimpsest.models.train import Recipe

if TYPE_CHECKING:
    from datasets import Dataset

CONFIG = {
    "model_type": "llama",
    "hidden_size": 64,
    "intermediate_size": 192,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "tie_word_embeddings": True,
    "initializer_range": 0.06,
}
TARGETS = ("reverse", "add")
PHRASINGS = {  # the two that are trained; the third is the second's word in the first's form
    "reverse": ("reverse : {} ->", "flip of {} ->", "flip : {} ->"),
    "sort": ("sort : {} ->", "order of {} ->", "order : {} ->"),
    "add": ("next : {} ->", "plus of {} ->", "plus : {} ->"),
    "facts": ("home : {} ->", "town of {} ->", "town : {} ->"),
}
PROBES = 200
TESTED = 50  # prompts a skill
SHARES = (3.0, 10.0, 40.0)  # percent of the neurons: of 576 there are few, so the paper's 0.5 to 3 move next to nothing
KEPT = 0.9
LEARNED = 0.8  # accuracy below which there is no skill to forget

EXPECTATIONS = (  # fixed before anything was tuned; they are the sheet's
    Expect("gap", at_least=1.0),  # (1) median distance of means of the top 1% of neurons, in deviations
    Expect("detection_forget", at_most=0.2),  # (2) of the worse of the two skills
    Expect("detection_others", at_least=KEPT),  # of the worst of all others
    Expect("adjust_gain", at_least=0.05),  # (3) below pruning, at equal retention, on one of the skills
    Expect("adjust_forget", minus="detection_forget", at_least=0),  # (4) detection does at least as well
    Expect("box_right", minus="centroid_right", at_least=-0.05),  # a simpler detector does not beat the box everywhere
)


@claim(
    paper="skill_unlearning",
    statement="A skill is removed without training by refusing prompts whose feed-forward keys lie in the skill's box.",
    paper_says={
        "GSM8K left by KSD, Llama-3-8B, of 1": "0.16, other skills 1.0",
        "GSM8K left by Neuron Adjust at 3%": "0.39, the other skill 0.76, MMLU 0.96",
        "GSM8K left by selective pruning": "0.17, the other skill 0.93, MMLU 0.94",
        "MBPP left by KSD": "0.01, other skills 0.95 and 1.0",
    },
    expectations=EXPECTATIONS,
    minutes=3,
    data="generated: three list skills and 60 facts",
)
def measure(seed: int, mechanism: bool = True, scale: float = 1.0) -> dict[str, float]:
    skills = Skills(seed, scale)
    before = skills.accuracies(skills.lm)
    if scale == 1 and min(before.values()) < LEARNED:
        raise RuntimeError(f"a skill was not learned, so it cannot be forgotten: {before}")
    found = [_one(skills, target, before, mechanism) for target in TARGETS]
    worst: dict[str, Callable[..., float]] = {
        "gap": min,
        "detection_others": min,
        "released_others": min,
        "adjust_gain": max,
        "box_right": max,
        "centroid_right": max,
    }
    measured = {name: worst.get(name, max)(one[name] for one in found) for name in found[0]}
    return {**measured, **{f"before_{skill}": value for skill, value in before.items()}}


def _one(skills: Skills, target: str, before: dict[str, float], mechanism: bool) -> dict[str, float]:
    request = skills.request(target, mixed=not mechanism)

    def after(method: Any) -> tuple[float, float]:
        """Relative accuracy on the skill, and the lowest on another."""
        left = skills.accuracies(method(skills.lm, request))
        relative = {skill: left[skill] / max(before[skill], 1e-9) for skill in left}
        return relative.pop(target), min(relative.values())

    lowest = {}
    methods: dict[str, Callable[[float], Any]] = {
        "adjust": lambda share: NeuronAdjust(percent=share, seed=skills.seed),
        "pruning": lambda share: SelectivePruning(percent=share),
    }
    for name, method in methods.items():
        tried = [after(method(share)) for share in SHARES]
        lowest[name] = min([forget for forget, others in tried if others >= KEPT], default=1.0)
    detector = KeySpaceDetection(seed=skills.seed)
    detected = after(detector)
    released = after(KeySpaceDetection(layer=-1, pooling="last", alpha=2.0, seed=skills.seed))
    box, centroid = skills.detections(target, request, detector)
    return {
        "gap": skills.gap(request),
        "detection_forget": detected[0],
        "detection_others": detected[1],
        "released_forget": released[0],
        "released_others": released[1],
        "adjust_forget": lowest["adjust"],
        "pruning_forget": lowest["pruning"],
        "adjust_gain": lowest["pruning"] - lowest["adjust"],
        "box_right": box,
        "centroid_right": centroid,
    }


@dataclass(frozen=True)
class Skills:
    """The four skills, and a model that has them."""

    seed: int
    scale: float = 1.0

    @cached_property
    def homes(self) -> dict[str, str]:
        rng = numpy_rng(self.seed, "homes")
        syllables = [first + vowel for first in "bdgklmnprtvz" for vowel in "aeiou"]
        names = rng.permutation([one + other for one in syllables for other in syllables if one != other]).tolist()
        return {name.capitalize(): names[60 + int(rng.integers(12))] for name in names[:60]}

    def question(self, skill: str, rng: np.random.Generator) -> tuple[str, str]:
        """What is asked about, and the answer."""
        if skill == "facts":
            return list(self.homes.items())[int(rng.integers(len(self.homes)))]
        if skill == "add":
            digits = rng.integers(9, size=4)
            return " ".join(map(str, digits)), " ".join(map(str, digits + 1))
        letters = rng.permutation(list("abcdefgh"))[:4].tolist()
        answer = letters[::-1] if skill == "reverse" else sorted(letters)
        return " ".join(letters), " ".join(answer)

    def table(self, skill: str, count: int, purpose: str, phrasings: slice = slice(0, 2)) -> Dataset:
        from datasets import Dataset

        rng = numpy_rng(self.seed, purpose, skill)
        known = PHRASINGS[skill][phrasings]
        rows = [(known[number % len(known)], *self.question(skill, rng)) for number in range(count)]
        prompts = [phrasing.format(asked) for phrasing, asked, _ in rows]
        return Dataset.from_dict({"prompt": prompts, "completion": [answer for *_, answer in rows]})

    @cached_property
    def lm(self) -> LM:
        from palimpsest.data.records import concat

        rows = concat(*(self.table(skill, 4000 if skill != "facts" else 1000, "training") for skill in PHRASINGS))
        start = LM.build(rows, CONFIG, vocab_size=420, max_length=64, seed=self.seed)
        recipe = Recipe(steps=round(1200 * min(1.0, self.scale)), lr=2e-3, batch_size=64, seed=self.seed)
        return trained(start, rows, recipe, progress=False)

    def request(self, target: str, *, mixed: bool) -> ForgetRequest:
        """Probe records, of phrasings that were trained; `mixed`, the two sets hold the same skills."""
        from palimpsest.data.records import concat

        others = [skill for skill in PHRASINGS if skill != target]
        forget = _distinct(self.table(target, 2 * PROBES, "probes"), PROBES)
        retain = concat(*(_distinct(self.table(skill, PROBES, "probes"), PROBES // len(others)) for skill in others))
        if mixed:
            both = concat(forget, retain)
            order = numpy_rng(self.seed, "mixed").permutation(len(both)).tolist()
            forget, retain = both.select(order[: len(forget)]), both.select(order[len(forget) :])
        return ForgetRequest(forget=forget, retain=retain)

    @cached_property
    def tests(self) -> dict[str, Dataset]:
        count = max(10, round(TESTED * min(1.0, self.scale)))
        return {skill: self.table(skill, count, "tests", slice(2, 3)) for skill in PHRASINGS}

    def accuracies(self, lm: LM) -> dict[str, float]:
        """The share of right answers to the third phrasing, by skill."""
        prompts = [prompt for table in self.tests.values() for prompt in table["prompt"]]
        answers = iter(lm.generate(prompts, max_new_tokens=8))
        return {
            skill: float(np.mean([next(answers).strip() == truth for truth in table["completion"]]))
            for skill, table in self.tests.items()
        }

    def gap(self, request: ForgetRequest) -> float:
        """Median over the top 1% of neurons of |mean_f - mean_r|, in root mean square deviations."""
        there, here = (Moments.of(self.lm, self.lm.encode(table)) for table in (request.forget, request.retain))
        pairs = zip(there.mean, here.mean, there.deviation, here.deviation, strict=True)
        gaps = torch.cat([(a - b).abs() / ((s.square() + t.square()) / 2).sqrt() for a, b, s, t in pairs])
        return float(gaps.topk(max(1, len(gaps) // 100)).values.median())

    def detections(self, target: str, request: ForgetRequest, detector: KeySpaceDetection) -> tuple[float, float]:
        """Balanced accuracy on the third phrasing of the box, and of the nearest of two centroids of the same keys."""
        guard = detector(self.lm, request).guard
        assert isinstance(guard, KeySpace)
        fence = guard.fences[0]
        place = (fence.layer, fence.pooling)

        def keys(prompts: list[str]) -> torch.Tensor:
            return pooled_keys(self.lm, prompts_of(self.lm, prompts), [place])[place]

        there, here = (keys(queries(self.lm, table)).mean(0) for table in (request.forget, request.retain))
        inside = keys(list(self.tests[target]["prompt"]))
        outside = keys([prompt for skill, table in self.tests.items() if skill != target for prompt in table["prompt"]])
        rules: list[Callable[[torch.Tensor], torch.Tensor]] = [
            lambda found: fence.box.reach(found) <= fence.alpha,
            lambda found: (found - there).norm(dim=1) < (found - here).norm(dim=1),
        ]
        box, centroid = (float((rule(inside).float().mean() + 1 - rule(outside).float().mean()) / 2) for rule in rules)
        return box, centroid


def _distinct(table: Dataset, count: int) -> Dataset:
    """The first `count` different records."""
    first = {prompt: row for row, prompt in reversed(list(enumerate(table["prompt"])))}
    return table.select(sorted(first.values())[:count])
