"""The preference family: forgetting as disliking an answer, with a push that fades once the answer is unlikely.

NPO (Zhang et al. 2024, arXiv:2404.05868), SimNPO (Fan et al. 2024, arXiv:2410.07163), DPO towards "I don't know"
(Rafailov et al. 2023; Maini et al. 2024) and plain relabelling to it; sheet `knowledge_unlearning`, items 5-8.
Need: forget records, retain records unless `retain_loss` is "none"; the "I don't know" methods need questions.
Bounded below, unlike ascent; they suppress an answer more than they remove it.  Shapes: B rows.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from palimpsest.core import losses
from palimpsest.core.errors import InputError
from palimpsest.core.methods import method
from palimpsest.core.seeds import numpy_rng
from palimpsest.core.watch import Watch
from palimpsest.data.records import questions
from palimpsest.data.world import REFUSALS
from palimpsest.forget.unlearn import Budget, Regularised, mean, positive, start_logprobs, unlearn

if TYPE_CHECKING:
    from torch import Tensor, nn

    from palimpsest.data.batches import Batch, Encoded
    from palimpsest.data.request import ForgetRequest
    from palimpsest.models.lm import LM


@method(verb="forget", paper="knowledge_unlearning", name="npo")
@dataclass(frozen=True, kw_only=True)
class NPO(Regularised):
    """Negative preference optimisation: push the forget set down relative to where it started, less as it gets low."""

    beta: float = 0.1  # how soon the push fades; towards 0 it is gradient ascent

    def __call__(self, lm: LM, request: ForgetRequest, *, watch: Watch | None = None) -> LM:
        positive(beta=self.beta)
        forget = lm.encode(request.forget, max_length=self.max_length)
        start = start_logprobs(lm, forget)

        def loss(model: nn.Module, batch: dict[str, Batch]) -> Tensor:
            rows = batch["forget"]
            return mean(losses.npo(losses.sequence_logprobs(model, rows), start(rows), self.beta), rows)

        return unlearn(self, lm, request, loss, watch=watch, forget=forget)


@method(verb="forget", paper="knowledge_unlearning", name="simnpo")
@dataclass(frozen=True, kw_only=True)
class SimNPO(Regularised):
    """SimNPO: negative preference optimisation without a reference, normalised by length."""

    beta: float = 4.5
    delta: float = 0.0  # the loss a token that counts as forgotten
    gamma: float = 0.125

    def __call__(self, lm: LM, request: ForgetRequest, *, watch: Watch | None = None) -> LM:
        positive(beta=self.beta)

        def loss(model: nn.Module, batch: dict[str, Batch]) -> Tensor:
            rows = batch["forget"]
            return mean(losses.simnpo(losses.cross_entropy(model, rows), self.beta, self.delta), rows)

        return unlearn(self, lm, request, loss, watch=watch)


@method(verb="forget", paper="knowledge_unlearning")
@dataclass(frozen=True, kw_only=True)
class IdkDPO(Regularised):
    """Direct preference optimisation that prefers "I don't know" to the true answer."""

    beta: float = 0.1

    def __call__(self, lm: LM, request: ForgetRequest, *, watch: Watch | None = None) -> LM:
        positive(beta=self.beta)
        rejected, chosen = _with_refusals(self, lm, request)
        rejected_start, chosen_start = start_logprobs(lm, rejected), start_logprobs(lm, chosen)
        rejected_batches = self.batches(rejected, "forget")

        def loss(model: nn.Module, batch: dict[str, Batch]) -> Tensor:
            bad, good = batch["forget"], batch["refusal"]
            values = losses.dpo(
                losses.sequence_logprobs(model, good),
                chosen_start(good),
                losses.sequence_logprobs(model, bad),
                rejected_start(bad),
                self.beta,
            )
            return mean(values, bad)

        refusals = {"refusal": lambda step: chosen.batch(rejected_batches.rows(step))}  # row by row beside "forget"
        return unlearn(self, lm, request, loss, watch=watch, forget=rejected, beside=refusals)


@method(verb="forget", paper="knowledge_unlearning")
@dataclass(frozen=True, kw_only=True)
class Relabel(Regularised):
    """Relabelling: fine-tune the forget questions on "I don't know"."""

    def __call__(self, lm: LM, request: ForgetRequest, *, watch: Watch | None = None) -> LM:
        _, refusals = _with_refusals(self, lm, request)
        return unlearn(
            self, lm, request, lambda model, batch: losses.nll(model, batch["forget"]), watch=watch, forget=refusals
        )


def _with_refusals(budget: Budget, lm: LM, request: ForgetRequest) -> tuple[Encoded, Encoded]:
    """The forget questions with their true answers, and the same questions with seeded refusals, row by row."""
    asked = questions(request.forget)
    if not asked:
        raise InputError("this method needs questions among the forget records (columns 'prompt' and 'completion')")
    picks = numpy_rng(budget.seed, "refusals").integers(len(REFUSALS), size=len(asked))
    refused = [(prompt, " " + REFUSALS[pick]) for (prompt, _), pick in zip(asked, picks, strict=True)]
    return lm.encode(asked, max_length=budget.max_length), lm.encode(refused, max_length=budget.max_length)
