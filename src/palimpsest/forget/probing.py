"""What the feed-forward neurons of a model do on a table: their pre-activations, their keys, and boxes around keys.

A neuron's pre-activation is what goes into its activation function (of a gated block: the gate's output); the key of a
token is what goes into the down projection.  The first position of a row is left out of every statistic: its massive
activations are the attention's, not the text's.
Knows nothing of what is done with them.  Shapes: N rows, B of a batch, T positions, L layers, F neurons a layer.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, TypeVar

import numpy as np
import torch
from torch import Tensor, nn

from palimpsest.core import losses
from palimpsest.core.errors import InputError
from palimpsest.core.reference import passes
from palimpsest.data.batches import Encoded
from palimpsest.models.anatomy import down_projection, feed_forward, hooked, layers, pre_activation
from palimpsest.models.guard import Guard

if TYPE_CHECKING:
    from palimpsest.models.lm import LM

Pooling = Literal["last", "mean"]
Part = Literal["pre-activations", "keys"]

LEAST = 30  # probe records below which means and deviations say nothing
_FLOOR = 1e-6  # of the largest deviation: a dead neuron must not make a box of no width


def widths(model: nn.Module) -> list[int]:
    """F of each layer.  `InputError` for a model whose neurons cannot be hooked (a mixture of experts, say)."""
    return [pre_activation(feed_forward(layer))[1].stop for layer in layers(model)]


def neurons(lm: LM, encoded: Encoded, part: Part, see: Callable[[int, Tensor, Tensor, np.ndarray], None]) -> None:
    """Show what the neurons of every layer do on a table: ``see(layer, values (B, T, F), counted (B, T), rows (B,))``.

    `counted` is True at real tokens but a row's first (at that too, where it is the only one).  Hooks that stand on the
    model act as well.
    """
    blocks = [feed_forward(layer) for layer in layers(lm.model)]
    counted: Tensor
    rows: np.ndarray

    def keys(number: int):
        return lambda module, inputs, output: see(number, inputs[0].detach(), counted, rows)

    def before(number: int, place: slice):
        return lambda module, inputs, output: see(number, output.detach()[..., place], counted, rows)

    pairs: list[tuple[nn.Module, Any]] = []
    for number, block in enumerate(blocks):
        if part == "keys":
            pairs.append((down_projection(block), keys(number)))
        else:
            module, place = pre_activation(block)
            pairs.append((module, before(number, place)))
    with losses.evaluating(lm.model), hooked(*pairs):
        for rows, batch in passes(lm.model, encoded):  # noqa: B007  # the hooks read it
            counted = batch.attention_mask.bool()  # type: ignore[union-attr]
            counted[:, 0] &= counted.sum(1) == 1
            lm.model(**losses.inputs_of(batch))


@dataclass(frozen=True, eq=False)
class Moments:
    """Mean and standard deviation of each neuron's pre-activation over a table's tokens, (F,) float64 a layer."""

    mean: list[Tensor]
    deviation: list[Tensor]

    @staticmethod
    def of(lm: LM, encoded: Encoded) -> Moments:
        sizes = widths(lm.model)
        sums, squares = ([torch.zeros(size, dtype=torch.float64) for size in sizes] for _ in range(2))
        counts = [0] * len(sizes)

        def see(layer: int, values: Tensor, counted: Tensor, rows: np.ndarray) -> None:
            picked = values[counted].double().cpu()
            sums[layer] += picked.sum(0)
            squares[layer] += picked.square().sum(0)
            counts[layer] += len(picked)

        neurons(lm, encoded, "pre-activations", see)
        mean = [total / count for total, count in zip(sums, counts, strict=True)]
        spread = [
            (total / count - m.square()).clamp(min=1e-12).sqrt()
            for total, count, m in zip(squares, counts, mean, strict=True)
        ]
        return Moments(mean, spread)


def mean_sizes(lm: LM, encoded: Encoded) -> list[Tensor]:
    """The mean size |key| of each neuron over a table's tokens, (F,) float64 a layer."""
    sums = [torch.zeros(size, dtype=torch.float64) for size in widths(lm.model)]
    counts = [0] * len(sums)

    def see(layer: int, values: Tensor, counted: Tensor, rows: np.ndarray) -> None:
        picked = values[counted].double().cpu()
        sums[layer] += picked.abs().sum(0)
        counts[layer] += len(picked)

    neurons(lm, encoded, "keys", see)
    return [total / count for total, count in zip(sums, counts, strict=True)]


def pooled_keys(lm: LM, encoded: Encoded, places: Sequence[tuple[int, Pooling]]) -> dict[tuple[int, Pooling], Tensor]:
    """One key a row for each (layer, pooling): (N, F) float32, of the row's last token or the mean over its tokens."""
    sizes = widths(lm.model)
    found = {place: torch.zeros(len(encoded), sizes[place[0]]) for place in places}

    def see(layer: int, values: Tensor, counted: Tensor, rows: np.ndarray) -> None:
        for (wanted, pooling), keys in found.items():
            if wanted == layer:
                weights = counted.float() if pooling == "mean" else _last(counted)
                pooled = (values.float() * weights[..., None]).sum(1) / weights.sum(1, keepdim=True)
                keys[torch.as_tensor(rows)] = pooled.cpu()

    neurons(lm, encoded, "keys", see)
    return found


def _last(counted: Tensor) -> Tensor:
    """(B, T): 1 at each row's last token."""
    ends = counted.int().cumsum(1).argmax(1)
    return torch.nn.functional.one_hot(ends, counted.shape[1]).float()


@dataclass(frozen=True, eq=False)
class Box:
    """A box around keys: v is inside where |v - mean| <= alpha * k * deviation in every coordinate."""

    mean: Tensor  # (F,)
    deviation: Tensor  # (F,)
    k: float  # the smallest with which, at alpha = 1, every fitted key is inside

    @staticmethod
    def around(keys: Tensor) -> Box:
        """The box of (n, F) keys; k has a closed form (the authors' bisection finds the same)."""
        if len(keys) < 2:
            raise InputError(f"a box needs at least 2 keys, not {len(keys)}")
        mean, deviation = keys.mean(0), keys.std(0)
        deviation = deviation.clamp(min=max(float(deviation.max()) * _FLOOR, torch.finfo(keys.dtype).tiny))
        return Box(mean, deviation, float(((keys - mean).abs() / deviation).max()))

    def reach(self, keys: Tensor) -> Tensor:
        """(n,): the alpha with which each of (n, F) keys is just inside."""
        return ((keys - self.mean).abs() / self.deviation).amax(1) / self.k


def above_chance(inside: Tensor, outside: Tensor) -> float:
    """AUROC of telling two sets apart by a number that is smaller inside."""
    from sklearn.metrics import roc_auc_score

    truth = np.r_[np.ones(len(inside)), np.zeros(len(outside))]
    return float(roc_auc_score(truth, -torch.cat([inside, outside]).numpy()))


def enough(rows: list[Any], name: str) -> list[Any]:
    """The rows themselves, or an `InputError` if they are too few to probe a model with."""
    if len(rows) < LEAST:
        raise InputError(f"{len(rows)} {name} records are too few to probe the model with: wanted {LEAST} or more")
    return rows


G = TypeVar("G", bound=Guard)


def guard_of(lm: LM, kind: type[G]) -> G | None:
    """The model's guard, if it has one; `InputError` if it is of another kind."""
    if lm.guard is None or isinstance(lm.guard, kind):
        return lm.guard
    raise InputError(f"this model forgets by another guard ({type(lm.guard).__name__}): load it without that guard")
