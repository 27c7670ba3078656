"""What an attack is: it asks one model about facts in some way of its own, and says how well each fact is known then.

Every attack is run on three sides with the same settings: the model before forgetting, the one after, and one that
never knew.  Knows nothing of how readings are compared.  Shapes: N facts.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Literal, Protocol

import numpy as np

if TYPE_CHECKING:
    from palimpsest.audit.facts import Facts
    from palimpsest.models.lm import LM

Access = Literal["api", "finetune-api", "open-weights"]
ACCESS: tuple[Access, ...] = ("api", "finetune-api", "open-weights")  # from least to most


@dataclass(frozen=True)
class Side:
    """A model and the facts it is asked about; `kept` are facts that nobody wants forgotten, for the attacker's use."""

    lm: LM
    facts: Facts
    kept: Facts | None = None
    seed: int = 0

    @property
    def opened(self) -> Side:
        """The same without the guard, as who has the weights runs it."""
        return replace(self, lm=self.lm.with_guard(None))


@dataclass(frozen=True)
class Reading:
    """How well each fact is known under an attack, (N,) from 0 to 1, NaN where it cannot be said; `trace` is JSON-able.

    `curve`, where there is one, holds the values step by step, (P, N).
    """

    values: np.ndarray
    trace: dict[str, Any] = field(default_factory=dict)
    curve: np.ndarray | None = None


class Attack(Protocol):
    """A frozen dataclass; calling it on a side gives a reading.

    `teaches`: the attack itself shows the model facts like those scored, so that only a reference attacked in the same
    way tells what was there before.  `access`: what the attacker must have.
    """

    @property
    def teaches(self) -> bool: ...

    @property
    def access(self) -> Access: ...

    def __call__(self, side: Side) -> Reading: ...
