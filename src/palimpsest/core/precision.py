"""Which arithmetic to train in: fp32, or bf16 autocast over fp32 master weights where that is faster.

"auto" takes bf16 only when the processor or GPU multiplies bf16 matrices natively and the model's matrices are wide
enough to gain from it: a rule of the machine's kind and the model's shapes, never of a timing, so runs repeat.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch
from torch import nn

from palimpsest.core.errors import unknown

PRECISIONS = ("auto", "fp32", "bf16")
_HALVES = (torch.float16, torch.bfloat16)
# Speed of bf16 over fp32 on AMX, Llama-style: 0.6 at width 64, 1.0 at 128, 1.3 at 192, 1.5 at 256.
_WIDTH = 192


def resolve(model: nn.Module, precision: str, device: torch.device) -> str:
    """ "fp32" or "bf16": what `precision` means for this model on this device."""
    if precision not in PRECISIONS:
        raise unknown("precision", precision, PRECISIONS)
    if precision != "auto":
        return precision
    return "bf16" if has_fast_bf16(device) and typical_width(model) >= _WIDTH else "fp32"


def has_fast_bf16(device: torch.device) -> bool:
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device) >= (8, 0)
    if device.type == "cpu":
        return torch.cpu._is_amx_tile_supported() or torch.cpu._is_avx512_bf16_supported()
    return False


def typical_width(model: nn.Module) -> int:
    """The smaller side of the model's matrices, averaged with their numbers of entries as weights; 0 if it has none.

    Models in double precision count as 0: who asks for float64 wants float64.
    """
    matrices = [p for p in model.parameters() if p.ndim >= 2]
    if not matrices or any(p.dtype == torch.float64 for p in matrices):
        return 0
    return sum(p.numel() * min(p.shape[0], p[0].numel()) for p in matrices) // sum(p.numel() for p in matrices)


def autocast(device: torch.device, precision: str) -> AbstractContextManager[None]:
    if precision == "bf16":
        return torch.autocast(device.type, dtype=torch.bfloat16)
    return nullcontext()


@contextmanager
def masters(model: nn.Module, precision: str) -> Iterator[None]:
    """Inside, half-precision weights are fp32 (updates smaller than a bf16 step are kept); outside, as they were.

    With "fp32" all of them are, otherwise only the trainable ones, for autocast casts the rest as needed.
    """
    halves = [
        (p, p.dtype) for p in model.parameters() if p.dtype in _HALVES and (p.requires_grad or precision == "fp32")
    ]
    for p, _ in halves:
        p.data = p.data.float()
    try:
        yield
    finally:
        for p, kind in halves:
            p.data = p.data.to(kind)
