"""One differentiable optimiser step: new parameters as a function of the old ones and of what the loss depends on.

Meta-learning differentiates through training: an outer loss at the new parameters sends gradients to whatever decided
the inner loss (weights of examples, starting values, learning rates).  Parameters are dicts of tensors by name, the
module they belong to is run at them by `evaluate` and never changed, and nothing of torch's optimisers is patched.
Knows nothing of what is learnt.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.attention import SDPBackend, sdpa_kernel

Tensors = dict[str, Tensor]
T = TypeVar("T")

_TINY = 1e-30  # below it a squared gradient counts as zero: the slope of a root at zero is infinite


@dataclass(frozen=True)
class Moments:
    """What Adam remembers of the steps before."""

    steps: int
    mean: Tensors
    square: Tensors


class Optimiser(Protocol):
    """A rule of descent whose step can be differentiated."""

    def start(self, parameters: Tensors) -> Any:
        """The state before the first step."""
        ...

    def step(self, parameters: Tensors, gradients: Tensors, state: Any) -> tuple[Tensors, Any]:
        """New parameters and new state; the old ones are left as they are."""
        ...


@dataclass(frozen=True)
class SGD:
    """Plain descent; keeps no state.  `lr` may be a tensor that is itself learnt (Meta-SGD)."""

    lr: float | Tensor

    def start(self, parameters: Tensors) -> None:
        return None

    def step(self, parameters: Tensors, gradients: Tensors, state: None = None) -> tuple[Tensors, None]:
        return {name: value - self.lr * gradients[name] for name, value in parameters.items()}, None


@dataclass(frozen=True)
class Adam:
    """Adam with decoupled weight decay, step for step what `torch.optim.AdamW` does."""

    lr: float
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    weight_decay: float = 0.0

    def start(self, parameters: Tensors) -> Moments:
        zeros = {name: torch.zeros_like(value) for name, value in parameters.items()}
        return Moments(0, zeros, zeros)

    def step(self, parameters: Tensors, gradients: Tensors, state: Moments) -> tuple[Tensors, Moments]:
        first, second = self.betas
        steps = state.steps + 1
        new: Tensors = {}
        mean: Tensors = {}
        square: Tensors = {}
        for name, value in parameters.items():
            gradient = gradients[name]
            mean[name] = first * state.mean[name] + (1 - first) * gradient
            square[name] = second * state.square[name] + (1 - second) * gradient * gradient
            spread = (square[name].clamp_min(_TINY) / (1 - second**steps)).sqrt() + self.eps
            kept = value * (1 - self.lr * self.weight_decay)
            new[name] = kept - self.lr / (1 - first**steps) * mean[name] / spread
        return new, Moments(steps, mean, square)


def leaves(module: nn.Module) -> Tensors:
    """Copies of a module's trainable parameters, by name, as leaves that want a gradient."""
    named = module.named_parameters()
    return {name: value.detach().clone().requires_grad_() for name, value in named if value.requires_grad}


def evaluate(function: Callable[..., T], module: nn.Module, parameters: Tensors, *arguments: Any) -> T:
    """``function(module, *arguments)`` where the module has `parameters` in place of its own.

    Parameters that are not named stay the module's; tied ones follow the one that is named.  The function may use any
    part of the module, but must not keep a piece of it for later: afterwards the module has its own parameters again.
    """
    call = _Call(function, module)
    return functional_call(call, {f"module.{name}": value for name, value in parameters.items()}, arguments)


def step(
    loss: Tensor, parameters: Tensors, optimiser: Optimiser, state: Any, *, differentiable: bool = True
) -> tuple[Tensors, Any]:
    """One step of `optimiser` on a scalar loss that was computed at `parameters`: new parameters, new state.

    If `differentiable`, both depend on everything that the loss depends on, to any order; run the loss under
    `twice_differentiable` then.  A parameter that the loss does not depend on has a gradient of zero.
    """
    found = torch.autograd.grad(loss, list(parameters.values()), create_graph=differentiable, allow_unused=True)
    gradients = {
        name: torch.zeros_like(value) if gradient is None else gradient
        for (name, value), gradient in zip(parameters.items(), found, strict=True)
    }
    if differentiable:
        return optimiser.step(parameters, gradients, state)
    with torch.no_grad():
        return optimiser.step(parameters, gradients, state)


def detached(tree: Any) -> Any:
    """Parameters or `Moments` cut off from what they were computed from; parameters want a gradient as before."""
    if isinstance(tree, Moments):
        return Moments(tree.steps, _cut(tree.mean), _cut(tree.square))
    return {name: value.detach().requires_grad_() for name, value in tree.items()} if tree is not None else None


@contextmanager
def twice_differentiable() -> Iterator[None]:
    """Inside, attention is computed in plain steps: the fused kernels have no second derivative."""
    with sdpa_kernel(SDPBackend.MATH):
        yield


def _cut(tensors: Tensors) -> Tensors:
    return {name: value.detach() for name, value in tensors.items()}


class _Call(nn.Module):
    """A function of a module as a module, so that all that the function does sees the replaced parameters."""

    def __init__(self, function: Callable[..., Any], module: nn.Module):
        super().__init__()
        self.function, self.module = function, module
        self.training = module.training

    def forward(self, *arguments: Any) -> Any:
        return self.function(self.module, *arguments)
