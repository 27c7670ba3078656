"""Before long work: how much memory and time it should take, and a refusal with the way out when it cannot fit.

An estimate, not a promise: memory from the sizes of weights, gradients, optimiser moments and activations; time from
the matrix-multiplication rate measured on the spot and the usual 6 operations a weight and token.
"""

from __future__ import annotations

import os
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from palimpsest.core.errors import InputError

if TYPE_CHECKING:
    from palimpsest.models.lm import LM

_SHARE_OF_RATE = 0.3  # what small models reach of the rate of large matrices, all overheads counted


@dataclass(frozen=True)
class Plan:
    """What a piece of work should need.  Units: bytes, seconds."""

    what: str
    memory: int
    available: int
    seconds: float

    def __str__(self) -> str:
        need, have = _gib(self.memory), _gib(self.available)
        return f"{self.what}: about {need} of {have} memory, {_duration(self.seconds)}"


def plan_training(
    what: str, lm: LM, *, steps: int, batch_size: int, tokens: int, lora_rank: int = 0, models: int = 1
) -> Plan:
    """The plan for training (`models` times, one after the other).  `tokens`: of a typical row, padding included."""
    parameters = lm.num_parameters
    trainable = _lora_parameters(lm, lora_rank) if lora_rank else parameters
    config = lm.model.config
    width, depth = config.hidden_size, config.num_hidden_layers
    activations = batch_size * tokens * width * depth * 34 * 4 // 2  # Korthikanti et al. 2022, eq. 2, in float32
    logits = min(batch_size * tokens * config.vocab_size, 2**24) * 3 * 4
    memory = parameters * 4 * 2 + trainable * 4 * 3 + activations + logits  # start and copy; gradient and two moments
    operations = 6 * parameters * batch_size * tokens * steps * models
    return Plan(what, memory, available_memory(lm.model.device), operations / (_rate(lm.model.device) * _SHARE_OF_RATE))


def refuse_if_too_large(plan: Plan) -> None:
    """Raise `InputError`, naming the ways out, when the plan's memory is more than there is."""
    if plan.memory > plan.available:
        raise InputError(
            f"{plan.what} would need about {_gib(plan.memory)} of memory and {_gib(plan.available)} are free: "
            "use --lora-rank 16, a smaller --batch-size or --max-length, or several GPUs with 'accelerate launch'"
        )


def available_memory(device: torch.device | str = "cpu") -> int:
    """Free memory in bytes of a GPU, or of this machine (the container's limit, if it has one, counts)."""
    device = torch.device(device)
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    free = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    meminfo = Path("/proc/meminfo")
    if meminfo.exists():
        lines = dict(line.split(":", 1) for line in meminfo.read_text().splitlines())
        free = int(lines["MemAvailable"].split()[0]) * 1024
    limit = Path("/sys/fs/cgroup/memory.max")
    used = Path("/sys/fs/cgroup/memory.current")
    if limit.exists() and used.exists() and (bound := limit.read_text().strip()) != "max":
        free = min(free, int(bound) - int(used.read_text()))
    return free


def _lora_parameters(lm: LM, rank: int) -> int:
    return sum(rank * sum(p.shape) for p in lm.model.parameters() if p.ndim == 2)


def _rate(device: torch.device) -> float:
    """Operations a second of a matrix multiplication of middling size, on this device, now."""
    a = torch.randn(512, 512, device=device)
    for _ in range(3):
        a @ a
    start, count = time.perf_counter(), 10
    for _ in range(count):
        a @ a
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return 2 * 512**3 * count / max(time.perf_counter() - start, 1e-6)


def _gib(size: int) -> str:
    return f"{size / 2**30:.1f} GiB" if size >= 2**29 else f"{size / 2**20:.0f} MiB"


def _duration(seconds: float) -> str:
    if seconds < 90:
        return f"{max(seconds, 1):.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"
