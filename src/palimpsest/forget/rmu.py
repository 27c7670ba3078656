"""Representation misdirection: drag the hidden states of what must go towards one random direction, hold all others.

Li et al. 2024 (WMDP, arXiv:2403.03218); sheet `knowledge_unlearning`, item 11.  Needs: forget and retain records.
Only the feed-forward down projections of three layers are trained (of a mixture of experts, all experts); only tokens
of the text (never padding) are moved.
Shapes: B rows, T tokens, D hidden units.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from palimpsest.core import losses
from palimpsest.core.errors import InputError
from palimpsest.core.methods import method
from palimpsest.core.reference import TokenStates, token_states
from palimpsest.core.seeds import torch_rng
from palimpsest.core.watch import Watch
from palimpsest.forget.unlearn import Budget, above_zero, encode_retain, unlearn
from palimpsest.models.anatomy import capture, down_projection, feed_forward, layers
from palimpsest.models.experts import mixture_in

if TYPE_CHECKING:
    from palimpsest.data.batches import Batch, Encoded
    from palimpsest.data.request import ForgetRequest
    from palimpsest.models.lm import LM


@method(verb="forget", paper="knowledge_unlearning")
@dataclass(frozen=True, kw_only=True)
class RMU(Budget):
    """RMU: steer hidden states of the forget set to a fixed random direction, keep those of the retain set."""

    layer: int | None = None  # whose output is steered; None: at 7/32 of the depth (7 of 32 in the paper)
    steering: float = 6.5  # c: the length of the target, in units of the mean activation's norm if `relative`
    relative: bool = True  # c counts in mean activation norms, so that one default serves every model (ours)
    alpha: float = 10.0  # weight of the retain term; 1200 in the paper's 7B model, which holds a small model still
    lr: float = 5e-5

    def __post_init__(self) -> None:
        super().__post_init__()
        above_zero(steering=self.steering, alpha=self.alpha)

    def __call__(self, lm: LM, request: ForgetRequest, *, watch: Watch | None = None) -> LM:
        depth = len(layers(lm.model))
        layer = depth * 7 // 32 if self.layer is None else self.layer
        if not 0 <= layer < depth:
            raise InputError(f"layer must lie in 0..{depth - 1} for this model, not {layer}")
        retain = encode_retain(self, lm, request)
        start = _start_states(lm, retain, layer)
        target = self._target(start)

        def loss(model: nn.Module, batch: dict[str, Batch]) -> Tensor:
            gone, kept = batch["forget"], batch["keep"]
            away = misdirection(states_of(model, gone, layer), target, gone)
            near = misdirection(states_of(model, kept, layer), start.of(kept), kept)
            return away + self.alpha * near

        def trainable(model: nn.Module) -> list[nn.Parameter]:
            moved = layers(model)[max(0, layer - 2) : layer + 1]
            return [p for block in moved for p in _trained(feed_forward(block))]

        keep = {"keep": self.batches(retain, "retain")}
        return unlearn(self, lm, request, loss, watch=watch, beside=keep, trainable=trainable)

    def _target(self, start: TokenStates) -> Tensor:
        """c * u, (D,): one fixed draw for the whole run."""
        direction = torch.rand(start.values.shape[1], generator=torch_rng(self.seed, "steering"))
        norm = torch.cat([states.float().norm(dim=1) for states in start.values.split(65536)]).mean()
        length = self.steering * (norm if self.relative else 1.0)
        return length * direction / direction.norm()


def _trained(block: nn.Module) -> list[nn.Parameter]:
    mixture = mixture_in(block)
    return list((down_projection(block) if mixture is None else mixture.experts).parameters())


def states_of(model: nn.Module, batch: Batch, layer: int) -> Tensor:
    """The layer's output at every real token of the batch, (tokens, D), row by row."""
    hidden_BTD = capture(model, layer, lambda: model(**losses.inputs_of(batch)))
    return hidden_BTD[batch.attention_mask.bool()]  # type: ignore[union-attr]


def misdirection(states: Tensor, wanted: Tensor, batch: Batch) -> Tensor:
    """Squared distance of `states` from `wanted`: the mean over units, over a row's tokens, and over the step's rows.

    `states` (tokens, D) are those of every real token of `batch`, as from `states_of`; `wanted` is (tokens, D) or (D,).
    """
    distances = (states.float() - wanted.to(states.device).float()).square().mean(1)
    lengths = batch.attention_mask.sum(1)  # type: ignore[union-attr]
    line = torch.arange(len(lengths), device=lengths.device).repeat_interleave(lengths)
    sums = torch.zeros(len(lengths), device=distances.device).index_add(0, line, distances)
    return losses.over_rows(sums / lengths, batch)


def _start_states(lm: LM, encoded: Encoded, layer: int) -> TokenStates:
    """The starting model's output of `layer` for every token of every row."""
    return token_states(
        "layer-states",
        [lm.sha256, encoded.sha256, layer],
        lm.model,
        encoded,
        encoded.lengths,
        lambda batch: states_of(lm.model, batch, layer),
    )
