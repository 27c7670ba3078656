"""Prototypical networks: embed, average each class's supports, and answer with the nearest average.

Snell et al. 2017 (arXiv:1703.05175): logits are negative squared Euclidean distances.  Train with more ways than are
tested (60 for Omniglot, 20 to 30 for miniImageNet) and the shots that are tested.  A baseline of `susana_distancia`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor

from palimpsest.core.methods import method
from palimpsest.learn.fewshot.episodic import Episodic, Products, class_means, squared_distances


@method(verb="learn", paper="susana_distancia", name="protonet")
@dataclass(frozen=True, kw_only=True)
class ProtoNet(Episodic):
    """Prototypical network: the nearest class mean of a learned embedding, by squared Euclidean distance."""

    by_products: ClassVar[bool] = True

    temperature: float = 1.0  # distances are divided by it

    def scores(self, network: Any, support: Tensor, labels: Tensor, query: Tensor, way: int) -> Tensor:
        return -squared_distances(query, class_means(support, labels, way)) / self.temperature

    def product_scores(self, products: Products) -> Tensor:
        """The squared distance to a mean: of the query, minus twice its mean product, plus the class's mean product."""
        cross = products.query_support.mean(-1)
        squares = products.support_support.mean((-1, -2))
        return (2 * cross - products.query_query[..., None] - squares[:, None]) / self.temperature
