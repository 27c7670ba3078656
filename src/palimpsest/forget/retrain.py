"""Exact unlearning: train again without the forget set.  The gold standard that everything else is compared with.

Needs: the full training set in the request (``train``); trains fresh weights of the same configuration, or those at `base`.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal

from palimpsest.core.methods import method
from palimpsest.core.watch import Watch
from palimpsest.forget.unlearn import check_vocabulary, required
from palimpsest.models.train import Recipe, fresh, train

if TYPE_CHECKING:
    from palimpsest.data.request import ForgetRequest
    from palimpsest.models.lm import LM


@method(verb="forget", paper="knowledge_unlearning")
@dataclass(frozen=True, kw_only=True)
class Retrain:
    """Exact retraining: the training recipe again, without the forget set."""

    base: str = ""  # the model that training started from; empty: fresh random weights
    steps: int = 1000  # give the recipe that made the model
    lr: float = 1e-3
    batch_size: int = 32
    warmup: int = 20
    schedule: Literal["constant", "linear", "cosine"] = "cosine"
    weight_decay: float = 0.0
    max_length: int | None = None
    seed: int = 0

    def __call__(self, lm: LM, request: ForgetRequest, *, watch: Watch | None = None) -> LM:
        required(request.train, "train")
        recipe = Recipe(
            steps=self.steps,
            lr=self.lr,
            batch_size=self.batch_size,
            warmup=self.warmup,
            schedule=self.schedule,
            weight_decay=self.weight_decay,
            max_length=self.max_length,
            seed=self.seed,
        )
        trained = train(self._start(lm), request.without_forget(), recipe, watch=watch, name="retrain")
        return replace(trained, source=lm.source)

    def _start(self, lm: LM) -> LM:
        if not self.base:
            return fresh(lm, self.seed)
        from palimpsest.models.lm import LM as Loader

        start = Loader.load(self.base)
        check_vocabulary(start, lm)
        return start
