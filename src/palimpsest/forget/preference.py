"""The preference family: forgetting as disliking an answer, with a push that fades once the answer is unlikely.

NPO (Zhang et al. 2024, arXiv:2404.05868), SimNPO (Fan et al. 2024, arXiv:2410.07163), DPO towards "I don't know"
(Rafailov et al. 2023; Maini et al. 2024) and plain relabelling to it; sheet `knowledge_unlearning`, items 5-8.
Need: forget records, retain records unless `retain_loss` is "none"; the "I don't know" methods need questions.
Bounded below, unlike ascent; they suppress an answer more than they remove it.  Shapes: B rows.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from typing import TYPE_CHECKING

from palimpsest.core import losses
from palimpsest.core.errors import InputError
from palimpsest.core.methods import method
from palimpsest.core.seeds import numpy_rng
from palimpsest.core.watch import Watch
from palimpsest.data.lexicon import REFUSALS
from palimpsest.data.records import row_pair, select_questions
from palimpsest.forget.unlearn import Budget, Regularised, above_zero, encode, start_logprobs, unlearn

if TYPE_CHECKING:
    from datasets import Dataset
    from torch import Tensor, nn

    from palimpsest.data.batches import Batch, Encoded
    from palimpsest.data.request import ForgetRequest
    from palimpsest.models.lm import LM


@method(verb="forget", paper="knowledge_unlearning")
@dataclass(frozen=True, kw_only=True)
class NPO(Regularised):
    """Negative preference optimisation: push the forget set down relative to where it started, less as it gets low."""

    beta: float = 0.1  # how soon the push fades; towards 0 it is gradient ascent

    def __post_init__(self) -> None:
        super().__post_init__()
        above_zero(beta=self.beta)

    def __call__(self, lm: LM, request: ForgetRequest, *, watch: Watch | None = None) -> LM:
        forget = encode(self, lm, request.forget)
        start = start_logprobs(lm, forget)

        def loss(model: nn.Module, batch: dict[str, Batch]) -> Tensor:
            rows = batch["forget"]
            return losses.over_rows(losses.npo(losses.sequence_logprobs(model, rows), start(rows), self.beta), rows)

        return unlearn(self, lm, request, loss, watch=watch, forget=forget)


@method(verb="forget", paper="knowledge_unlearning", name="simnpo")
@dataclass(frozen=True, kw_only=True)
class SimNPO(Regularised):
    """SimNPO: negative preference optimisation without a reference, normalised by length."""

    beta: float = 4.5
    delta: float = 0.0  # beta times the loss a token at which the push is half its largest
    gamma: float = 0.125

    def __post_init__(self) -> None:
        super().__post_init__()
        above_zero(beta=self.beta)

    def __call__(self, lm: LM, request: ForgetRequest, *, watch: Watch | None = None) -> LM:
        def loss(model: nn.Module, batch: dict[str, Batch]) -> Tensor:
            rows = batch["forget"]
            return losses.over_rows(losses.simnpo(losses.cross_entropy(model, rows), self.beta, self.delta), rows)

        return unlearn(self, lm, request, loss, watch=watch)


@method(verb="forget", paper="knowledge_unlearning")
@dataclass(frozen=True, kw_only=True)
class IdkDPO(Regularised):
    """Direct preference optimisation that prefers "I don't know" to the true answer."""

    beta: float = 0.1

    def __post_init__(self) -> None:
        super().__post_init__()
        above_zero(beta=self.beta)

    def __call__(self, lm: LM, request: ForgetRequest, *, watch: Watch | None = None) -> LM:
        rejected, chosen = _with_refusals(self, lm, request)
        rejected_start, chosen_start = start_logprobs(lm, rejected), start_logprobs(lm, chosen)
        batches = self.batches(rejected, "forget")

        def loss(model: nn.Module, batch: dict[str, Batch]) -> Tensor:
            bad, good = batch["forget"], batch["refusal"]
            values = losses.dpo(
                losses.sequence_logprobs(model, good),
                chosen_start(good),
                losses.sequence_logprobs(model, bad),
                rejected_start(bad),
                self.beta,
            )
            return losses.over_rows(values, bad)

        refusals = {"refusal": lambda step: chosen.batch(batches.rows(step))}  # row by row beside "forget"
        return unlearn(self, lm, request, loss, watch=watch, forget=rejected, beside=refusals)


@method(verb="forget", paper="knowledge_unlearning")
@dataclass(frozen=True, kw_only=True)
class Relabel(Regularised):
    """Relabelling: fine-tune the forget questions on "I don't know"."""

    def __call__(self, lm: LM, request: ForgetRequest, *, watch: Watch | None = None) -> LM:
        def loss(model: nn.Module, batch: dict[str, Batch]) -> Tensor:
            return losses.nll(model, batch["forget"])

        _, refusals = _with_refusals(self, lm, request)
        return unlearn(self, lm, request, loss, watch=watch, forget=refusals)


def _with_refusals(budget: Budget, lm: LM, request: ForgetRequest) -> tuple[Encoded, Encoded]:
    """The forget questions with their true answers, and the same questions with seeded refusals, row by row."""
    asked = lm.pairs(only_questions(request.forget))
    picks = numpy_rng(budget.seed, "refusals").integers(len(REFUSALS), size=len(asked))
    refused = [join(prompt, REFUSALS[pick]) for (prompt, _), pick in zip(asked, picks, strict=True)]
    return encode(budget, lm, asked), encode(budget, lm, refused)


def only_questions(forget: Dataset) -> Dataset:
    """The forget records that are questions; a warning if there are others too, `InputError` if there are none."""
    asked = select_questions(forget)
    if len(asked) == 0:
        raise InputError("this method needs questions among the forget records (columns 'prompt' and 'completion')")
    if len(asked) < len(forget):
        warnings.warn(
            f"{len(forget) - len(asked)} of {len(forget)} forget records are documents, not questions: "
            "this method leaves them as they are",
            stacklevel=4,
        )
    return asked


def join(prompt: str, completion: str) -> tuple[str, str]:
    """A (prompt, completion) pair with the white space between them that records have."""
    return row_pair({"prompt": prompt, "completion": completion})[1]  # type: ignore[index]
