"""A filter that does not read the prompt but watches what it makes of the model.

Where a prompt introduces a term, the guarded model itself is asked about K probes behind that prompt, and its answers
are compared with the answers that define the forbidden concept.  Whatever words the prompt uses, it is stopped if the
model behind it behaves as if it knew the concept.  It costs K short passes a prompt.  Ours, after the argument of
arXiv:2407.00106 that screening wordings cannot suffice.  Shapes: N prompts, K probes, O options of each.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from palimpsest.audit.answers import option_scores
from palimpsest.core.errors import InputError

if TYPE_CHECKING:
    from palimpsest.models.lm import LM


@dataclass(frozen=True, eq=False)
class BehaviourScreen:
    """Stops prompts behind which the model answers the probes as the concept does.

    `known` (K,): which of a probe's options (all probes have equally many) is the concept's.  A prompt is stopped where
    the agreement, corrected for chance, is above `agreement`.
    """

    probes: Sequence[str]
    known: np.ndarray
    options: Sequence[Sequence[str]]  # of each probe
    agreement: float = 0.6

    def __post_init__(self) -> None:
        if not len(self.probes) == len(self.known) == len(self.options):
            given = f"{len(self.probes)} probes for {len(self.known)} known answers"
            raise InputError(f"{given} and {len(self.options)} lists of options")
        if len({(*row, int(answer)) for row, answer in zip(self.options, self.known, strict=True)}) < 2:
            raise InputError("the probes have all the same known answer: take some of each")

    def stops(self, lm: LM, prompts: Sequence[str]) -> np.ndarray:
        """(N,) bool: which prompts it would withhold."""
        return agreement(self.answers(lm, prompts), np.asarray(self.known), len(self.options[0])) > self.agreement

    def answers(self, lm: LM, prompts: Sequence[str]) -> np.ndarray:
        """(N, K) the option that the model finds likeliest behind each prompt."""
        asked = [prompt + probe for prompt in prompts for probe in self.probes]
        if not asked:
            return np.zeros((len(prompts), len(self.probes)), dtype=np.int64)
        spaced = [[option if option[:1].isspace() else f" {option}" for option in row] for row in self.options]
        scores = option_scores(lm, asked, spaced * len(prompts))
        return scores.argmax(1).reshape(len(prompts), len(self.probes))


def agreement(answers: np.ndarray, known: np.ndarray, options: int) -> np.ndarray:
    """(N,) the share of (N, K) answers that are as known, corrected for chance: (share - 1/O) / (1 - 1/O).

    0 is what guessing among the options gives, 1 is all; below 0 a model avoids the known answers.
    """
    return ((answers == known).mean(1) - 1 / options) / (1 - 1 / options)
