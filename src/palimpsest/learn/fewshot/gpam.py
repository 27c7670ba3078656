"""GPAM: Gaussian prototypes and a radius that adapts, for episodes where many queries belong to none of the classes.

2024 (arXiv:2410.20320).  Only the abstract could be read: that there are semi-factual views, Gaussian prototypes and a
learned border with negative sampling is the paper's; their formulas here are our reconstruction.
A class is a mean and a diagonal variance, shrunk towards one shared by all classes (from 1 to 5 examples a variance of
its own is noise).  A query is "none of the above" when it lies outside the radius of its nearest class, and the radius
grows with the distance to that class's nearest neighbour.
Needs: training episodes with such queries (`nota` > 0).  Semi-factual views, if wanted, come as a second axis of the
features (M, V, D), the original first: `models.features` makes them for relations.
Shapes: E episodes, S supports, V views, Q queries, N classes, d dimensions.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from palimpsest.core.errors import InputError
from palimpsest.core.methods import method
from palimpsest.learn.fewshot.episodic import Batch, Network, class_means, cross_entropy, embedded
from palimpsest.learn.fewshot.open_set import OpenSet, with_none
from palimpsest.models.convnet import SPREAD, network_for

_LEVEL = 10.0  # the distance at which a query of a class is expected: d^2 / v averaged over dimensions, times this
_BETWEEN = (0.35, 0.65)  # where on the way from class to class a made-up negative lies
_FLOOR = 0.05  # least variance, in units of that of scaled features


class Prototypes(NamedTuple):
    """The classes of episodes."""

    means: Tensor  # (E, N, d)
    variances: Tensor  # (E, N, d)
    near: Tensor  # (E, N): Gaussian distance of the nearest other mean
    radii: Tensor  # (E, N)


@method(verb="learn", paper="gpam")
@dataclass(frozen=True, kw_only=True)
class GPAM(OpenSet):
    """Gaussian prototypes with an adaptive radius: tells the classes of an episode from none of them."""

    shrinkage: float = 8.0  # how many examples the shared variance counts for
    slope: float = 0.2  # of the radius in the distance to the nearest class, at the start of training
    margin: float = 0.15  # of that distance: how far inside or outside the radius a query should lie
    boundary_weight: float = 0.1
    view_weight: float = 0.1
    own_weight: float = 2.0  # log-weight of an example against each of its views, at the start
    made_up: int = 5  # negatives an episode made between two classes
    warm_up: float = 0.2  # share of the training without made-up negatives
    gaussian: bool = True  # False: one fixed variance for all dimensions, so that prototypes are points
    adaptive: bool = True  # False: one learned radius for all classes and episodes

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.shrinkage <= 0 or self.made_up < 0 or not 0 <= self.warm_up <= 1:
            raise InputError(
                f"shrinkage={self.shrinkage}, made_up={self.made_up}, warm_up={self.warm_up} are out of range"
            )

    def build(self, x: Any, way: int) -> nn.Module:
        encoder = network_for(x, width=self.width, norm=self.norm)
        d = encoder.dimensions
        shared = torch.full((d,), math.log(math.expm1(1.0)))  # softplus of it is 1
        return Network(
            encoder,
            shared=nn.Parameter(shared, requires_grad=self.gaussian),
            radius=nn.Parameter(torch.tensor(_LEVEL)),
            slope=nn.Parameter(torch.tensor(self.slope), requires_grad=self.adaptive),
            views=nn.Parameter(torch.tensor([self.own_weight] + [0.0] * (x.shape[1] - 1 if len(x.shape) == 3 else 0))),
        )

    def scores(self, network: Any, support: Tensor, labels: Tensor, query: Tensor, way: int) -> Tensor:
        classes = self.prototypes(network, support, labels, way)
        to = self.distance(classes, original(query))
        return with_none(-to, -nearest_radius(to, classes.radii))

    def prototypes(self, network: Any, support: Tensor, labels: Tensor, way: int) -> Prototypes:
        """Means, shrunk variances and radii from (E, S, [V,] d) supports."""
        d = support.shape[-1]
        unit = SPREAD / (2 * d)  # the variance of one dimension of scaled features
        shared = F.softplus(network.shared) * unit
        means = class_means(attended(network, support), labels, way)
        if self.gaussian:
            every = support.flatten(1, 2) if support.ndim == 4 else support
            of = labels.repeat_interleave(every.shape[1] // labels.shape[1], dim=1)
            members = F.one_hot(of, way).to(support.dtype).transpose(1, 2)  # (E, N, S V)
            away = (every[:, None] - class_means(every, of, way)[:, :, None]).square()
            counts = members.sum(-1, keepdim=True)
            # the sample variance times its examples; a single one says nothing, and counts for nothing
            sums = (members[..., None] * away).sum(2) * (counts / (counts - 1).clamp_min(1))
            counts = torch.where(counts > 1, counts, 0.0)
            variances = (sums + self.shrinkage * shared) / (counts + self.shrinkage)
        else:
            variances = torch.full_like(means, unit)
        variances = variances.clamp_min(_FLOOR * unit)
        bare = Prototypes(means, variances, means[..., 0], means[..., 0])
        between = self.distance(bare, means)  # (E, N, N): of each mean, under each class
        near = between.masked_fill(torch.eye(way, dtype=torch.bool), torch.inf).amin(1).clamp_min(0)
        radii = network.radius + (network.slope * near if self.adaptive else torch.zeros_like(near))
        return Prototypes(means, variances, near, radii)

    def distance(self, classes: Prototypes, query: Tensor) -> Tensor:
        """(E, Q, N) Gaussian distances of (E, Q, d): scaled squares plus log-variances centred over the classes."""
        inverse = 1 / classes.variances
        cross = query @ (classes.means * inverse).transpose(1, 2)
        squares = query.square() @ inverse.transpose(1, 2) - 2 * cross
        squares = squares + (classes.means.square() * inverse).sum(-1)[:, None]
        volume = classes.variances.log().sum(-1)
        volume = volume - volume.mean(-1, keepdim=True)
        return (squares + volume[:, None]) * (_LEVEL / query.shape[-1])

    def loss(self, network: Any, batch: Batch, way: int) -> tuple[Tensor, dict[str, Tensor]]:
        support, query = embedded(network, batch)
        classes = self.prototypes(network, support, batch["support_labels"], way)
        query_z, labels = original(query), batch["labels"]
        if self.made_up and int(batch["number"][0]) >= self.warm_up * self.steps * self.episodes:
            query_z = torch.cat([query_z, between_classes(classes.means, self.made_up)], 1)
            labels = torch.cat([labels, labels.new_full((len(labels), self.made_up), way)], 1)
        to = self.distance(classes, query_z)
        value = cross_entropy(with_none(-to, -nearest_radius(to, classes.radii)), labels)
        edge = boundary(to, labels, classes, self.margin)
        value = value + self.boundary_weight * edge
        logs = {"boundary": edge.detach(), "radius": classes.radii.detach().mean()}
        if support.ndim == 4 and support.shape[2] > 1 and self.view_weight:
            apart = torch.cat([views_apart(support), views_apart(query)], 1).mean() / (SPREAD / support.shape[-1])
            value = value + self.view_weight * apart
            logs["views"] = apart.detach()
        return value, logs


def attended(network: Any, z: Tensor) -> Tensor:
    """(E, S, d): the views (E, S, V, d) of an input, weighted by learned attention."""
    return torch.einsum("esvd,v->esd", z, network.views.softmax(0)) if z.ndim == 4 else z


def original(z: Tensor) -> Tensor:
    """(E, Q, d): a query is judged as it stands; its views (E, Q, V, d) serve training alone."""
    return z[:, :, 0] if z.ndim == 4 else z


def nearest_radius(to: Tensor, radii: Tensor) -> Tensor:
    """(E, Q): the radius (E, N) of each query's nearest class by distances (E, Q, N)."""
    return radii.gather(1, to.argmin(-1))


