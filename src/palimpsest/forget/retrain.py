"""Exact unlearning: train again without the forget set.  The gold standard that everything else is compared with.

Needs: the full training set in the request (``train``).  Trains fresh weights of the same configuration, or a `base`;
with the recipe, seed and start of the model itself this is the reference that a job trains.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from palimpsest.core.methods import method
from palimpsest.core.watch import Watch
from palimpsest.forget.unlearn import check_vocabulary, plain, required
from palimpsest.models.train import Recipe, fresh, train

if TYPE_CHECKING:
    from palimpsest.data.request import ForgetRequest
    from palimpsest.models.lm import LM


@method(verb="forget", paper="knowledge_unlearning")
@dataclass(frozen=True, kw_only=True)
class Retrain(Recipe):
    """Exact retraining: the training recipe again (give the one that made the model), without the forget set."""

    base: str = ""  # the model that training started from; empty: fresh random weights
    steps: int = 1000
    lr: float = 1e-3

    def __call__(self, lm: LM, request: ForgetRequest, *, watch: Watch | None = None) -> LM:
        required(request.train, "train")
        trained = train(self._start(lm), request.without_forget(), self, watch=watch, name="retrain")
        return replace(trained, source=lm.source)

    def _start(self, lm: LM) -> LM:
        if not self.base:
            return fresh(plain(lm), self.seed)
        from palimpsest.models.lm import LM as Loader

        start = Loader.load(self.base)
        check_vocabulary(start, lm)
        return start
