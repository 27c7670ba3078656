"""Proto-Triplet and ICNN: two losses on distances that shape the embedding itself, beside the cross-entropy.

"SuSana Distancia is all you need", 2023 (arXiv:2305.09062).  Proto-Triplet pulls a query to its prototype and pushes
it, by a margin, from the nearest wrong one; ICNN is -log of a score in [0, 1] of how clean the nearest neighbours are
(also a measure of an embedding: `icnn_score`).  The total is the plain mean of the chosen losses, as released.
Both depend on the scale of the embedding: a margin of 0.5 is much between unit vectors and nothing between distances of
tens; `relative_margin` ties it to the mean distance of prototypes.
Shapes: E episodes, S supports, Q queries, N classes, d dimensions; M points of one side, T of the other.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from palimpsest.core.errors import InputError, unknown
from palimpsest.core.methods import method
from palimpsest.learn.fewshot.episodic import Batch, class_means, cross_entropy, embedded
from palimpsest.learn.fewshot.prototypical import ProtoNet

Name = Literal["cross-entropy", "proto-triplet", "icnn-support", "icnn-query", "icnn-full"]
LOSSES: tuple[Name, ...] = ("cross-entropy", "proto-triplet", "icnn-support", "icnn-query", "icnn-full")

_ROOT = 1e-6  # inside every square root: its slope at 0 is infinite
_LEAST = 1e-6  # score below which -log is not followed


@method(verb="learn", paper="susana_distancia")
@dataclass(frozen=True, kw_only=True)
class SusanaDistancia(ProtoNet):
    """Prototypical network trained by the mean of several losses on distances: cross-entropy, Proto-Triplet, ICNN."""

    losses: tuple[Name, ...] = ("cross-entropy", "proto-triplet")
    margin: float = 0.5
    relative_margin: bool = False  # the margin in units of the mean distance between prototypes
    neighbours: int = 4
    as_released: bool = False  # drop the nearest neighbour even where a point cannot be its own neighbour

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in self.losses:
            if name not in LOSSES:
                raise unknown("loss", name, LOSSES)
        if not self.losses or self.margin < 0 or self.neighbours < 1:
            raise InputError(f"losses={self.losses}, margin={self.margin}, neighbours={self.neighbours}: nothing to do")

    def loss(self, network: Any, batch: Batch, way: int) -> tuple[Tensor, dict[str, Tensor]]:
        support, query = embedded(network, batch)
        of, labels = batch["support_labels"], batch["labels"]
        if "icnn-support" in self.losses and support.shape[1] == way:
            raise InputError("icnn-support needs at least 2 shots: one alone has no neighbour of its class")
        prototypes = class_means(support, of, way)
        every, classes = torch.cat([support, query], 1), torch.cat([of, labels], 1)

        def icnn(*sides: Tensor, window: int | None = None) -> Tensor:
            scores = [
                icnn_score(*one, k=self.neighbours, window=window, as_released=self.as_released)
                for one in zip(*sides, strict=True)
            ]
            return -torch.stack(scores).clamp_min(_LEAST).log().mean()

        own = torch.arange(way).expand(len(support), -1)
        parts: dict[str, Callable[[], Tensor]] = {
            "cross-entropy": lambda: cross_entropy(self.scores(network, support, of, query, way), labels),
            "proto-triplet": lambda: proto_triplet(prototypes, query, labels, self.margin, self.relative_margin),
            "icnn-support": lambda: icnn(support, of),
            "icnn-query": lambda: icnn(query, labels, prototypes, own),
            "icnn-full": lambda: icnn(every, classes, window=every.shape[1] // way),
        }
        found = {name: parts[name]() for name in self.losses}
        return torch.stack(list(found.values())).mean(), {name: value.detach() for name, value in found.items()}


def distances(a: Tensor, b: Tensor) -> Tensor:
    """(..., M, T) Euclidean distances of (..., M, d) and (..., T, d), with a slope everywhere."""
    return ((a[..., :, None, :] - b[..., None, :, :]).square().sum(-1) + _ROOT).sqrt()


def proto_triplet(
    prototypes: Tensor, query: Tensor, labels: Tensor, margin: float = 0.5, relative: bool = False
) -> Tensor:
    """Mean over queries (E, Q, d) of max(0, distance to the own prototype - to the nearest other + margin).

    Raises InputError for fewer than two classes.
    """
    way = prototypes.shape[1]
    if way < 2:
        raise InputError("the triplet loss needs at least 2 classes: there is no wrong prototype")
    to = distances(query, prototypes)  # (E, Q, N)
    own = torch.nn.functional.one_hot(labels, way).bool()
    wrong = to.masked_fill(own, torch.inf).amin(-1)
    unit = distances(prototypes, prototypes).detach()[:, ~torch.eye(way, dtype=torch.bool)].mean() if relative else 1.0
    return (to[own].view_as(wrong) - wrong + margin * unit).clamp_min(0).mean()


def icnn_score(
    points: Tensor,
    labels: Tensor,
    others: Tensor | None = None,
    other_labels: Tensor | None = None,
    *,
    k: int = 4,
    window: int | None = None,
    as_released: bool = False,
) -> Tensor:
    """How clean the `k` nearest neighbours of each point are: a scalar in [0, 1], 1 for well separated classes.

    `points` (M, d) look for neighbours among `others` (T, d), or among themselves (a point is not its own neighbour).
    `window`: how many neighbours are searched for the nearest of another class; k + 1 by default.
    k becomes T - 2 where there are fewer.  The share of same-class neighbours enters without a gradient, as a count.
    `as_released` also drops the nearest of `others`, as the released code does, which takes it for the point itself.
    Raises InputError where there are fewer than 3 to look among.
    """
    alone = others is None
    others, other_labels = (points, labels) if others is None or other_labels is None else (others, other_labels)
    size = len(others)
    if size < 3 or k < 1:
        raise InputError(f"the ICNN score needs at least 3 points to look among and k >= 1, not {size} and k={k}")
    k = min(k, size - 2)
    to = distances(points, others)
    if alone:  # by place and not as "the nearest": equal points would be taken for one another
        to = to.masked_fill(torch.eye(size, dtype=torch.bool), torch.inf)
    dropped = int(as_released and not alone)
    wanted = min(max(window or k + 1, k) + dropped, size - int(alone))
    near, who = to.topk(wanted, largest=False)
    near, same = near[:, dropped:], (labels[:, None] == other_labels[who])[:, dropped:]

    border = near.masked_fill(same, torch.inf).amin(1)  # (M,): the nearest of another class in the window
    bordered = torch.isfinite(border)
    scale = torch.where(bordered, border, 1.0) + 1e-7  # where, not a product: the gradient of inf * 0 is NaN
    near, same = near[:, :k], same[:, :k]
    u = torch.where(bordered[:, None], near / scale[:, None], 0.0)
    u = u / u.amax(1, keepdim=True).clamp_min(1.0)
    pull = 1 - _mean_of_means(u, same, otherwise=0.0)

    widest = torch.where(same, 0.0, near).max().detach().clamp_min(1e-12)
    push = _mean_of_means(near / widest, ~same, otherwise=1.0)

    purity = 1.0 if k + 2 >= size else same.to(near.dtype).mean()
    return ((pull + push) / 2 + purity) / 2


def _mean_of_means(values: Tensor, mask: Tensor, *, otherwise: float) -> Tensor:
    """The mean over rows of the mean over a row's masked values, rows without any left out; `otherwise` if all are."""
    counts = mask.sum(1)
    rows = torch.where(mask, values, 0.0).sum(1) / counts.clamp_min(1)
    some = counts > 0
    return rows.sum() / some.sum() if bool(some.any()) else values.new_tensor(otherwise)
