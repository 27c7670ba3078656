"""Ascent with a say for each token: how much it is pushed, or what is put in its place.

WGA (Wang et al. 2025, arXiv:2502.19301), SatImp (Yang et al. 2025, arXiv:2505.11953), UNDIAL (Dong et al. 2024,
arXiv:2402.10052) and CE-U (Yang 2025, arXiv:2503.01224); sheet `knowledge_unlearning`, item 13.
Need: forget records, retain records unless `retain_loss` is "none".
Shapes: B rows, T tokens, n labelled tokens, V words.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from palimpsest.core import losses
from palimpsest.core.methods import method
from palimpsest.core.reference import reference
from palimpsest.core.watch import Watch
from palimpsest.data.batches import IGNORE
from palimpsest.forget.unlearn import Regularised, above_zero, encode, not_negative, unlearn

if TYPE_CHECKING:
    from torch import nn

    from palimpsest.data.batches import Batch
    from palimpsest.data.request import ForgetRequest
    from palimpsest.models.lm import LM


def weighted_ascent(model: nn.Module, batch: Batch, weight: Callable[[Tensor], Tensor]) -> Tensor:
    """-CE with each token weighted by ``weight(its probability)``, which carries no gradient; mean over tokens."""
    logprobs = losses.token_logprobs(model, batch)
    return losses.over_tokens(weight(logprobs.detach().exp()) * logprobs, batch)


def undial(model: nn.Module, batch: Batch, start: losses.ReferenceStates, strength: float) -> Tensor:
    """Cross-entropy to the start's distribution with the true token's logit lowered by `strength`, mean over tokens."""

    def score(logits: Tensor, targets: Tensor, frozen: Tensor) -> Tensor:
        lowered = frozen.scatter_add(1, targets[:, None], torch.full_like(frozen[:, :1], -strength))
        return F.cross_entropy(logits, lowered.softmax(-1), reduction="none")

    return losses.over_tokens(losses.per_token(model, batch, score, start), batch)


def ce_u(model: nn.Module, batch: Batch) -> Tensor:
    """Cross-entropy to the model's own distribution without the true token, mean over tokens but the first of a row."""

    def score(logits: Tensor, targets: Tensor) -> Tensor:
        without = logits.detach().scatter(1, targets[:, None], -torch.inf)
        return F.cross_entropy(logits, without.softmax(-1), reduction="none")

    values = losses.per_token(model, batch, score)
    labelled = batch.targets != IGNORE
    first = labelled & (labelled.cumsum(1) == 1)
    return values.masked_fill(first, 0.0).sum() / max(batch.total_tokens - batch.total_rows, 1)


@method(verb="forget", paper="knowledge_unlearning")
@dataclass(frozen=True, kw_only=True)
class WGA(Regularised):
    """Weighted gradient ascent: a token is pushed less the less likely it already is."""

    beta: float = 1.0  # a token's weight is its probability to this power; 0 is gradient difference

    def __post_init__(self) -> None:
        super().__post_init__()
        not_negative(beta=self.beta)

    def __call__(self, lm: LM, request: ForgetRequest, *, watch: Watch | None = None) -> LM:
        def loss(model: nn.Module, batch: dict[str, Batch]) -> Tensor:
            return weighted_ascent(model, batch["forget"], lambda p: p**self.beta)

        return unlearn(self, lm, request, loss, watch=watch)


@method(verb="forget", paper="knowledge_unlearning", name="satimp")
@dataclass(frozen=True, kw_only=True)
class SatImp(Regularised):
    """Saturation and importance: most weight on tokens that are known but not beyond doubt, p^a (1 - p)^b."""

    beta1: float = 5.0
    beta2: float = 1.0
    gamma: float = 0.1

    def __post_init__(self) -> None:
        super().__post_init__()
        not_negative(beta1=self.beta1, beta2=self.beta2)

    def __call__(self, lm: LM, request: ForgetRequest, *, watch: Watch | None = None) -> LM:
        def loss(model: nn.Module, batch: dict[str, Batch]) -> Tensor:
            return weighted_ascent(model, batch["forget"], lambda p: p**self.beta1 * (1 - p) ** self.beta2)

        return unlearn(self, lm, request, loss, watch=watch)


@method(verb="forget", paper="knowledge_unlearning", name="undial")
@dataclass(frozen=True, kw_only=True)
class UNDIAL(Regularised):
    """Self-distillation with adjusted logits: the start's own predictions, with the true token pushed down in them."""

    strength: float = 10.0  # what is subtracted from the true token's logit
    lr: float = 1e-4

    def __post_init__(self) -> None:
        super().__post_init__()
        above_zero(strength=self.strength)

    def __call__(self, lm: LM, request: ForgetRequest, *, watch: Watch | None = None) -> LM:
        forget = encode(self, lm, request.forget)
        start = reference(lm.model, forget, lm.sha256)

        def loss(model: nn.Module, batch: dict[str, Batch]) -> Tensor:
            return undial(model, batch["forget"], start, self.strength)

        return unlearn(self, lm, request, loss, watch=watch, forget=forget)


@method(verb="forget", paper="knowledge_unlearning", name="ce-u")
@dataclass(frozen=True, kw_only=True)
class CEU(Regularised):
    """Cross-entropy unlearning: the model's own predictions as if the true token did not exist."""

    def __call__(self, lm: LM, request: ForgetRequest, *, watch: Watch | None = None) -> LM:
        def loss(model: nn.Module, batch: dict[str, Batch]) -> Tensor:
            return ce_u(model, batch["forget"])

        return unlearn(self, lm, request, loss, watch=watch)
