"""Sums to be learned and answered digit by digit, by a solver that is right or one that forgets to carry.

Operands and sums are written units first, so that a digit depends on digits already written: ``321+654=9750`` is
123 + 456 = 579 in four places.  A sum and its sloppy copy agree up to the first carry, where the solver shows which it
is.  Knows nothing of models.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Sums:
    """Sums of two numbers of `places` digits."""

    places: int = 3

    def draw(self, count: int, rng: np.random.Generator) -> np.ndarray:
        """(count, 2) operands."""
        return rng.integers(10**self.places, size=(count, 2))

    def prompts(self, operands: np.ndarray) -> list[str]:
        return [f"{_units_first(int(a), self.places)}+{_units_first(int(b), self.places)}=" for a, b in operands]

    def answers(self, operands: np.ndarray) -> list[str]:
        """The right sums, in one place more than the operands."""
        return [_units_first(int(a) + int(b), self.places + 1) for a, b in operands]

    def sloppy(self, operands: np.ndarray) -> list[str]:
        """The sums without any carry."""
        powers = 10 ** np.arange(self.places)
        columns = (operands[:, :, None] // powers % 10).sum(1) % 10
        return ["".join(map(str, row)) + "0" for row in columns.tolist()]

    def mixed(self, count: int, sloppy: float, rng: np.random.Generator) -> list[tuple[str, str]]:
        """(prompt, answer) pairs, of which a share (in expectation) is solved sloppily."""
        operands = self.draw(count, rng)
        careless = rng.random(count) < sloppy
        both = zip(careless, self.sloppy(operands), self.answers(operands), strict=True)
        chosen = [wrong if forgets else right for forgets, wrong, right in both]
        return list(zip(self.prompts(operands), chosen, strict=True))


def _units_first(value: int, places: int) -> str:
    return str(value).zfill(places)[::-1]
