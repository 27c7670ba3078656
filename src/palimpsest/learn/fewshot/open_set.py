"""Few-shot learners whose answer may be "none of the above": three baselines of `gpam`.

`ProtoBias` (FewRel 2.0, Gao et al. 2019): one learned logit stands for "none".  `OProto`: cosines to prototypes with
two hinges and a threshold between them.  `MNAV` (multiple none-of-the-above vectors): learned vectors stand beside the
prototypes.  Need: training episodes with such queries (`nota` > 0).
Shapes: E episodes, S supports, Q queries, N classes, d dimensions; the label N is "none of the above".
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from palimpsest.core.methods import method
from palimpsest.learn.fewshot.episodic import (
    Batch,
    Episodic,
    Network,
    class_means,
    embedded,
    squared_distances,
)
from palimpsest.models.convnet import SPREAD, network_for


@dataclass(frozen=True, kw_only=True)
class OpenSet(Episodic):
    """A learner that may answer "none of them".  Views of an input (M, V, D) are averaged."""

    answers_none: ClassVar[bool] = True


@method(verb="learn", paper="gpam", name="proto-bias")
@dataclass(frozen=True, kw_only=True)
class ProtoBias(OpenSet):
    """Prototypical network with one learned logit for "none of the above", the same everywhere."""

    def build(self, x: Any, way: int) -> nn.Module:
        encoder = network_for(x, width=self.width, norm=self.norm)
        return Network(encoder, bias=nn.Parameter(torch.tensor(0.75 * SPREAD)))

    def scores(self, network: Any, support: Tensor, labels: Tensor, query: Tensor, way: int) -> Tensor:
        support, query = merged(support, 2), merged(query, 2)
        known = -squared_distances(query, class_means(support, labels, way))
        return with_none(known, -network.bias.expand(known.shape[:2]))


@method(verb="learn", paper="gpam", name="o-proto")
@dataclass(frozen=True, kw_only=True)
class OProto(OpenSet):
    """Cosines to prototypes, pulled above one margin for known queries and below another for the rest."""

    sharpness: float = 10.0
    known_margin: float = 0.8
    none_margin: float = 0.4
    threshold: float = 0.6  # between the two margins

    def scores(self, network: Any, support: Tensor, labels: Tensor, query: Tensor, way: int) -> Tensor:
        cosines = self._cosines(support, labels, query, way)
        return self.sharpness * with_none(cosines, torch.full_like(cosines[..., 0], self.threshold))

    def _cosines(self, support: Tensor, labels: Tensor, query: Tensor, way: int) -> Tensor:
        centres = class_means(merged(support, 2), labels, way)
        return F.normalize(merged(query, 2), dim=-1) @ F.normalize(centres, dim=-1).transpose(1, 2)

    def loss(self, network: Any, batch: Batch, way: int) -> Tensor:
        support, query = embedded(network, batch)
        cosines = self._cosines(support, batch["support_labels"], query, way).flatten(0, 1)
        labels = batch["labels"].flatten()
        known, none = cosines[labels < way], cosines[labels == way]
        own = known.gather(1, labels[labels < way, None])
        value = F.cross_entropy(self.sharpness * known, labels[labels < way])
        value = value + (self.known_margin - own).clamp_min(0).mean()
        return value + (none.amax(1) - self.none_margin).clamp_min(0).mean() if len(none) else value


@method(verb="learn", paper="gpam", name="mnav")
@dataclass(frozen=True, kw_only=True)
class MNAV(OpenSet):
    """Learned "none of the above" vectors beside the prototypes: the nearest of them is the logit of "none"."""

    vectors: int = 20
    euclidean: bool = True  # by squared distance; False: by dot product over sqrt(d), as first published

    def build(self, x: Any, way: int) -> nn.Module:
        encoder = network_for(x, width=self.width, norm=self.norm)
        some = torch.as_tensor(x[torch.randperm(len(x))[: self.vectors].sort().values.numpy()])
        with torch.no_grad():  # begun at embedded examples: at random places none would ever be the nearest
            start = merged(encoder(some), 1)
        start = start.repeat(-(-self.vectors // len(start)), 1)[: self.vectors].clone()
        return Network(encoder, none=nn.Parameter(start))

    def scores(self, network: Any, support: Tensor, labels: Tensor, query: Tensor, way: int) -> Tensor:
        query = merged(query, 2)
        centres = class_means(merged(support, 2), labels, way)
        none = network.none.expand(len(query), -1, -1)
        if self.euclidean:
            return with_none(-squared_distances(query, centres), -squared_distances(query, none).amin(-1))
        known, strange = ((query @ side.transpose(1, 2)) / query.shape[-1] ** 0.5 for side in (centres, none))
        return with_none(known, strange.amax(-1))


def with_none(known: Tensor, none: Tensor) -> Tensor:
    """Logits (E, Q, N+1) from those of the classes (E, Q, N) and that of none of them (E, Q)."""
    return torch.cat([known, none[..., None]], -1)


def merged(z: Tensor, leading: int) -> Tensor:
    """(leading dimensions, d): the views of an input, if there are any, averaged."""
    return z.mean(leading) if z.ndim == leading + 2 else z


def none_score(logits: Any) -> Any:
    """How much more "none" than any class: (..., N+1) logits to (...), for AUROC and for thresholds."""
    return logits[..., -1] - logits[..., :-1].max(-1)
