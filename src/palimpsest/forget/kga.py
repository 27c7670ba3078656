"""Knowledge gap alignment: treat the forget set with the very gap in knowledge that unseen data shows.

Wang et al. 2023 (arXiv:2305.06535); sheet `knowledge_unlearning`, item 9.  Needs: forget, retain and holdout records
(never seen, of the same distribution).  Three helpers are asked once each, one after the other, and only their cached
predictions are kept: A_D (the starting model), A_f (trained on the forget set alone), A_n (trained on the holdout).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch

from palimpsest.core import losses
from palimpsest.core.errors import InputError
from palimpsest.core.methods import method
from palimpsest.core.reference import Reference, passes, reference
from palimpsest.core.watch import Watch
from palimpsest.forget.unlearn import (
    Regularised,
    RetainLoss,
    above_zero,
    check_vocabulary,
    encode,
    plain,
    required,
    unlearn,
)
from palimpsest.models.train import Recipe, fresh, train

if TYPE_CHECKING:
    from datasets import Dataset
    from torch import Tensor, nn

    from palimpsest.data.batches import Batch, Encoded
    from palimpsest.data.request import ForgetRequest
    from palimpsest.models.lm import LM


@method(verb="forget", paper="knowledge_unlearning")
@dataclass(frozen=True, kw_only=True)
class KGA(Regularised):
    """Knowledge gap alignment: the gap on the forget set is made as wide as that on unseen data."""

    base: str = ""  # the model that the helpers start from; empty: fresh random weights
    helper_steps: int = 300
    helper_lr: float = 1e-3
    retain_loss: RetainLoss = "kl"  # KL(A_D || pi) on the retain set

    def __post_init__(self) -> None:
        super().__post_init__()
        above_zero(helper_steps=self.helper_steps, helper_lr=self.helper_lr)
        if self.micro_batches > 1:
            raise InputError("KGA's | gap | is of a whole batch, which micro-batches cannot add up to: leave them at 1")

    def __call__(self, lm: LM, request: ForgetRequest, *, watch: Watch | None = None) -> LM:
        lm = plain(lm)
        forget = encode(self, lm, request.forget)
        unseen_table = required(request.holdout, "holdout")
        unseen = encode(self, lm, unseen_table)
        on_forget = self._learned(lm, request.forget, forget, "helper-forget", watch)
        gaps, tokens = self._unseen_gaps(lm, unseen_table, unseen, watch)
        batches = self.batches(unseen, "holdout")

        def wanted_gap(step: int) -> float:
            """KL(A_D || A_n) on a batch of unseen rows, mean over tokens: a number, not trained through."""
            rows = batches.rows(step)
            return float(gaps[rows].sum() / tokens[rows].sum())

        return unlearn(self, lm, request, _alignment(on_forget), watch=watch, forget=forget, beside={"gap": wanted_gap})

    def _learned(self, lm: LM, table: Dataset, encoded: Encoded, name: str, watch: Watch | None) -> Reference:
        """What a helper that learned `table` alone says about it."""
        helper = self._helper(lm, table, name, watch)
        return reference(helper.model, encoded, helper.sha256)

    def _unseen_gaps(
        self, lm: LM, table: Dataset, unseen: Encoded, watch: Watch | None
    ) -> tuple[np.ndarray, np.ndarray]:
        """KL(A_D || A_n) summed over each unseen row's tokens, and how many tokens they are: (N,) both."""
        start = reference(lm.model, unseen, lm.sha256)
        helper = self._helper(lm, table, "helper-holdout", watch)
        return row_divergences(helper.model, unseen, start), np.diff(start.states.offsets)

    def _helper(self, lm: LM, table: Dataset, name: str, watch: Watch | None) -> LM:
        if self.base:
            from palimpsest.models.lm import LM as Loader

            start = Loader.load(self.base)
            check_vocabulary(start, lm)
        else:
            start = fresh(lm, self.seed)
        recipe = Recipe(
            steps=self.helper_steps,
            lr=self.helper_lr,
            batch_size=self.batch_size,
            max_length=self.max_length,
            seed=self.seed,
        )
        return train(start, table, recipe, watch=watch, name=name)


def _alignment(on_forget: Reference):
    """L_a = | KL_F(A_f || pi) - gap |.

    An absolute value does not add up over shares, but its sign can be taken of the whole: each process multiplies its
    own part of the difference by the sign of the sum over all processes, so parts and gradients add up exactly.
    """
    from accelerate.utils import reduce

    def loss(model: nn.Module, batch: dict[str, Batch]) -> Tensor:
        rows = batch["forget"]
        part = losses.kl(model, rows, on_forget) - batch["gap"] * len(rows) / rows.total_rows  # type: ignore[operator]
        whole = reduce(part.detach().clone(), reduction="sum")
        return torch.sign(whole) * part

    return loss


def row_divergences(model: nn.Module, encoded: Encoded, states: Reference) -> np.ndarray:
    """KL(reference || model) summed over each row's tokens, (N,) float64."""
    values = np.zeros(len(encoded))
    with losses.evaluating(model):
        for rows, batch in passes(model, encoded):
            values[rows] = losses.token_kl(model, batch, states).sum(1).double().cpu().numpy()
    return values
