"""Corrupting the embeddings of a prompt's tokens, and finding by trial how strong that must be.

Liu et al. 2024 (arXiv:2406.07933); sheet `eco`, items 3 and 4.  Knows nothing of gates or models.
Strengths count in standard deviations of the embedding matrix, so that they mean the same for every model.
Shapes: n tokens, D dimensions of the embedding.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from palimpsest.core.errors import InputError
from palimpsest.core.seeds import numpy_rng, torch_rng

Kind = Literal["noise", "shift", "set", "zero", "flip", "reverse", "shuffle"]
Where = Literal["first", "top", "least", "random"]

STRONG = ("noise", "shift", "set")  # the kinds that have a strength


@dataclass(frozen=True)
class Corruption:
    """What happens to the embeddings of the chosen tokens of one prompt.

    `kind`: "noise" adds normal noise (RN of the paper), "shift" plus or minus the strength, "set" puts noise in place
    of the value, "zero" sets to 0 (ZO), "flip" turns the sign (SF); "reverse" and "shuffle" reorder the tokens whole.
    """

    kind: Kind = "noise"
    dims: int = 1  # coordinates that are changed; 0: all
    where: Where = "first"  # which: the first, those largest or smallest in size at a token, or drawn once for all
    strength: float = 100.0  # standard deviations of the embedding matrix's entries
    seed: int = 0

    def __post_init__(self) -> None:
        if self.dims < 0 or not 0 <= self.strength < math.inf:
            raise InputError(f"dims={self.dims} and strength={self.strength:g} must not be below 0")

    def __call__(self, embedded: Tensor, unit: float, prompt: str) -> Tensor:
        """`embedded` (n, D), corrupted; the draws depend on the seed and on the prompt alone."""
        if self.kind in ("reverse", "shuffle"):
            count = len(embedded)
            order = range(count - 1, -1, -1) if self.kind == "reverse" else self._rng(prompt).permutation(count)
            return embedded[torch.as_tensor(list(order), device=embedded.device)]
        values = embedded.float()
        changed = self._changed(values, self.strength * unit, prompt)
        return torch.where(self._chosen(values), changed, values).to(embedded.dtype)

    def _changed(self, values: Tensor, scale: float, prompt: str) -> Tensor:
        if self.kind == "zero":
            return torch.zeros_like(values)
        if self.kind == "flip":
            return -values
        draws = torch.randn(values.shape, generator=torch_rng(self.seed, "corruption", prompt)).to(values.device)
        if self.kind == "set":
            return scale * draws
        return values + scale * (draws.sign() if self.kind == "shift" else draws)

    def _chosen(self, values: Tensor) -> Tensor:
        """(n, D) bool: the coordinates that are changed."""
        width = values.shape[1]
        dims = min(self.dims, width) or width
        if self.where in ("top", "least"):
            picked = values.abs().topk(dims, dim=1, largest=self.where == "top").indices
            return torch.zeros_like(values, dtype=torch.bool).scatter_(1, picked, True)
        chosen = torch.zeros(width, dtype=torch.bool, device=values.device)
        if self.where == "random":
            chosen[torch.as_tensor(numpy_rng(self.seed, "coordinates").permutation(width)[:dims])] = True
        else:
            chosen[:dims] = True
        return chosen.expand_as(values)

    def _rng(self, prompt: str) -> np.random.Generator:
        return numpy_rng(self.seed, "order", prompt)


@dataclass(frozen=True)
class Search:
    """What a zeroth-order search found: the best point tried, its loss, and every (point, loss) in order."""

    point: float
    loss: float
    tried: tuple[tuple[float, float], ...]


def zeroth_order(
    loss: Callable[[float], float],
    start: float,
    *,
    probe: float = 0.5,
    rate: float = 4.0,
    lowest: float = 0.0,
    highest: float = math.inf,
    steps: int = 10,
    enough: float = 0.01,
) -> Search:
    """Descend on a loss that can only be evaluated, by two-point differences; at most 2 evaluations a step.

    g = (L(x + probe) - L(x - probe)) / (the distance of the two points), x <- x - rate g, all points clamped to
    [lowest, highest] (sheet `eco`, item 4; the sheet's own division by 2 probe is biased where a point was clamped).
    The search is over the *logarithm* of a strength: it spans orders of magnitude, and the paper's absolute steps serve
    one model.  Where both sides are equal, which tells no direction, the probe is doubled.  Ends at a loss of `enough`.
    """
    if not probe > 0 or not rate > 0 or steps < 1 or not lowest <= start <= highest:
        raise InputError(f"a search from {start:g} with probe={probe:g}, rate={rate:g}, steps={steps} cannot be made")
    tried: dict[float, float] = {}

    def ask(point: float) -> float:
        point = min(max(point, lowest), highest)
        if point not in tried:
            tried[point] = float(loss(point))
        return tried[point]

    point = start
    for _ in range(steps):
        above, below = min(point + probe, highest), max(point - probe, lowest)
        difference = ask(above) - ask(below)
        if min(tried.values()) <= enough or above == below:
            break
        if difference == 0:
            probe *= 2
            continue
        point = min(max(point - rate * difference / (above - below), lowest), highest)
    best = min(tried, key=lambda known: tried[known])
    return Search(best, tried[best], tuple(tried.items()))
