"""Mixtures of experts: where routers and experts are, which experts a text is sent to, and how far that has moved.

Found by structure: a feed-forward block with a child "experts" (one tensor with all of them, or a list of modules) and
a router whose matrix has a row an expert.  Knows nothing of forgetting.
Shapes: B rows, T positions, N tokens, D hidden units, M mixture layers, E experts a layer, k of them a token.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal, cast

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from palimpsest.core import losses
from palimpsest.core.errors import InputError
from palimpsest.core.reference import passes
from palimpsest.core.seeds import numpy_rng
from palimpsest.data.batches import Batch, Encoded
from palimpsest.models.anatomy import base_of, feed_forward, hooked, layers

Gates = Literal["kept", "softmax"]

_ROUTERS = ("gate", "router")


@dataclass(frozen=True, eq=False)
class Mixture:
    """The mixture of experts of one layer."""

    layer: int
    router: nn.Module
    experts: nn.Module
    kept: int  # k, how many experts serve a token

    @property
    def count(self) -> int:
        """E."""
        return len(cast(Tensor, self.router.weight))

    @property
    def stacked(self) -> bool:
        """Whether one tensor holds a matrix of all experts."""
        return not isinstance(self.experts, nn.ModuleList)

    def weights_of(self, expert: int) -> list[nn.Parameter]:
        """The parameters that hold the expert; where they are stacked, its part is ``parameter[expert]``."""
        if isinstance(self.experts, nn.ModuleList):
            return list(self.experts[expert].parameters())
        return [p for p in self.experts.parameters() if len(p) == self.count]


def mixture_in(block: nn.Module, layer: int = 0, kept: int = 0) -> Mixture | None:
    """The mixture of experts that a feed-forward block is; None for a dense block."""
    experts = next((child for name, child in block.named_children() if name == "experts"), None)
    router = next((child for name, child in block.named_children() if name in _ROUTERS), None)
    weight = getattr(router, "weight", None)
    if experts is None or router is None or not isinstance(weight, Tensor) or weight.ndim != 2:
        return None
    if isinstance(experts, nn.ModuleList):
        if len(experts) != len(weight):
            return None
    elif not any(p.ndim == 3 and len(p) == len(weight) for p in experts.parameters()):
        return None
    own = getattr(router, "top_k", None) or getattr(block, "top_k", None)
    return Mixture(layer, router, experts, int(own or kept))


def mixtures(model: nn.Module) -> list[Mixture]:
    """The mixtures of experts of a model, first layer to last.

    Raises `InputError` for a dense model, and where all experts serve every token, so that none can be singled out.
    """
    config = base_of(model).config
    kept = int(getattr(config.get_text_config(), "num_experts_per_tok", None) or 0)
    blocks = [feed_forward(layer) for layer in layers(model)]
    found = [mixture_in(block, number, kept) for number, block in enumerate(blocks)]
    sparse = [mixture for mixture in found if mixture is not None]
    if not sparse:
        names = ", ".join(sorted({type(block).__name__ for block in blocks}))
        raise InputError(
            f"{type(base_of(model)).__name__} is dense: none of its {len(blocks)} feed-forward blocks ({names}) has a "
            "router and experts; this method needs a mixture of experts"
        )
    for mixture in sparse:
        if not 0 < mixture.kept < mixture.count:
            raise InputError(
                f"{mixture.kept} of {mixture.count} experts serve a token in layer {mixture.layer}: "
                "no expert can be singled out"
            )
    return sparse


@dataclass(frozen=True, eq=False)
class Routed:
    """What one call of a router decided about N tokens."""

    probabilities: Tensor  # (N, E) softmax over all experts, with its graph
    chosen: Tensor  # (N, k) int64: the experts that serve each token
    weights: Tensor  # (N, k): by how much, as the model itself weighs them

    def gates(self, kind: Gates = "kept") -> Tensor:
        """(N, E): the model's own weights, 0 for experts that were not chosen, or the whole softmax."""
        if kind == "softmax":
            return self.probabilities
        return torch.zeros_like(self.probabilities).scatter(1, self.chosen, self.weights.to(self.probabilities))


@contextmanager
def routing(found: Sequence[Mixture]) -> Iterator[list[list[Routed]]]:
    """Inside, every call of a router is written down: a list a mixture, in the order of `found`."""
    seen: list[list[Routed]] = [[] for _ in found]

    def write(number: int, mixture: Mixture):
        def hook(router: nn.Module, inputs: Any, output: Any) -> None:
            seen[number].append(_routed(router, mixture.kept, inputs[0], output))

        return hook

    with hooked(*((mixture.router, write(number, mixture)) for number, mixture in enumerate(found))):
        yield seen


