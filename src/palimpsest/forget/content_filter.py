"""Content filtering: nothing is unlearned; prompts about what must go are withheld from the model.

Shumailov et al. 2024 (arXiv:2407.00106) argue that unlearning cannot regulate behaviour, since what was forgotten can
be brought back in the prompt, and that filters have to.  This is that filter as a method: the weights stay as they are
(an audit of removal must say so), a list of names and a gate on the prompt's meaning stand in front of them.
Needs forget and retain records of at least five different texts each, and the extra ``search``.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from palimpsest.core.errors import InputError
from palimpsest.core.methods import method
from palimpsest.models.content_filter import NOTICE, fit_filter, names_of

if TYPE_CHECKING:
    from palimpsest.core.watch import Watch
    from palimpsest.data.request import ForgetRequest
    from palimpsest.models.lm import LM


@method(verb="forget", paper="ununlearning")
@dataclass(frozen=True, kw_only=True)
class ContentFiltering:
    """Withholds prompts that name or describe what must be forgotten; the weights keep it."""

    error: float = 0.05  # share of permitted texts that the gate may stop
    names: bool = True  # also stop prompts that name a person of the forget set
    notice: str = NOTICE  # what the model sees in place of a withheld prompt

    def __call__(self, lm: LM, request: ForgetRequest, *, watch: Watch | None = None) -> LM:
        """The same weights behind the filter.  Raises `InputError` without a retain set, or behind another guard."""
        if request.retain is None:
            raise InputError("content filtering needs a retain set: without permitted texts it would stop everything")
        if lm.guard is not None:
            raise InputError("the model is guarded already: load it without its guard")
        names = names_of(request.forget) if self.names else ()
        kept = set(names_of(request.retain))
        return lm.with_guard(
            fit_filter(
                request.forget,
                request.retain,
                names=[name for name in names if name not in kept],
                error=self.error,
                notice=self.notice,
            )
        )
