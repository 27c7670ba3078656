"""Gradient ascent and its regularised relatives: raise the loss on what must go.

Jang et al. 2023 (KUL), Liu et al. 2022 (gradient difference), Maini et al. 2024 (KL minimisation), Yao et al. 2023
(LLMU, arXiv:2310.10683); sheet `knowledge_unlearning`, items 1-4.  Need: forget records; all but ascent retain records.
The ascent is unbounded: run long enough it destroys the model (that is the survey's warning, and our claim).
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from palimpsest.core import losses
from palimpsest.core.methods import method
from palimpsest.core.seeds import numpy_rng
from palimpsest.core.watch import Watch
from palimpsest.forget.unlearn import (
    Budget,
    Regularised,
    RetainLoss,
    above_zero,
    encode,
    encode_retain,
    not_negative,
    required,
    unlearn,
)

if TYPE_CHECKING:
    from torch import Tensor, nn

    from palimpsest.data.batches import Batch
    from palimpsest.data.request import ForgetRequest
    from palimpsest.models.lm import LM

_ANSWERS = 8  # unrelated answers that LLMU draws for each forget record


def gradient_ascent(model: nn.Module, batch: Batch) -> Tensor:
    """-CE: the mean log-probability a labelled token, which minimising drives down."""
    return -losses.nll(model, batch)


@method(verb="forget", paper="knowledge_unlearning")
@dataclass(frozen=True, kw_only=True)
class GradientAscent(Budget):
    """Gradient ascent: raise the loss on the forget set, and nothing else."""

    def __call__(self, lm: LM, request: ForgetRequest, *, watch: Watch | None = None) -> LM:
        return unlearn(self, lm, request, _ascend, watch=watch)


@method(verb="forget", paper="knowledge_unlearning")
@dataclass(frozen=True, kw_only=True)
class GradDiff(Regularised):
    """Gradient difference: raise the loss on the forget set while lowering it on the retain set."""

    def __call__(self, lm: LM, request: ForgetRequest, *, watch: Watch | None = None) -> LM:
        return unlearn(self, lm, request, _ascend, watch=watch)


@method(verb="forget", paper="knowledge_unlearning")
@dataclass(frozen=True, kw_only=True)
class KLMin(Regularised):
    """KL minimisation: raise the loss on the forget set and stay near the start's predictions on the retain set."""

    retain_loss: RetainLoss = "kl"

    def __call__(self, lm: LM, request: ForgetRequest, *, watch: Watch | None = None) -> LM:
        return unlearn(self, lm, request, _ascend, watch=watch)


@method(verb="forget", paper="knowledge_unlearning")
@dataclass(frozen=True, kw_only=True)
class LLMU(Regularised):
    """LLMU: raise the loss on the forget set, teach its prompts unrelated answers, stay near the start elsewhere.

    The weights are the original's e1 (`gamma`), e2 (`mislead`) and e3 (`alpha`).  Unrelated answers come from the
    retain set, and so does the text on which the model must stay as it was.
    """

    gamma: float = 0.5
    mislead: float = 1.0
    retain_loss: RetainLoss = "kl"
    largest_loss: float = 100.0  # training ends once the forget loss a token is above this

    def __post_init__(self) -> None:
        super().__post_init__()
        above_zero(largest_loss=self.largest_loss)
        not_negative(mislead=self.mislead)

    def __call__(self, lm: LM, request: ForgetRequest, *, watch: Watch | None = None) -> LM:
        forget = encode(self, lm, request.forget)
        unrelated = encode(self, lm, self._unrelated(lm, request))
        batches = self.batches(forget, "forget")
        last = 0.0

        def mislead(step: int) -> Batch:
            draw = step // batches.steps_per_epoch % _ANSWERS
            return unrelated.batch(batches.rows(step) + draw * len(forget))

        def loss(model: nn.Module, batch: dict[str, Batch]) -> Tensor:
            nonlocal last
            rows = batch["forget"]
            own = losses.nll(model, rows)
            last = own.item() * rows.total_rows / len(rows)  # of this share, as if it were the whole batch
            return -own + self.mislead / self.gamma * losses.nll(model, batch["mislead"])

        watch = watch or Watch()
        asked = watch.until

        def until(step: int, model: nn.Module) -> bool:
            return last > self.largest_loss or (asked is not None and asked(step, model))

        return unlearn(
            self,
            lm,
            request,
            loss,
            watch=replace(watch, until=until),
            forget=forget,
            beside={"mislead": mislead},
        )

    def _unrelated(self, lm: LM, request: ForgetRequest) -> list[tuple[str, str]]:
        """`_ANSWERS` times over, every forget prompt with the completion of a random retain record."""
        answers = [completion for _, completion in lm.pairs(required(request.retain, "retain"))]
        prompts = [prompt for prompt, _ in lm.pairs(request.forget)] * _ANSWERS
        picks = numpy_rng(self.seed, "unrelated").integers(len(answers), size=len(prompts))
        return [(prompt, answers[pick]) for prompt, pick in zip(prompts, picks, strict=True)]


@method(verb="forget", paper="knowledge_unlearning")
@dataclass(frozen=True, kw_only=True)
class FinetuneRetain(Budget):
    """Fine-tuning on the retain set alone: what forgets by itself when training goes on (the survey's control)."""

    def __call__(self, lm: LM, request: ForgetRequest, *, watch: Watch | None = None) -> LM:
        return unlearn(self, lm, request, _descend, watch=watch, forget=encode_retain(self, lm, request))


def _ascend(model: nn.Module, batch: dict[str, Batch]) -> Tensor:
    return gradient_ascent(model, batch["forget"])


def _descend(model: nn.Module, batch: dict[str, Batch]) -> Tensor:
    return losses.nll(model, batch["forget"])
