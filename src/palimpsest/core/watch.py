"""How a caller follows a long method: where it leaves checkpoints, when it may stop early, and what its losses were.

A method passes every training loop it runs through `Watch.fit`.  Knows nothing of methods.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from torch import nn

from palimpsest.core.fit import Trace, fit

Until = Callable[[int, nn.Module], bool]
"""``until(step, model)``: stop now?  Asked after each step, counted from 1; step 0 is a look at a model that is not the
result of a training step (a stride of `TaskVector`), to be answered always."""


@dataclass(frozen=True)
class Watch:
    """The default follows nothing: no checkpoint, no early stop."""

    checkpoint: Path | None = None  # a folder; each loop of the method has its own inside
    until: Until | None = None  # asked by the loop that does the method's main work
    progress: bool = True
    traces: dict[str, Trace] = field(default_factory=dict)  # filled as loops end: {name of the loop: Trace}

    def fit(
        self, name: str, model: nn.Module, loss: Any, batches: Any, *, main: bool = True, **arguments: Any
    ) -> Trace:
        """Run `core.fit.fit` under this watch.  `main=False`: a preparation, which `until` has no say in."""
        trace = fit(
            model,
            loss,
            batches,
            checkpoint=self.checkpoint / name if self.checkpoint else None,
            until=self.until if main else None,
            progress=name if self.progress else "",
            **arguments,
        )
        self.traces[name] = replace(trace, model=nn.Identity())  # the numbers are kept, the weights are not
        return trace
