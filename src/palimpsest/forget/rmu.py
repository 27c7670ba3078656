"""Representation misdirection: drag the hidden states of what must go towards one random direction, hold all others.

Li et al. 2024 (WMDP, arXiv:2403.03218); sheet `knowledge_unlearning`, item 11.  Needs: forget and retain records.
Only the feed-forward down projections of three layers are trained, and only tokens of the text (never padding) are moved.
Shapes: B rows, T tokens, D hidden units.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from palimpsest.core.cache import cached
from palimpsest.core.errors import InputError
from palimpsest.core.methods import method
from palimpsest.core.seeds import torch_rng
from palimpsest.core.watch import Watch
from palimpsest.forget.unlearn import Budget, encode, mean, positive, required, unlearn
from palimpsest.models.anatomy import capture, down_projection, feed_forward, layers

if TYPE_CHECKING:
    from pathlib import Path

    from palimpsest.data.batches import Batch, Encoded
    from palimpsest.data.request import ForgetRequest
    from palimpsest.models.lm import LM


@method(verb="forget", paper="knowledge_unlearning", name="rmu")
@dataclass(frozen=True, kw_only=True)
class RMU(Budget):
    """RMU: steer hidden states of the forget set to a fixed random direction, keep those of the retain set."""

    layer: int | None = None  # whose output is steered; None: at a quarter of the depth (7 of 32 in the paper)
    steering: float = 6.5  # c: the length of the target, in units of the mean activation's norm if `relative`
    relative: bool = True  # c counts in mean activation norms, so that one default serves every model (ours)
    alpha: float = 1200.0  # weight of the retain term (1200 in the paper at c = 6.5 absolute)
    lr: float = 5e-5

    def __call__(self, lm: LM, request: ForgetRequest, *, watch: Watch | None = None) -> LM:
        positive(steering=self.steering)
        stack = layers(lm.model)
        layer = len(stack) // 4 if self.layer is None else self.layer
        if not 0 <= layer < len(stack):
            raise InputError(f"layer must lie in 0..{len(stack) - 1} for this model, not {layer}")
        retain = encode(self, lm, required(request.retain, "retain"))
        start = _layer_states(lm, retain, layer)
        target = self._target(lm, start)

        def loss(model: nn.Module, batch: dict[str, Batch]) -> Tensor:
            away = _distance(_states(model, batch["forget"], layer), target, batch["forget"])
            kept = batch["keep"]
            frozen = torch.cat([start[row] for row in kept.rows.tolist()]).to(target.device)
            near = _distance(_states(model, kept, layer), frozen, kept)
            return away + self.alpha * near

        def trainable(model: nn.Module) -> list[nn.Parameter]:
            moved = layers(model)[max(0, layer - 2) : layer + 1]
            return [p for block in moved for p in down_projection(feed_forward(block)).parameters()]

        keep = {"keep": self.batches(retain, "retain")}
        return unlearn(self, lm, request, loss, watch=watch, beside=keep, trainable=trainable)

    def _target(self, lm: LM, start: list[Tensor]) -> Tensor:
        """c * u, (D,): one fixed draw for the whole run."""
        direction = torch.rand(start[0].shape[1], generator=torch_rng(self.seed, "steering"))
        norm = torch.cat(start).float().norm(dim=1).mean() if self.relative else 1.0
        return (self.steering * norm * direction / direction.norm()).to(lm.model.device)


def _states(model: nn.Module, batch: Batch, layer: int) -> Tensor:
    """The layer's output at every real token of the batch, (tokens, D), row by row."""
    hidden_BTD = capture(
        model, layer, lambda: model(input_ids=batch.input_ids, attention_mask=batch.attention_mask, use_cache=False)
    )
    return hidden_BTD[batch.attention_mask.bool()]  # type: ignore[union-attr]


def _distance(states: Tensor, wanted: Tensor, batch: Batch) -> Tensor:
    """Squared distance, averaged over units, over a row's tokens, and over the step's rows."""
    distances = (states - wanted).square().mean(1)
    sizes = batch.attention_mask.sum(1)  # type: ignore[union-attr]
    line = torch.arange(len(sizes), device=sizes.device).repeat_interleave(sizes)
    return mean(torch.zeros(len(sizes), device=distances.device).index_add(0, line, distances) / sizes, batch)


def _layer_states(lm: LM, encoded: Encoded, layer: int) -> list[Tensor]:
    """The starting model's output of `layer` for every token of every row: N tensors (T, D), memory-mapped."""
    lengths = encoded.lengths.tolist()
    width = lm.model.config.hidden_size
    size = sum(lengths) * width
    dtype = next(lm.model.parameters()).dtype

    def build(folder: Path) -> None:
        with (folder / "states.bin").open("wb") as handle:
            handle.truncate(size * dtype.itemsize)
        offsets = [0]
        for length in lengths:
            offsets.append(offsets[-1] + length)
        everything = torch.from_file(str(folder / "states.bin"), shared=True, size=size, dtype=dtype).view(-1, width)
        with torch.no_grad():
            for rows in encoded.by_length(32):
                states = _states(lm.model.eval(), encoded.batch(rows).to(lm.model.device), layer).cpu()
                for row, piece in zip(rows, states.split([lengths[row] for row in rows]), strict=True):
                    everything[offsets[row] : offsets[row + 1]] = piece

    def read(folder: Path) -> list[Tensor]:
        everything = torch.from_file(str(folder / "states.bin"), shared=False, size=size, dtype=dtype)
        return list(everything.view(-1, width).split(lengths))

    return cached("layer-states", [lm.sha256, encoded.sha256, layer, str(dtype)], build, read)
