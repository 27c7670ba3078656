"""Nearest mean classifier: a running mean of frozen features for each class, and the nearest mean is the answer.

"A Simple Baseline that Questions the Use of Pretrained-Models in Continual Learning", 2022 (arXiv:2210.04428).  Needs
features of a pretrained encoder; learns nothing, keeps no example, and neither order nor task borders matter to it.
Class means are sums and counts in float64, so a class or an example can be taken out exactly, and states add up.
It cannot be better than the features: report it on an encoder without pretraining as well.
Shapes: C classes, D features, Q queries.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from palimpsest.core.errors import InputError, unknown
from palimpsest.core.methods import method
from palimpsest.core.watch import Watch
from palimpsest.data.tasks import Examples
from palimpsest.learn.continual.continual import ContinualLearner, Known, grown

Rule = Literal["euclidean", "cosine"]
RULES: tuple[Rule, ...] = ("euclidean", "cosine")


@method(verb="learn", paper="nmc")
@dataclass(frozen=True)
class NMC(ContinualLearner):
    """Nearest mean classifier: one mean of frozen features a class, no gradient, no kept example.

    `rule`: "euclidean" leaves the means as long as they are, as released, so that spread classes have short ones;
    "cosine" brings them to length one.
    """

    rule: Rule = "euclidean"

    def __post_init__(self) -> None:
        if self.rule not in RULES:
            raise unknown("rule", self.rule, RULES)

    def start(self) -> Means:
        return Means(self)

    def update(self, known: Known, z: Tensor, y: Tensor, watch: Watch | None) -> dict[str, Tensor]:
        before, size = known.tensors or {}, len(known.names)
        new = torch.zeros(size, z.shape[1], dtype=torch.float64).index_add_(0, y, z)
        return {
            "sums": grown(before.get("sums"), size, z.shape[1]) + new,
            "counts": grown(before.get("counts"), size, kind=torch.int64) + torch.bincount(y, minlength=size),
        }

    def scores(self, known: Known, z: Tensor) -> Tensor:
        """Minus the squared distance to each mean."""
        assert isinstance(known, Means)
        means = known.means
        if self.rule == "cosine":
            means = torch.nn.functional.normalize(means)
        return -(z.square().sum(1, keepdim=True) - 2 * z @ means.T + means.square().sum(1))


@dataclass(frozen=True, eq=False)
class Means(Known):
    """Sums (C, D) and counts (C,) of the classes met."""

    @property
    def means(self) -> Tensor:
        """(C, D)"""
        assert self.tensors is not None
        return self.tensors["sums"] / self.tensors["counts"][:, None]

    def forget(self, *names: str) -> Means:
        """Without these classes: exactly what would be known had they never come.  InputError for an unknown one."""
        missing = [name for name in names if name not in self.names]
        if missing:
            raise InputError(f"no class '{missing[0]}' has been met")
        return self._only([place for place, name in enumerate(self.names) if name not in names])

    def forget_examples(self, examples: Examples) -> Means:
        """Without these examples, which must have been observed; a class without any left is gone."""
        taken = replace(self.learner.start(), names=()).observe(examples)
        unmet = [name for name in taken.names if name not in self.names]
        if unmet:
            raise InputError(f"no class '{unmet[0]}' has been met")
        assert self.tensors is not None
        sums, counts = self.tensors["sums"].clone(), self.tensors["counts"].clone()
        places = torch.tensor([self.names.index(name) for name in taken.names])
        sums[places] -= taken.tensors["sums"]
        counts[places] -= taken.tensors["counts"]
        if (counts < 0).any():
            name = self.names[int(counts.argmin())]
            raise InputError(f"more examples of '{name}' to forget than were observed")
        left = replace(self, tensors={"sums": sums, "counts": counts})
        return left._only(torch.nonzero(counts).flatten().tolist())

    def merge(self, other: Means) -> Means:
        """What is known from both streams together."""
        if not other.names or not self.names:
            return self if self.names else other
        if self.dimensions != other.dimensions or self.learner.normalise != other.learner.normalise:
            raise InputError("the two states are of different features")
        names = (*self.names, *(name for name in other.names if name not in self.names))
        places = torch.tensor([names.index(name) for name in other.names])
        assert self.tensors is not None
        assert other.tensors is not None
        tensors = {}
        for name, value in self.tensors.items():
            both = grown(value, len(names), *value.shape[1:], kind=value.dtype)
            tensors[name] = both.index_add_(0, places, other.tensors[name])
        return replace(self, names=names, tensors=tensors, observed=self.observed + other.observed)

    def _only(self, places: list[int]) -> Means:
        assert self.tensors is not None
        tensors = {name: value[places] for name, value in self.tensors.items()}
        return replace(self, names=tuple(self.names[place] for place in places), tensors=tensors)
