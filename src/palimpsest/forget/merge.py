"""Forgetting by arithmetic on weights: learn the forget set harder, then walk the other way.

Task-vector negation (Ilharco et al. 2023, arXiv:2212.04089; MUSE's baseline) and parameter-efficient negation (PEM: Zhang
et al. 2023, arXiv:2306.14870); sheet `knowledge_unlearning`, items 15 and 16.  Needs: forget records only.
There is no anti-training: the only training is ordinary learning of the forget set.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch

from palimpsest.core import losses
from palimpsest.core.errors import InputError
from palimpsest.core.methods import method
from palimpsest.core.watch import Watch
from palimpsest.forget.unlearn import Budget, encode, finished, positive, trainable_copy
from palimpsest.models.anatomy import same_weights

if TYPE_CHECKING:
    from torch import nn

    from palimpsest.data.request import ForgetRequest
    from palimpsest.models.lm import LM


@method(verb="forget", paper="knowledge_unlearning")
@dataclass(frozen=True, kw_only=True)
class TaskVector(Budget):
    """Task-vector negation: subtract what fine-tuning on the forget set adds to the weights.

    With `lora_rank` this is PEM's negation of one LoRA factor (negating both would change nothing).  Given a watch that
    may stop, growing scales up to `scale` are tried and the first that satisfies it is taken (MUSE's stopping rule).
    """

    scale: float = 5.0  # how far to walk back (5 in MUSE)
    scales_tried: int = 10  # equal strides up to `scale`, when the caller's stop rule is asked

    def __call__(self, lm: LM, request: ForgetRequest, *, watch: Watch | None = None) -> LM:
        positive(scale=self.scale, scales_tried=self.scales_tried)
        watch = watch or Watch()
        batches = self.batches(encode(self, lm, request.forget), "forget")
        work = trainable_copy(lm, self.lora_rank)
        watch.fit(
            "reinforce",
            work,
            losses.nll,
            batches,
            main=False,
            steps=self.total_steps(batches),
            lr=self.lr,
            weight_decay=self.weight_decay,
            seed=self.seed,
        )
        reinforced = finished(lm, work).model
        edited = lm.copy().model
        if watch.until is None:
            return _edited(lm, edited, reinforced, self.scale)
        for stride in range(1, self.scales_tried + 1):
            _edited(lm, edited, reinforced, self.scale * stride / self.scales_tried)
            if watch.until(stride, edited):
                break
        return replace(lm, model=edited)


@torch.no_grad()
def negate(start: nn.Module, reinforced: nn.Module, into: nn.Module, scale: float) -> None:
    """Write start - scale * (reinforced - start) into the weights of `into`, tensor by tensor."""
    learned = dict(reinforced.named_parameters())
    written = dict(into.named_parameters())
    for name, weight in start.named_parameters():
        written[name].copy_(weight - scale * (learned[name].to(weight.device) - weight))


def _edited(lm: LM, into: nn.Module, reinforced: nn.Module, scale: float) -> LM:
    if same_weights(lm.model, reinforced):
        raise InputError("the task vector is zero: fine-tuning on the forget set changed no weight (raise lr or steps)")
    negate(lm.model, reinforced, into, scale)
    return replace(lm, model=into)
