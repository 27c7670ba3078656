"""MAML and ANIL: meta-train weights from which a few gradient steps on the support solve a task.

Finn et al. 2017 (arXiv:1703.03400); in ANIL (Raghu et al. 2020, arXiv:1909.09157) the steps change the last layer only.
All tasks of a step go through one `torch.func.vmap`; second order unless `first_order`.  Answers are for the number of
ways trained on, no other.  Baselines of `susana_distancia`.
Unlike the papers' code, no statistics are shared between the queries of a task (MAML has group norm in the place of
batch norm): sharing lets an answer depend on the other queries and is worth some points that a user would not get.
Shapes: E tasks, S supports, Q queries, N classes, d dimensions.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor, nn
from torch.func import functional_call, grad, vmap
from torch.nn import functional as F

from palimpsest.core.errors import InputError
from palimpsest.core.methods import method
from palimpsest.learn.fewshot.episodic import Batch, Episodic, Network, cross_entropy, embedded
from palimpsest.models.convnet import network_for

Weights = dict[str, Tensor]

_WEIGHTS = 2**23  # bytes of adapted weights at once: more of them leave the processor's cache


@method(verb="learn", paper="susana_distancia", name="maml")
@dataclass(frozen=True, kw_only=True)
class MAML(Episodic):
    """MAML: weights from which a few gradient steps on the support solve a new task."""

    norm: ClassVar[str] = "group"
    fixed_way: ClassVar[bool] = True
    raw: ClassVar[bool] = True

    episodes: int = 16  # a step; the paper has 32 for Omniglot, 4 for miniImageNet
    inner_lr: float = 0.4  # the paper's for 5-way Omniglot
    inner_steps: int = 1
    adapt_steps: int = 3  # on a new task
    first_order: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.inner_steps < 1 or self.adapt_steps < 0 or self.inner_lr <= 0:
            steps = f"inner_steps={self.inner_steps}, adapt_steps={self.adapt_steps}, inner_lr={self.inner_lr}"
            raise InputError(f"{steps}: wanted at least one inner step, and a positive rate")

    def build(self, x: Any, way: int) -> nn.Module:
        encoder = network_for(x, width=self.width, norm=self.norm)
        kind = Classifier if self.raw else Network
        return kind(encoder, head=nn.Linear(encoder.dimensions, way))

    def scores(self, network: Any, support: Tensor, labels: Tensor, query: Tensor, way: int) -> Tensor:
        return self._adapted_logits(network, support, labels, query, self.adapt_steps)

    def loss(self, network: Any, batch: Batch, way: int) -> Tensor:
        logits = self._adapted_logits(
            network, batch["support"], batch["support_labels"], batch["query"], self.inner_steps
        )
        return cross_entropy(logits, batch["labels"])

    def _adapted_logits(self, network: Any, support: Tensor, labels: Tensor, query: Tensor, steps: int) -> Tensor:
        """(E, Q, N): each task's queries under the weights that its own support led to."""
        buffers = dict(network.named_buffers())

        def output(weights: Weights, x: Tensor) -> Tensor:
            return functional_call(network, (weights, buffers), (x,))

        def one(support: Tensor, labels: Tensor, query: Tensor) -> Tensor:
            start = dict(network.named_parameters())
            return output(descend(output, start, support, labels, self.inner_lr, steps, self.first_order), query)

        size = sum(weight.numel() * weight.element_size() for weight in network.parameters())
        return vmap(one, chunk_size=max(1, _WEIGHTS // size))(support, labels, query)


@method(verb="learn", paper="susana_distancia", name="anil")
@dataclass(frozen=True, kw_only=True)
class ANIL(MAML):
    """ANIL: MAML whose inner steps change the last layer only; every input is embedded once."""

    norm: ClassVar[str] = "batch"
    raw: ClassVar[bool] = False

    inner_lr: float = 0.1
    inner_steps: int = 5
    adapt_steps: int = 10

    def loss(self, network: Any, batch: Batch, way: int) -> Tensor:
        support, query = embedded(network, batch)
        return cross_entropy(
            self._adapted_logits(network, support, batch["support_labels"], query, self.inner_steps), batch["labels"]
        )

    def _adapted_logits(self, network: Any, support: Tensor, labels: Tensor, query: Tensor, steps: int) -> Tensor:
        def output(weights: Weights, x: Tensor) -> Tensor:
            return F.linear(x, weights["weight"], weights["bias"])

        def one(support: Tensor, labels: Tensor, query: Tensor) -> Tensor:
            start = {"weight": network.head.weight, "bias": network.head.bias}
            return output(descend(output, start, support, labels, self.inner_lr, steps, self.first_order), query)

        return vmap(one)(support, labels, query)


class Classifier(Network):
    """Inputs to logits: all of it is adapted."""

    head: nn.Module

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.encoder(x))


def descend(
    output: Callable[[Weights, Tensor], Tensor],
    weights: Weights,
    x: Tensor,
    labels: Tensor,
    lr: float,
    steps: int,
    first_order: bool = False,
) -> Weights:
    """`steps` gradient steps on the mean cross-entropy of ``output(weights, x)``, differentiable in `weights`."""

    def loss(weights: Weights) -> Tensor:
        return F.cross_entropy(output(weights, x), labels)

    for _ in range(steps):
        slopes = grad(loss)(weights)
        if first_order:
            slopes = {name: slope.detach() for name, slope in slopes.items()}
        weights = {name: weight - lr * slopes[name] for name, weight in weights.items()}
    return weights
