"""The numbers that decide where a training run's weights go, checked; and the learning rate of each of its steps."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from palimpsest.core.errors import InputError, unknown

SCHEDULES = ("constant", "linear", "cosine")


@dataclass(frozen=True)
class Recipe:
    """The numbers that decide where the weights go."""

    steps: int
    lr: float
    betas: tuple[float, float]
    weight_decay: float
    warmup: int
    schedule: str
    clip: float | None
    micro_batches: int
    seed: int

    def __post_init__(self) -> None:
        if self.schedule not in SCHEDULES:
            raise unknown("schedule", self.schedule, SCHEDULES)
        for name, value, fine in (
            ("steps", self.steps, self.steps >= 1),
            ("lr", self.lr, 0 < self.lr < math.inf),
            ("weight_decay", self.weight_decay, 0 <= self.weight_decay < math.inf),
            ("warmup", self.warmup, 0 <= self.warmup <= self.steps),
            ("clip", self.clip, self.clip is None or self.clip > 0),
            ("micro_batches", self.micro_batches, self.micro_batches >= 1),
        ):
            if not fine:
                raise InputError(f"{name}={value} cannot be trained with (steps={self.steps})")

    def rate(self, step: int) -> float:
        return learning_rate(step, steps=self.steps, lr=self.lr, warmup=self.warmup, schedule=self.schedule)

    def fingerprint(self) -> dict[str, Any]:
        """What decides the weights of every step; `steps` does so only through a falling schedule."""
        values = {"lr": self.lr, "betas": list(self.betas), "weight_decay": self.weight_decay, "warmup": self.warmup}
        values |= {"schedule": self.schedule, "clip": self.clip, "seed": self.seed}
        return values if self.schedule == "constant" else values | {"steps": self.steps}


def learning_rate(step: int, *, steps: int, lr: float, warmup: int = 0, schedule: str = "constant") -> float:
    """The learning rate of a step (0-based): linear warm-up, then constant, or falling to 0 at `steps`."""
    if step < warmup:
        return lr * (step + 1) / warmup
    done = (step - warmup) / max(steps - warmup, 1)
    if schedule == "linear":
        return lr * (1 - done)
    if schedule == "cosine":
        return lr * 0.5 * (1 + math.cos(math.pi * done))
    return lr
