"""Hundreds of small models trained at once: their parameters stacked, one `torch.func.vmap` over the stack.

Every model sees its own rows (a mask) in its own order (its own seed), just as if it had been trained alone: the sum
of the models' losses has each model's own gradient as its part, and the optimisers work element by element.
Knows nothing of what the models are for.  Shapes: M models, N rows of the data, S steps, B rows a batch.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.func import functional_call, vmap

from palimpsest.core.errors import InputError, TrainingDiverged, unknown
from palimpsest.core.recipe import Recipe
from palimpsest.core.seeds import derive, numpy_rng, seed_everything

OPTIMIZERS = ("adamw", "sgd")
Tensors = dict[str, Tensor]
Loss = Callable[[Callable[..., Any], Any], Tensor]

MEMORY = 2**28  # bytes that the models of a chunk may take together, as measured on one of them
_CHUNK = 100  # more models at once are no faster: their activations leave the processor's cache
_BLOCK = 64  # steps whose rows are drawn together


@dataclass(frozen=True)
class Many:
    """M trained models as one stack."""

    module: nn.Module  # what they are models of; its own weights are those of model 0 before training
    parameters: Tensors  # (M, ...) each
    buffers: Tensors  # the same for all
    losses: Tensor  # (M, S), of the batch of each step

    def __len__(self) -> int:
        return len(self.losses)

    def state(self, index: int) -> Tensors:
        """The parameters and buffers of one model, by name."""
        return {name: value[index] for name, value in self.parameters.items()} | self.buffers


def train_many(
    init: Callable[[], nn.Module],
    loss: Loss,
    data: Any,
    masks: Tensor | np.ndarray,
    *,
    steps: int,
    lr: float,
    batch_size: int,
    seed: int | Sequence[int] = 0,
    optimizer: str = "adamw",
    betas: tuple[float, float] = (0.9, 0.999),
    momentum: float = 0.0,
    weight_decay: float = 0.0,
    warmup: int = 0,
    schedule: str = "constant",
    chunk: int | None = None,
) -> Many:
    """Train one model for each row of `masks`, together, each as if alone.

    - `init()` makes a model with fresh weights; it is called once a model, under that model's seed.
    - `loss(model, batch)` returns the scalar mean loss of a batch of `data`, for a callable `model(*inputs)`.
    - `data`: a tensor, or a dict, list or tuple of tensors, N rows each, on the device to train on.
    - `masks`: (M, N) bool, the rows of each model.  Each draws its batches epoch by epoch from its own rows.
    - `seed`: one for all (each model's own is derived from it), or M of them; equal seeds and masks, equal models.
    - `optimizer`: "adamw" (torch.optim.AdamW; `betas`) or "sgd" (torch.optim.SGD; `momentum`).
    - `chunk`: how many models at once; it changes the result by rounding only.  By default what fits in memory.

    Raises `InputError` for masks that do not fit the data or leave a model without rows, and for models that keep
    running statistics (use group or layer norm); `TrainingDiverged` for a loss that is not finite.  RuntimeError by
    `vmap` for models that draw random numbers (dropout) or branch on values.
    """
    recipe = Recipe(steps, lr, betas, weight_decay, warmup, schedule, None, 1, 0)
    if optimizer not in OPTIMIZERS:
        raise unknown("optimizer", optimizer, OPTIMIZERS)
    chosen = _rows_of(masks, _leaves(data), batch_size)
    seeds = _seeds(seed, len(chosen))
    module, stacked, buffers = _stack(init, seeds, _leaves(data)[0].device)

    def value_of(parameters: Tensors, batch: Any) -> Tensor:
        return loss(lambda *inputs: functional_call(module, (parameters, buffers), inputs), batch)

    values_of = vmap(value_of)
    losses = torch.empty(len(chosen), steps, dtype=next(iter(stacked.values())).dtype)
    size = chunk or _chunk_size(value_of, stacked, data, batch_size)
    for first in range(0, len(chosen), size):
        part = slice(first, first + size)
        parameters = {name: value[part] for name, value in stacked.items()}  # views: trained in place
        trained = [value.requires_grad_() for name, value in parameters.items() if _is_trained(module, name)]
        if optimizer == "adamw":
            step_of: Any = torch.optim.AdamW(trained, lr, betas, weight_decay=weight_decay, fused=True)
        else:
            step_of = torch.optim.SGD(trained, lr, momentum, weight_decay=weight_decay, fused=True)
        for step in range(steps):
            if step % _BLOCK == 0:
                rows = _draw(chosen[part], seeds[part], step, min(step + _BLOCK, steps), batch_size)
                rows = rows.to(_leaves(data)[0].device)
            step_of.param_groups[0]["lr"] = recipe.rate(step)
            step_of.zero_grad(set_to_none=True)
            values = values_of(parameters, _pick(data, rows[step % _BLOCK]))
            values.sum().backward()
            losses[part, step] = values.detach().to("cpu", losses.dtype)
            step_of.step()
        _check_finite(losses[part], first, recipe)
    return Many(module, stacked, buffers, losses)


def predict_many(many: Many, inputs: Tensor | tuple[Tensor, ...], *, rows_at_once: int = 1024) -> Tensor:
    """The outputs of all models for the same inputs, (M, N, ...), in evaluation mode."""
    arguments = inputs if isinstance(inputs, tuple) else (inputs,)

    def output(parameters: Tensors, *batch: Tensor) -> Tensor:
        return functional_call(many.module, (parameters, many.buffers), batch)

    outputs_of = vmap(output, in_dims=(0, *[None] * len(arguments)))
    training = many.module.training
    many.module.eval()
    try:
        with torch.no_grad():
            blocks = []
            for first in range(0, len(many), _CHUNK):
                part = {name: value[first : first + _CHUNK] for name, value in many.parameters.items()}
                starts = range(0, len(arguments[0]), rows_at_once)
                pieces = [outputs_of(part, *(value[row : row + rows_at_once] for value in arguments)) for row in starts]
                blocks.append(torch.cat(pieces, dim=1))
            return torch.cat(blocks)
    finally:
        many.module.train(training)


def cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """The mean of ``-log softmax(logits)[label]``, logits (B, C) and labels (B,), for use under `train_many`.

    Equal to torch's own, whose kernel takes the classes one by one: under `vmap`, with ten classes, a third of a step.
    """
    shifted = logits - logits.detach().amax(-1, keepdim=True)
    return (shifted.exp().sum(-1).log() - shifted.gather(-1, labels[..., None]).squeeze(-1)).mean()


def _rows_of(masks: Tensor | np.ndarray, leaves: list[Tensor], batch_size: int) -> list[np.ndarray]:
    """The numbers of the rows of each model."""
    masks = np.asarray(masks)
    if masks.ndim != 2 or masks.dtype != np.bool_:
        raise InputError(f"masks must be a bool array (models, rows), not {masks.dtype} {masks.shape}")
    if not leaves or {len(leaf) for leaf in leaves} != {masks.shape[1]}:
        raise InputError(f"masks have {masks.shape[1]} rows, the data {sorted({len(leaf) for leaf in leaves})}")
    if not len(masks):
        raise InputError("masks name no model")
    if empty := [m for m, mask in enumerate(masks) if not mask.any()]:
        raise InputError(f"the masks of {len(empty)} models (first: {empty[0]}) leave them no row to train on")
    if batch_size < 1:
        raise InputError(f"batch_size must be at least 1, not {batch_size}")
    return [np.flatnonzero(mask) for mask in masks]


def _seeds(seed: int | Sequence[int], models: int) -> list[int]:
    if isinstance(seed, int):
        return [derive(seed, "model", m) for m in range(models)]
    if len(seed) != models:
        raise InputError(f"{len(seed)} seeds for {models} models")
    return list(seed)


def _stack(init: Callable[[], nn.Module], seeds: list[int], device: torch.device) -> tuple[nn.Module, Tensors, Tensors]:
    """One module, the parameters of all (M, ...), and the buffers."""
    module: nn.Module | None = None
    states: list[Tensors] = []
    for seed in seeds:
        seed_everything(seed, "init")
        fresh = init()
        module = module or fresh.to(device)
        states.append({name: p.detach() for name, p in fresh.named_parameters()})
    assert module is not None
    if any(getattr(part, "track_running_stats", False) for part in module.modules()):
        raise InputError("models with running statistics (batch norm) cannot be stacked: use group or layer norm")
    if not any(p.requires_grad for p in module.parameters()):
        raise InputError("the models have no trainable parameter")
    stacked = {name: torch.stack([state[name].to(device) for state in states]) for name in states[0]}
    return module, stacked, dict(module.named_buffers())


def _is_trained(module: nn.Module, name: str) -> bool:
    return module.get_parameter(name).requires_grad


def _draw(chosen: list[np.ndarray], seeds: list[int], start: int, stop: int, batch_size: int) -> Tensor:
    """(stop - start, models, B): the rows of these steps.  A pure function of each model's rows, seed and the steps."""
    first, last = start * batch_size, stop * batch_size  # of the rows that a model sees in all its epochs
    drawn = np.empty((len(chosen), last - first), dtype=np.int64)
    for line, rows, seed in zip(drawn, chosen, seeds, strict=True):
        for epoch in range(first // len(rows), -(-last // len(rows))):
            begin = epoch * len(rows)
            inside = slice(max(first - begin, 0), last - begin)
            order = numpy_rng(seed, "epoch", epoch).permutation(rows)[inside]
            where = max(begin - first, 0)
            line[where : where + len(order)] = order
    return torch.from_numpy(drawn.reshape(len(chosen), stop - start, batch_size).swapaxes(0, 1).copy())


def _chunk_size(value_of: Callable[[Tensors, Any], Tensor], stacked: Tensors, data: Any, batch_size: int) -> int:
    """Models that fit in `MEMORY`, going by what one model's forward pass keeps for its backward pass."""
    kept = 0

    def count(tensor: Tensor) -> Tensor:
        nonlocal kept
        kept += tensor.numel() * tensor.element_size()
        return tensor

    one = {name: value[0].detach().requires_grad_(value.is_floating_point()) for name, value in stacked.items()}
    leaves = _leaves(data)
    rows = torch.arange(batch_size, device=leaves[0].device) % len(leaves[0])
    with torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor):
        value_of(one, _pick(data, rows))
    weights = sum(value.numel() * value.element_size() for value in one.values())
    return int(min(_CHUNK, max(1, MEMORY // max(2 * kept + 4 * weights, 1))))


def _check_finite(losses: Tensor, first: int, recipe: Recipe) -> None:
    broken = ~torch.isfinite(losses)
    if broken.any():
        step = int(broken.any(0).nonzero()[0])
        model = int(broken[:, step].nonzero()[0])
        last = (step, float(losses[model, step - 1])) if step else None
        found = f"the loss of model {first + model} is {float(losses[model, step])}"
        raise TrainingDiverged(step + 1, recipe.steps, found, last, recipe.rate(step))


def _pick(data: Any, rows: Tensor) -> Any:
    if isinstance(data, Tensor):
        return data[rows]
    if isinstance(data, dict):
        return {name: _pick(value, rows) for name, value in data.items()}
    return type(data)(_pick(value, rows) for value in data)


def _leaves(data: Any) -> list[Tensor]:
    if isinstance(data, Tensor):
        return [data]
    return [leaf for value in (data.values() if isinstance(data, dict) else data) for leaf in _leaves(value)]
