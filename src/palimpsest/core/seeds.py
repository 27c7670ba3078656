"""One seed in, the same numbers out: random generators that depend on names and counters, never on call order."""

from __future__ import annotations

import hashlib
import random
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    import torch


def derive(seed: int, *names: object) -> int:
    """A 63-bit seed for a purpose: ``derive(0, "batches", epoch)``.  Equal arguments give equal seeds anywhere."""
    text = repr((seed, *names)).encode()
    return int.from_bytes(hashlib.sha256(text).digest()[:8], "big") >> 1


def numpy_rng(seed: int, *names: object) -> np.random.Generator:
    return np.random.default_rng(derive(seed, *names))


def torch_rng(seed: int, *names: object) -> torch.Generator:
    import torch

    return torch.Generator().manual_seed(derive(seed, *names))


def seed_everything(seed: int, *names: object) -> None:
    """Set the global generators of Python, NumPy and torch (dropout, weight initialisation use them)."""
    import torch

    value = derive(seed, *names)
    random.seed(value)
    np.random.seed(value % 2**32)
    if torch.accelerator.is_available():
        torch.manual_seed(value)
    else:  # the same; but torch.manual_seed takes 1 ms to note the seed for devices that are not there
        torch.default_generator.manual_seed(value)