def _routed(router: nn.Module, kept: int, hidden: Tensor, output: Any) -> Routed:
    """Routers return logits, weights and choices in an order of their own, or logits alone: told apart by their kind.

    The probabilities are computed from what the router was given, since some routers keep them to themselves.
    """
    weight, bias = cast(Tensor, router.weight), getattr(router, "bias", None)
    hidden = hidden.flatten(0, -2).float()
    probabilities = F.linear(hidden, weight.float(), None if bias is None else bias.float()).softmax(-1)
    parts = [part for part in (output if isinstance(output, tuple) else (output,)) if isinstance(part, Tensor)]
    chosen = next((part.flatten(0, -2) for part in parts if not part.is_floating_point()), None)
    if chosen is not None:
        same = [part.flatten(0, -2) for part in parts if part.is_floating_point()]
        beside = next((part for part in same if part.shape == chosen.shape), None)
        return Routed(probabilities, chosen, probabilities.gather(1, chosen) if beside is None else beside)
    weights, chosen = probabilities.topk(kept, dim=-1)
    return Routed(probabilities, chosen, weights)


@torch.no_grad()
def affinity(model: nn.Module, encoded: Encoded, gates: Gates = "kept") -> Tensor:
    """How much each expert has to do with a table, (M, E) float64: its gate, averaged over a row's tokens, then rows.

    Short rows weigh as much as long ones (the sheet's s_i).  Padding does not count.
    """
    found = mixtures(model)
    total = torch.zeros(len(found), found[0].count, dtype=torch.float64)
    with losses.evaluating(model):
        for _, batch in passes(model, encoded):
            with routing(found) as seen:
                model(**losses.inputs_of(batch))
            for number, calls in enumerate(seen):
                total[number] += row_means(calls[0].gates(gates), batch).sum(0).double().cpu()
    return total / len(encoded)


def row_means(values: Tensor, batch: Batch) -> Tensor:
    """(B, ...): values of all positions (B * T, ...), averaged over each row's tokens; padding does not count."""
    mask = cast(Tensor, batch.attention_mask)
    values_BT = values.view(*mask.shape, *values.shape[1:])
    real = mask.to(values.dtype).view(*mask.shape, *[1] * (values.ndim - 1))
    return (values_BT * real).sum(1) / real.sum(1)


def most_responsible(table: Tensor, layer_numbers: Sequence[int], count: int = 1) -> list[tuple[int, int]]:
    """The `count` (layer, expert) pairs of largest affinity over all layers; `table` is (M, E)."""
    if not 1 <= count <= table.numel():
        raise InputError(f"there are {table.numel()} experts, so {count} of them cannot be chosen")
    order = torch.argsort(table.flatten(), descending=True, stable=True)[:count].tolist()
    return [(layer_numbers[place // table.shape[1]], place % table.shape[1]) for place in order]


def concentration(table: Tensor) -> float:
    """How many times its fair share the busiest expert of any layer takes, 1 where all are alike; `table` is (M, E)."""
    shares = table / table.sum(1, keepdim=True)
    return float(shares.max() * table.shape[1])


def sample_of(encoded: Encoded, tokens: int, seed: int) -> Encoded:
    """Rows drawn at random until they have so many tokens; the whole table if it has fewer."""
    order = numpy_rng(seed, "calibration").permutation(len(encoded))
    enough = int(np.searchsorted(np.cumsum(encoded.lengths[order]), tokens)) + 1
    return encoded.select(np.sort(order[:enough]))


@torch.no_grad()
def selections(model: nn.Module, encoded: Encoded) -> list[Tensor]:
    """The experts that serve each token of each row: a (tokens, M, k) int64 tensor a row."""
    found = mixtures(model)
    rows: list[Tensor] = [torch.empty(0)] * len(encoded)
    with losses.evaluating(model):
        for numbers, batch in passes(model, encoded):
            with routing(found) as seen:
                model(**losses.inputs_of(batch))
            for row, piece in zip(numbers, selected(seen, batch), strict=True):
                rows[row] = piece.cpu()
    return rows


def selected(seen: Sequence[Sequence[Routed]], batch: Batch) -> list[Tensor]:
    """What `routing` saw of a batch, as in `selections`: (tokens, M, k) for each of its rows."""
    mask = cast(Tensor, batch.attention_mask)
    chosen = torch.stack([calls[0].chosen.view(*mask.shape, -1) for calls in seen], 2)
    return [line[: int(length)] for line, length in zip(chosen, mask.sum(1), strict=True)]


def overlap(now: Sequence[Tensor], start: Sequence[Tensor]) -> float:
    """The share of a token's experts that it had before, averaged over tokens and layers: 1 where nothing has moved."""
    kept = [
        (one[..., :, None] == other.to(one.device)[..., None, :]).any(-1).float().flatten()
        for one, other in zip(now, start, strict=True)
    ]
    return float(torch.cat(kept).mean())
