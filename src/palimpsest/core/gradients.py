"""Each row's own gradient, seen through a random projection, from one backward pass a batch.

The gradient of a row at a linear layer is a sum over its positions of outer products a g^T (what goes in, the gradient
of what comes out).  Each direction of the projection is itself an outer product of random signs u v^T, so that
``<u v^T, a g^T> = (u.a)(v.g)``: neither a gradient (D_in x D_out numbers a row) nor the projection is ever held.
Inner products come out right on average (Sun et al. 2018, "Tensor random projection", arXiv:2105.00105); their error
shrinks with 1 / sqrt(dimension).  Weights of other layers (norms, embeddings) are left out.
Shapes: N rows, B of a batch, T positions, D in or out, Q dimensions of the projection.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from palimpsest.core.errors import InputError
from palimpsest.core.seeds import torch_rng

Score = Callable[[nn.Module, Any], Tensor]


def projected_gradients(
    model: nn.Module,
    score: Score,
    batches: Iterable[Any],
    dimension: int,
    *,
    seed: int = 0,
    layers: Mapping[str, nn.Module] | None = None,
) -> tuple[Tensor, Tensor]:
    """The scores of all rows, (N, ...), and the projected gradient of each, (N, ..., Q) float32, in their order.

    ``score(model, batch)`` gives one or more numbers a row, (B, ...), each depending on that row alone; the model is in
    evaluation mode.  `layers` are those of `linear_layers` by default; their names and `seed` decide the signs.
    `InputError` for a model without such layers, or with one that does not see the rows in its first dimension.
    """
    chosen = linear_layers(model) if layers is None else dict(layers)
    if not chosen:
        raise InputError(f"{type(model).__name__} has no linear layer whose gradients could be projected")
    if dimension < 1:
        raise InputError(f"a projection has at least 1 dimension, not {dimension}")
    looks = [_Look(name, module, dimension, seed) for name, module in chosen.items()]
    scores, features = [], []
    with _watching(model, looks) as calls:
        for batch in batches:
            calls.clear()
            values = score(model, batch)
            columns = values.reshape(len(values), -1).unbind(1)
            projected = [_projected(column, calls, dimension, more=column is not columns[-1]) for column in columns]
            scores.append(values.detach())
            features.append(torch.stack(projected, 1).reshape(*values.shape, dimension))
    return torch.cat(scores), torch.cat(features)


def linear_layers(model: nn.Module) -> dict[str, nn.Module]:
    """The layers that multiply by one matrix: `nn.Linear`, GPT-2's `Conv1D`, and plain `nn.Conv2d`."""
    return {name: module for name, module in model.named_modules() if _is_linear(module)}


@dataclass(frozen=True, eq=False)
class _Call:
    """One use of a layer in a forward pass."""

    look: _Look
    output: Tensor
    inside_BTQ: Tensor  # what went in, along each direction's u


class _Look:
    """A layer and the random signs it is seen through."""

    def __init__(self, name: str, module: nn.Module, dimension: int, seed: int):
        self.name, self.module = name, module
        weight = cast(Tensor, module.weight)
        given, taken = weight.T.shape if _is_conv1d(module) else weight.flatten(1).shape
        self.has_bias = module.bias is not None
        self.u_DQ = _signs(taken + self.has_bias, dimension, seed, name, "in").to(weight.device)
        self.v_DQ = _signs(given, dimension, seed, name, "out").to(weight.device)

    def inside(self, entered: Tensor) -> Tensor:
        """(B, T, Q): the bias is a weight whose input is 1."""
        u_DQ = self.u_DQ[:-1] if self.has_bias else self.u_DQ
        inside_BTQ = _positions(self._patches(entered)).float() @ u_DQ
        return inside_BTQ + self.u_DQ[-1] if self.has_bias else inside_BTQ

    def outside(self, gradient: Tensor) -> Tensor:
        """(B, T, Q)"""
        if isinstance(self.module, nn.Conv2d):
            gradient = gradient.flatten(2).transpose(1, 2)
        return _positions(gradient).float() @ self.v_DQ

    def _patches(self, entered: Tensor) -> Tensor:
        """What a convolution multiplies its matrix by at each place, (B, T, D_in)."""
        if not isinstance(self.module, nn.Conv2d):
            return entered
        shape: Any = self.module.kernel_size, self.module.dilation, self.module.padding, self.module.stride
        return F.unfold(entered, *shape).transpose(1, 2)


@contextmanager
def _watching(model: nn.Module, looks: list[_Look]) -> Iterator[list[_Call]]:
    """Inside, the layers' calls are noted, in evaluation mode and with gradients."""
    calls: list[_Call] = []

    def hook_of(look: _Look) -> Callable[..., Tensor]:
        def hook(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
            if not output.requires_grad:  # nothing before this layer is trained
                output = output.detach().requires_grad_()
            with torch.no_grad():
                calls.append(_Call(look, output, look.inside(inputs[0])))
            return output.clone()  # what comes next may write into it

        return hook

    modes = [(module, module.training) for module in model.modules()]
    handles = [look.module.register_forward_hook(hook_of(look)) for look in looks]
    model.eval()
    try:
        with torch.enable_grad():
            yield calls
    finally:
        for handle in handles:
            handle.remove()
        for module, training in modes:
            module.training = training


def _projected(column: Tensor, calls: list[_Call], dimension: int, *, more: bool) -> Tensor:
    """(B, Q): the projected gradients of one score a row; `more`: the graph is still needed."""
    outputs = [call.output for call in calls]
    gradients = torch.autograd.grad(column.sum(), outputs, retain_graph=more, allow_unused=True)
    found = torch.zeros(len(column), dimension, device=column.device)
    with torch.no_grad():
        for call, gradient in zip(calls, gradients, strict=True):
            if gradient is None:
                continue
            if len(gradient) != len(column):
                raise InputError(
                    f"layer {call.look.name} sees {len(gradient)} rows where the batch has {len(column)}: "
                    "its gradients cannot be told apart by row, leave it out of the layers"
                )
            found += (call.inside_BTQ * call.look.outside(gradient)).sum(1)
    return found / dimension**0.5


def _signs(rows: int, dimension: int, seed: int, *names: str) -> Tensor:
    return torch.randint(0, 2, (rows, dimension), generator=torch_rng(seed, "projection", *names)).float() * 2 - 1


def _positions(values: Tensor) -> Tensor:
    """(B, ..., D) -> (B, T, D)"""
    return values.reshape(len(values), -1, values.shape[-1])


def _is_linear(module: nn.Module) -> bool:
    if isinstance(module, nn.Conv2d):
        return module.groups == 1 and module.padding_mode == "zeros" and not isinstance(module.padding, str)
    return isinstance(module, nn.Linear) or _is_conv1d(module)


def _is_conv1d(module: nn.Module) -> bool:
    """The linear layer of GPT-2, whose matrix is stored the other way round."""
    return type(module).__name__ == "Conv1D" and getattr(module, "weight", torch.empty(0)).ndim == 2
