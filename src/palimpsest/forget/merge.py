"""Forgetting by arithmetic on weights: learn the forget set harder, then walk the other way.

Task-vector negation (Ilharco et al. 2023, arXiv:2212.04089; MUSE's baseline) and parameter-efficient negation (PEM:
Zhang et al. 2023, arXiv:2306.14870); sheet `knowledge_unlearning`, items 15 and 16.  Needs: forget records only.
There is no anti-training: the only training is ordinary learning of the forget set.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from palimpsest.core import losses
from palimpsest.core.errors import InputError
from palimpsest.core.methods import method
from palimpsest.core.watch import Watch
from palimpsest.forget.unlearn import Budget, above_zero, encode, finished, plain, trainable_copy

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

    def __post_init__(self) -> None:
        super().__post_init__()
        above_zero(scale=self.scale, scales_tried=self.scales_tried)

    def __call__(self, lm: LM, request: ForgetRequest, *, watch: Watch | None = None) -> LM:
        watch = watch or Watch()
        lm = plain(lm)
        batches = self.batches(encode(self, lm, request.forget), "forget")
        work = trainable_copy(self, lm)
        training = self.training(batches.steps_per_epoch)
        watch.fit("reinforce", work, losses.nll, batches, main=False, **training)
        if not _learned(work, lm.model):
            raise InputError("the task vector is zero: learning the forget set changed no weight (raise lr or steps)")
        if watch.until is None:
            stretch(work, lm.model, -self.scale)
            return finished(lm, work)
        reached = -1.0  # minus the scale: fine-tuning itself is scale -1
        for stride in range(1, self.scales_tried + 1):
            wanted = self.scale * stride / self.scales_tried
            stretch(work, lm.model, wanted / reached)
            reached = wanted
            if watch.until(0, work):
                break
        return finished(lm, work)


@torch.no_grad()
def stretch(work: nn.Module, start: nn.Module, factor: float) -> None:
    """Multiply what `work` learned since `start` by `factor`, in place: start + factor * (work - start).

    Of LoRA factors (A, B) only B is multiplied, since the weights see their product.
    """
    if hasattr(work, "peft_config"):
        for _, factor_B in _outer_factors(work):
            factor_B.mul_(factor)
        return
    begun = dict(start.named_parameters())
    for name, weight in work.named_parameters():
        origin = begun[name].to(weight)
        weight.copy_(origin + factor * (weight - origin))


def _outer_factors(work: nn.Module) -> list[tuple[str, nn.Parameter]]:
    return [(name, p) for name, p in work.named_parameters() if ".lora_B." in name]


def _learned(work: nn.Module, start: nn.Module) -> bool:
    """Whether training changed anything."""
    if hasattr(work, "peft_config"):
        return any(bool(p.any()) for _, p in _outer_factors(work))
    begun = dict(start.named_parameters())
    return any(not torch.equal(p, begun[name].to(p)) for name, p in work.named_parameters())
