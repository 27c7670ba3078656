"""Content filtering: nothing is unlearned; prompts about what must go are withheld from the model.

Shumailov et al. 2024 (arXiv:2407.00106) argue that unlearning cannot regulate behaviour, since what was forgotten can
be brought back in the prompt, and that filters have to.  This is that filter as a method: the weights stay as they are
(an audit of removal must say so), and up to four screens stand in front of them (`models.screens`): a list of names,
what the prompt's statements add up to, its meaning, and the state that it leaves the model in.
Needs forget and retain records of at least five different texts each; "meaning" needs the extra ``search``.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from palimpsest.core.errors import InputError, unknown
from palimpsest.core.methods import method
from palimpsest.models.content_filter import NOTICE, ContentFilter, fit_screen
from palimpsest.models.screens import SCREENS

if TYPE_CHECKING:
    from palimpsest.core.watch import Watch
    from palimpsest.data.request import ForgetRequest
    from palimpsest.models.lm import LM


@method(verb="forget", paper="ununlearning")
@dataclass(frozen=True, kw_only=True)
class ContentFiltering:
    """Withholds prompts that name or describe what must be forgotten; the weights keep it."""

    screens: tuple[str, ...] = ("names", "definitions", "meaning")  # any of these and "states"; one that fires stops
    error: float = 0.05  # share of permitted texts that each screen may stop
    notice: str = NOTICE  # what the model sees in place of a withheld prompt

    def __post_init__(self) -> None:
        if not self.screens:
            raise InputError("a content filter without screens would stop nothing")
        for name in self.screens:
            if name not in SCREENS:
                raise unknown("screen", name, SCREENS)
        if not 0 < self.error < 1:
            raise InputError(f"error must lie between 0 and 1, not {self.error:g}")

    def __call__(self, lm: LM, request: ForgetRequest, *, watch: Watch | None = None) -> LM:
        """The same weights behind the filter.

        Raises `InputError` without a retain set, behind another guard, and where the records are too few for a screen.
        """
        if request.retain is None:
            raise InputError("content filtering needs a retain set: without permitted texts it would stop everything")
        if lm.guard is not None:
            raise InputError("the model is guarded already: load it without its guard")
        screens = {name: fit_screen(name, lm, request, error=self.error) for name in self.screens}
        return lm.with_guard(ContentFilter(screens, self.notice))