def boundary(to: Tensor, labels: Tensor, classes: Prototypes, margin: float) -> Tensor:
    """Two hinges: known queries (labels (E, Q) below N) inside their radius by a margin, the others outside by one.

    Of the others the hardest half counts, those nearest to a class.
    """
    way = to.shape[-1]
    edges = margin * classes.near.detach()
    known = labels < way
    own = labels.clamp_max(way - 1)
    inside = to.gather(-1, own[..., None]).squeeze(-1) - (classes.radii - edges).gather(1, own)
    outside = nearest_radius(to, classes.radii + edges) - to.amin(-1)
    value = inside[known].clamp_min(0).mean() if bool(known.any()) else to.new_zeros(())
    strange = outside[~known]
    if len(strange):
        value = value + strange.topk(-(-len(strange) // 2)).values.clamp_min(0).mean()
    return value


def between_classes(means: Tensor, count: int) -> Tensor:
    """(E, count, d) points between two different class means (E, N, d), drawn from torch's global generator."""
    episodes, way, _ = means.shape
    one = torch.randint(way, (episodes, count))
    other = (one + torch.randint(1, way, (episodes, count))) % way
    low, high = _BETWEEN
    part = low + (high - low) * torch.rand(episodes, count, 1)
    rows = torch.arange(episodes)[:, None]
    return part * means[rows, one] + (1 - part) * means[rows, other]


def views_apart(z: Tensor) -> Tensor:
    """(E, S): mean squared distance, a dimension, of the views (E, S, V, d) from the original, the first of them."""
    return (z[:, :, 1:] - z[:, :, :1]).square().mean((-1, -2))
