"""Relation networks: the comparison itself is learned, by a small network over (query, class) pairs.

Sung et al. 2018 (arXiv:1711.06025).  A class is the mean of its supports (the paper's sum, which grows with the shots);
the pair goes through two layers rather than through convolutions, so that one head serves images and features.
A baseline of `susana_distancia`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from palimpsest.core.methods import method
from palimpsest.learn.fewshot.episodic import Batch, Episodic, Network, class_means, embedded
from palimpsest.models.convnet import network_for


@method(verb="learn", paper="susana_distancia", name="relation-net")
@dataclass(frozen=True, kw_only=True)
class RelationNet(Episodic):
    """Relation network: a learned score in (0, 1) for each pair of query and class, trained by squared error."""

    hidden: int = 64

    def build(self, x: Any, way: int) -> nn.Module:
        encoder = network_for(x, width=self.width, norm=self.norm)
        pair = nn.Linear(3 * encoder.dimensions, self.hidden)
        return Network(encoder, head=nn.Sequential(pair, nn.ReLU(), nn.Linear(self.hidden, 1)))

    def scores(self, network: Any, support: Tensor, labels: Tensor, query: Tensor, way: int) -> Tensor:
        """Logits of the relation scores: the sigmoid of one is the paper's score."""
        centres = class_means(support, labels, way)
        query, centres = query[:, :, None], centres[:, None]
        # the difference beside the pair: two layers do not find it by themselves in a few thousand steps
        pairs = torch.broadcast_tensors(query, centres, (query - centres).abs())
        return network.head(torch.cat(pairs, -1)).squeeze(-1)

    def loss(self, network: Any, batch: Batch, way: int) -> Tensor:
        support, query = embedded(network, batch)
        relations = self.scores(network, support, batch["support_labels"], query, way).sigmoid()
        return (relations - F.one_hot(batch["labels"], way)).square().sum(-1).mean()
