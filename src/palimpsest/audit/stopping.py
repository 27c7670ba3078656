"""When to stop forgetting: as soon as the model knows no more than one that never knew (MUSE; sheet `muse`, step 6).

Without such a rule methods cannot be compared: each forgets as much as its steps allow.  Knows nothing of methods.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING

from palimpsest.audit.muse import Muse
from palimpsest.core.errors import InputError
from palimpsest.core.watch import Until

if TYPE_CHECKING:
    from torch import nn

    from palimpsest.data.request import ForgetRequest
    from palimpsest.models.lm import LM

Metric = Callable[["LM"], float]


def stop_when_forgotten(
    metric: Muse | Metric, lm: LM, request: ForgetRequest, threshold: float | LM, *, every: int = 10, records: int = 32
) -> Until:
    """A rule for ``Watch(until=...)``: stop at the first look at which `metric` is down to `threshold`.

    With a `Muse` the metric is knowledge of at most `records` forget questions, or, of documents, their recital, from
    0 to 100; `lm` is the model before.  A model given as `threshold`, best the reference, is measured on the same
    records.  The model in training is looked at every `every` steps (1 for methods that stride, such as task vectors).
    """
    if every < 1 or records < 1:
        raise InputError(f"every and records must be at least 1, not {every} and {records}")
    score = _cheap(metric, lm, request, records) if isinstance(metric, Muse) else metric
    enough = float(threshold) if isinstance(threshold, int | float) else score(threshold)

    def until(step: int, model: nn.Module) -> bool:
        if step % every:
            return False
        looked = lm.with_model(model).with_guard(None)
        return score(looked) <= enough

    return until


def _cheap(muse: Muse, lm: LM, request: ForgetRequest, records: int) -> Metric:
    subset = replace(request, holdout=None, utility=None)
    asked = replace(muse, samples=min(records, muse.samples)).exam(lm, subset)
    if "forget" in asked.questions:
        return lambda model: float(muse.knowledge(asked, model, keep=False).mean())
    if "forget" in asked.recitals:
        return lambda model: float(muse.verbatim(asked, model, keep=False).mean())
    raise InputError("nothing in the forget set can be asked, so nobody sees when it is forgotten")
