"""Knowledge gap alignment: treat the forget set with the very gap in knowledge that unseen data shows.

Wang et al. 2023 (arXiv:2305.06535); sheet `knowledge_unlearning`, item 9.  Needs: forget, retain and holdout records
(never seen, of the same distribution).  Three helpers are asked once each, one after the other, and only their cached
predictions are kept: A_D (the starting model), A_f (trained on the forget set alone), A_n (trained on the holdout alone).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from palimpsest.core import losses
from palimpsest.core.methods import method
from palimpsest.core.reference import Reference, reference
from palimpsest.core.watch import Watch
from palimpsest.forget.unlearn import (
    Regularised,
    RetainLoss,
    check_vocabulary,
    encode,
    required,
    row_divergences,
    unlearn,
)
from palimpsest.models.train import Recipe, fresh, train

if TYPE_CHECKING:
    from datasets import Dataset
    from torch import Tensor, nn

    from palimpsest.data.batches import Batch, Encoded
    from palimpsest.data.request import ForgetRequest
    from palimpsest.models.lm import LM


@method(verb="forget", paper="knowledge_unlearning", name="kga")
@dataclass(frozen=True, kw_only=True)
class KGA(Regularised):
    """Knowledge gap alignment: the gap on the forget set is made as wide as that on unseen data."""

    base: str = ""  # the model that the helpers start from; empty: fresh random weights
    helper_steps: int = 300
    helper_lr: float = 1e-3
    retain_loss: RetainLoss = "kl"  # KL(A_D || pi) on the retain set

    def __call__(self, lm: LM, request: ForgetRequest, *, watch: Watch | None = None) -> LM:
        forget = encode(self, lm, request.forget)
        unseen_table = required(request.holdout, "holdout")
        unseen = encode(self, lm, unseen_table)
        knows_forget = self._helper(lm, request.forget, "helper-forget", watch)
        on_forget = reference(knows_forget.model, forget, knows_forget.sha256)
        knows_unseen = self._helper(lm, unseen_table, "helper-holdout", watch)
        gap = _gaps(lm, knows_unseen, unseen)
        tokens = unseen.lengths - [max(start, 1) for start in unseen.starts]
        unseen_batches = self.batches(unseen, "holdout")

        def wanted_gap(step: int) -> float:
            """KL(A_D || A_n) on a batch of unseen rows, mean over tokens: a number, not trained through."""
            rows = unseen_batches.rows(step)
            return float(gap[rows].sum() / max(int(tokens[rows].sum()), 1))

        return unlearn(self, lm, request, _alignment(on_forget), watch=watch, forget=forget, beside={"gap": wanted_gap})

    def _helper(self, lm: LM, table: Dataset, name: str, watch: Watch | None) -> LM:
        if self.base:
            from palimpsest.models.lm import LM as Loader

            start = Loader.load(self.base)
            check_vocabulary(start, lm)
        else:
            start = fresh(lm, self.seed)
        recipe = Recipe(steps=self.helper_steps, lr=self.helper_lr, batch_size=self.batch_size, seed=self.seed)
        return train(start, table, recipe, watch=watch, name=name)


def _alignment(on_forget: Reference):
    """L_a = | KL_F(A_f || pi) - gap |.  The sign is the step's, so that shares of a batch add up to the whole."""

    def loss(model: nn.Module, batch: dict[str, Batch]) -> Tensor:
        own_gap = losses.kl(model, batch["forget"], on_forget)
        share = len(batch["forget"]) / batch["forget"].total_rows
        return (own_gap - share * batch["gap"]).abs()  # type: ignore[operator]

    return loss


def _gaps(start: LM, knows_unseen: LM, unseen: Encoded) -> Tensor:
    """KL(A_D || A_n) summed over each unseen row's tokens, (N,)."""
    return row_divergences(knows_unseen.model.eval(), unseen, reference(start.model, unseen, start.sha256))
