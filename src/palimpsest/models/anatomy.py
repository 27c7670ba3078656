"""Where the parts of a decoder are, whatever its architecture calls them: layers, feed-forward blocks, projections.

Found by structure, not by name of the architecture.  Shapes: B rows, T tokens, D hidden units, F feed-forward units.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Any, cast

import torch
from torch import Tensor, nn

from palimpsest.core.errors import InputError

_FEED_FORWARD_NAMES = ("mlp", "feed_forward", "ffn", "block_sparse_moe", "ff")
_GATE_NAMES = ("gate_proj", "gate", "w1", "wi_0")


def base_of(model: nn.Module) -> Any:
    """The Hugging Face model inside a PEFT wrapper, or the model itself."""
    return cast(Any, model).get_base_model() if hasattr(model, "peft_config") else model


def layers(model: nn.Module) -> Sequence[nn.Module]:
    """The transformer's layers, first to last.  Raises `InputError` for a model without a list of like layers."""
    base = base_of(model)
    stacks = [module for module in base.modules() if isinstance(module, nn.ModuleList) and len(module) > 0]
    alike = [stack for stack in stacks if len({type(layer) for layer in stack}) == 1 and _feed_forward(stack[0])]
    if not alike:
        raise InputError(
            f"{type(base).__name__} has no stack of layers with a feed-forward block that can be addressed"
        )
    return cast(Sequence[nn.Module], max(alike, key=len))


def _feed_forward(layer: nn.Module) -> nn.Module | None:
    return next((child for name, child in layer.named_children() if name in _FEED_FORWARD_NAMES), None)


def feed_forward(layer: nn.Module) -> nn.Module:
    """The feed-forward block of a layer (dense or mixture of experts)."""
    block = _feed_forward(layer)
    if block is None:
        raise InputError(f"{type(layer).__name__} has no feed-forward block that can be addressed")
    return block


def down_projection(block: nn.Module) -> nn.Module:
    """The last matrix of a dense feed-forward block, (F -> D): its rows (or columns) are the value vectors."""
    matrices = list(_matrices(block))
    width = _sides(matrices[0])[0] if matrices else 0
    down = [matrix for matrix in matrices[1:] if _sides(matrix)[1] == width]
    if not down:
        raise InputError(f"{type(block).__name__} has no down projection that can be addressed (a mixture of experts?)")
    return down[-1]


def pre_activation(block: nn.Module) -> tuple[nn.Module, slice]:
    """The matrix of a dense feed-forward block whose output goes into the activation, and which of its outputs do.

    In a gated block that is the gate; a matrix that holds gate and up projection together gives its first half.
    """
    down = down_projection(block)
    width = _sides(down)[0]
    before = [(name, matrix) for name, matrix in block.named_modules() if matrix is not down and _is_matrix(matrix)]
    whole = [(name, matrix) for name, matrix in before if _sides(matrix)[1] == width]
    if whole:
        gates = [matrix for name, matrix in whole if name.rpartition(".")[2] in _GATE_NAMES]
        return (gates or [matrix for _, matrix in whole])[0], slice(0, width)
    fused = [matrix for _, matrix in before if _sides(matrix)[1] == 2 * width]
    if not fused:
        raise InputError(f"{type(block).__name__} has no activations that can be addressed")
    return fused[0], slice(0, width)


def value_vectors(projection: nn.Module) -> Tensor:
    """The (F, D) view of a down projection's weight, however the architecture stores it (`Linear` or `Conv1D`)."""
    weight = cast(Tensor, projection.weight)
    return weight.T if _is_linear(projection) else weight


def _matrices(block: nn.Module) -> Iterator[nn.Module]:
    """Every module with a matrix, in order; not the modules inside it (the factors of an adapter)."""
    for child in block.children():
        if _is_matrix(child):
            yield child
        else:
            yield from _matrices(child)


def _is_matrix(module: nn.Module) -> bool:
    return isinstance(weight := getattr(module, "weight", None), Tensor) and weight.ndim == 2


def _sides(matrix: nn.Module) -> tuple[int, int]:
    """How many numbers a matrix takes and gives."""
    taken, given = value_vectors(matrix).shape
    return taken, given


def _is_linear(projection: nn.Module) -> bool:
    return isinstance(getattr(projection, "base_layer", projection), nn.Linear)


@contextmanager
def hooked(*pairs: tuple[nn.Module, Callable[..., Any]]) -> Iterator[None]:
    """Run with forward hooks on modules; removes its own hooks only, whatever happens inside."""
    handles = [module.register_forward_hook(hook) for module, hook in pairs]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def output_of(returned: Any) -> Tensor:
    """The hidden states in what a layer returned: itself, or the first of a tuple."""
    return returned[0] if isinstance(returned, tuple) else returned


def with_output(returned: Any, hidden: Tensor) -> Any:
    """What a layer returned, with other hidden states in it."""
    return (hidden, *returned[1:]) if isinstance(returned, tuple) else hidden


class _Enough(Exception):
    """Ends a forward pass whose later layers nobody asked for."""


def capture(model: nn.Module, layer: int, run: Callable[[], Any]) -> Tensor:
    """The output of a layer during ``run()``, (B, T, D), with its graph; the layers above it are not computed."""
    seen: list[Tensor] = []

    def keep(module: nn.Module, inputs: Any, output: Any) -> None:
        seen.append(output_of(output))
        raise _Enough

    with hooked((layers(model)[layer], keep)), suppress(_Enough):
        run()
    return seen[0]


def same_weights(one: nn.Module, other: nn.Module) -> bool:
    """Whether two models of one architecture hold equal weights, bit by bit."""
    a, b = one.state_dict(), other.state_dict()
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name].to(a[name].device)) for name in a)


def sharing_copy(model: nn.Module) -> nn.Module:
    """A copy of a model's structure, frozen, whose weights are the original's own memory.

    For work beside the weights (adapters): nobody may write into the copy's weights.
    """
    memo: dict[int, Any] = {id(p): nn.Parameter(p.detach(), requires_grad=False) for p in model.parameters()}
    return copy.deepcopy(model, memo)


def own_weights(model: nn.Module, other: nn.Module) -> None:
    """End the sharing: clone every weight of `model` that lies in the memory of one of `other`'s, in place."""
    taken = {p.data_ptr() for p in other.parameters()}
    for p in model.parameters():
        if p.data_ptr() in taken:
            p.data = p.data.clone()
