"""Gradient ascent and its retain-regularised relatives: raise the loss on what must go.

Jang et al. 2023 (KUL), Liu et al. 2022 (gradient difference), Maini et al. 2024 (KL minimisation); sheet
`knowledge_unlearning`, items 1-3 and 5.  Need: forget records; the regularised ones retain records.
The ascent is unbounded: run long enough it destroys the model (that is the survey's warning, and our claim).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from palimpsest.core import losses
from palimpsest.core.methods import method
from palimpsest.core.watch import Watch
from palimpsest.forget.unlearn import Budget, Regularised, RetainLoss, encode, required, unlearn

if TYPE_CHECKING:
    from torch import Tensor, nn

    from palimpsest.data.batches import Batch
    from palimpsest.data.request import ForgetRequest
    from palimpsest.models.lm import LM


def gradient_ascent(model: nn.Module, batch: dict[str, Batch]) -> Tensor:
    """-CE on the forget batch: its mean log-probability a token."""
    return -losses.nll(model, batch["forget"])


@method(verb="forget", paper="knowledge_unlearning")
@dataclass(frozen=True, kw_only=True)
class GradientAscent(Budget):
    """Gradient ascent: raise the loss on the forget set, and nothing else."""

    def __call__(self, lm: LM, request: ForgetRequest, *, watch: Watch | None = None) -> LM:
        return unlearn(self, lm, request, gradient_ascent, watch=watch)


@method(verb="forget", paper="knowledge_unlearning")
@dataclass(frozen=True, kw_only=True)
class GradDiff(Regularised):
    """Gradient difference: raise the loss on the forget set while lowering it on the retain set."""

    def __call__(self, lm: LM, request: ForgetRequest, *, watch: Watch | None = None) -> LM:
        return unlearn(self, lm, request, gradient_ascent, watch=watch)


@method(verb="forget", paper="knowledge_unlearning")
@dataclass(frozen=True, kw_only=True)
class KLMin(Regularised):
    """KL minimisation: raise the loss on the forget set while staying near the start's predictions on the retain set."""

    retain_loss: RetainLoss = "kl"

    def __call__(self, lm: LM, request: ForgetRequest, *, watch: Watch | None = None) -> LM:
        return unlearn(self, lm, request, gradient_ascent, watch=watch)


@method(verb="forget", paper="knowledge_unlearning")
@dataclass(frozen=True, kw_only=True)
class FinetuneRetain(Budget):
    """Fine-tuning on the retain set alone: what forgets by itself when training goes on (the survey's control)."""

    def __call__(self, lm: LM, request: ForgetRequest, *, watch: Watch | None = None) -> LM:
        retain = encode(self, lm, required(request.retain, "retain"))
        return unlearn(
            self, lm, request, lambda model, batch: losses.nll(model, batch["forget"]), watch=watch, forget=retain
        )
