"""SCRUB: a student that goes away from its teacher where it must forget, and stays near it everywhere else.

Kurmanji et al. 2023 (arXiv:2302.09880), a baseline of datamodel matching (sheet `dmm`).  Teacher is the starting model,
whose predictions are read back from disk.  The first part of the steps also raises KL(teacher || student) on the forget
records; every step lowers the likelihood loss and the divergence on retain records.  Needs: forget and retain records.
The paper lets the learning rate fall by steps; here it is constant after its warm-up, as in all methods of the wing.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch.nn.functional as F
from torch import Tensor, nn

from palimpsest.core import losses
from palimpsest.core.errors import InputError
from palimpsest.core.methods import method
from palimpsest.core.reference import Reference, reference
from palimpsest.core.watch import Watch
from palimpsest.data.batches import Batch
from palimpsest.forget.unlearn import Budget, above_zero, encode, encode_retain, not_negative, plain, unlearn

if TYPE_CHECKING:
    from palimpsest.data.request import ForgetRequest
    from palimpsest.models.lm import LM


@method(verb="forget", paper="dmm")
@dataclass(frozen=True, kw_only=True)
class Scrub(Budget):
    """SCRUB: away from the starting model on the forget set at first, and always near it on the retain set."""

    ascending: float = 0.3  # share of the steps that push away
    temperature: float = 4.0
    label_weight: float = 0.99  # of the likelihood of retain records
    keep_weight: float = 0.1  # of the divergence on them

    def __post_init__(self) -> None:
        super().__post_init__()
        above_zero(temperature=self.temperature)
        not_negative(label_weight=self.label_weight, keep_weight=self.keep_weight)
        if not 0 < self.ascending <= 1:
            raise InputError(f"ascending is a share of the steps above 0 and up to 1, not {self.ascending:g}")

    def __call__(self, lm: LM, request: ForgetRequest, *, watch: Watch | None = None) -> LM:
        lm = plain(lm)
        forget, retain = encode(self, lm, request.forget), encode_retain(self, lm, request)
        teacher = {
            name: reference(lm.model, rows, lm.sha256) for name, rows in (("forget", forget), ("retain", retain))
        }
        batches = self.batches(forget, "forget")
        away = self.ascending * self.total_steps(batches)

        def loss(model: nn.Module, batch: dict[str, Batch]) -> Tensor:
            near = self.label_weight * losses.nll(model, batch["retain"])
            near = near + self.keep_weight * distilled(model, batch["retain"], teacher["retain"], self.temperature)
            if batch["step"] >= away:  # type: ignore[operator]
                return near
            return near - distilled(model, batch["forget"], teacher["forget"], self.temperature)

        kept = replace(self.batches(retain, "retain"), batch_size=batches.batch_size)
        beside: dict[str, Callable[[int], Any]] = {"retain": kept, "step": lambda step: step}
        return unlearn(self, lm, request, loss, watch=watch, forget=forget, beside=beside)


def distilled(model: nn.Module, batch: Batch, teacher: Reference, temperature: float) -> Tensor:
    """T^2 KL(teacher || model) of predictions at temperature T, mean over labelled tokens, in nats."""

    def divergence(logits: Tensor, targets: Tensor, wanted: Tensor) -> Tensor:
        now, then = ((values / temperature).log_softmax(-1) for values in (logits, wanted))
        return temperature**2 * F.kl_div(now, then, reduction="none", log_target=True).sum(-1)

    return losses.over_tokens(losses.per_token(model, batch, divergence, teacher), batch)
