"""Quantisation: round the weights to a few bits and see whether what was forgotten is back.

Unlearning that moves every weight by less than half a rounding step is rounded away (Zhang et al. 2024,
arXiv:2410.16454; sheet `sok_unlearning`, 2b).  Rounding is to nearest, symmetric, one scale an output channel;
embeddings, the output head and vectors keep their precision, as in practice.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn

from palimpsest.audit.attack import Access, Reading, Side
from palimpsest.audit.facts import known
from palimpsest.core.errors import InputError
from palimpsest.models.storage import merged

if TYPE_CHECKING:
    from palimpsest.models.lm import LM


@dataclass(frozen=True)
class Quantisation:
    """Ask the model whose matrices were rounded to `bits` bits."""

    bits: int = 4

    teaches = False
    access: ClassVar[Access] = "open-weights"

    def __post_init__(self) -> None:
        if not 2 <= self.bits <= 16:
            raise InputError(f"bits must lie between 2 and 16, not {self.bits}")

    def __call__(self, side: Side) -> Reading:
        return Reading(known(quantised(side.lm, self.bits), side.facts))


def quantised(lm: LM, bits: int) -> LM:
    """A copy of the model whose weight matrices went to `bits` bits and back.  An adapter is merged first."""
    model: Any = merged(lm.model) if hasattr(lm.model, "peft_config") else lm.copy().model
    kept = {
        id(p)
        for part in (model.get_input_embeddings(), model.get_output_embeddings())
        if part
        for p in part.parameters()
    }
    with torch.no_grad():
        for module in model.modules():
            for p in module.parameters(recurse=False):
                if p.ndim >= 2 and id(p) not in kept and not isinstance(module, nn.Embedding):
                    p.copy_(rounded(p, bits, channel=1 if type(module).__name__ == "Conv1D" else p.ndim - 2))
    return lm.with_model(model)


def rounded(weight: Tensor, bits: int, channel: int = 0) -> Tensor:
    """The nearest values of a symmetric grid of 2^bits - 1 steps, one scale for each index of dimension `channel`.

    Of a stack of matrices (experts) each has its own scales.
    """
    last = weight.ndim - 1 if channel == weight.ndim - 2 else weight.ndim - 2
    largest = weight.abs().amax(dim=last, keepdim=True)
    scale = largest.clamp(min=torch.finfo(weight.dtype).tiny) / (2 ** (bits - 1) - 1)
    return (weight / scale).round() * scale
