"""Request after request: does what was forgotten first stay forgotten, and what does the rest cost?

Sheet `sok_unlearning`, step 4.  Shapes: T requests.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from palimpsest.audit.facts import Facts, facts_of, known

if TYPE_CHECKING:
    from palimpsest.data.request import ForgetRequest
    from palimpsest.models.lm import LM


@dataclass(frozen=True)
class Stream:
    """``known[t][s]``: knowledge (0 to 1) of the facts of request s after t requests; `kept`: of facts to be kept."""

    known: tuple[tuple[float, ...], ...]  # (T + 1) x T
    kept: tuple[float, ...]  # (T + 1,); empty without such facts

    @property
    def revival(self) -> float:
        """The most that a request's facts rise above what was left of them right after it, by later requests."""
        table = np.array(self.known)
        rises = [table[s + 2 :, s].max() - table[s + 1, s] for s in range(table.shape[1] - 1)]
        return float(max(rises, default=0.0))

    @property
    def slope(self) -> float:
        """What each further request costs in knowledge of facts to be kept (least squares; negative is a loss)."""
        return float(np.polyfit(np.arange(len(self.kept)), self.kept, 1)[0]) if len(self.kept) > 1 else float("nan")


def stream(
    unlearner: Callable[[LM, ForgetRequest], LM],
    lm: LM,
    request: ForgetRequest,
    kept: Facts | None = None,
    *,
    requests: int = 3,
    options: int = 8,
    most: int = 60,
    seed: int = 0,
) -> Stream:
    """Forget `requests` disjoint parts of the request one after the other, and ask about all of them each time."""
    parts = request.folds(requests, nested=False, seed=seed)
    beside = (request.forget, request.retain, request.utility, request.holdout)
    asked = [facts_of(part.forget, beside, options=options, most=most, seed=seed) for part in parts]
    found, left, current = [], [], lm
    for part in (None, *parts):
        if part is not None:
            current = unlearner(current, part)
        found.append(tuple(float(known(current, facts).mean()) for facts in asked))
        if kept is not None:
            left.append(float(known(current, kept).mean()))
    return Stream(tuple(found), tuple(left))
