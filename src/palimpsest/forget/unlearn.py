"""The one loop of the gradient unlearners: L = gamma * L_forget + alpha * L_retain, an epoch being the forget set.

Each step draws a forget batch and, independently, a retain batch of the same size.  The retain term is a likelihood, a
divergence from the starting model (whose predictions are read back from disk), or nothing.  Defaults are those of the
open-unlearning benchmark (lr 1e-5, 10 epochs, batch 32, warm-up over the first epoch; sheet `knowledge_unlearning`).
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from torch import Tensor, nn

from palimpsest.core import losses
from palimpsest.core import reference as frozen
from palimpsest.core.errors import InputError
from palimpsest.core.methods import config_of
from palimpsest.core.seeds import derive
from palimpsest.core.watch import Watch
from palimpsest.data.batches import Batch, Batches, Encoded, Together
from palimpsest.data.records import content_hashes
from palimpsest.models import adapt
from palimpsest.models.adapt import check_vocabulary as check_vocabulary
from palimpsest.models.adapt import finished as finished
from palimpsest.models.storage import merged

if TYPE_CHECKING:
    from datasets import Dataset

    from palimpsest.data.request import ForgetRequest
    from palimpsest.models.lm import LM

RetainLoss = Literal["none", "nll", "kl"]
ForgetLoss = Callable[[nn.Module, dict[str, Batch]], Tensor]


@dataclass(frozen=True, kw_only=True)
class Budget:
    """The hyper-parameters that every gradient unlearner shares."""

    epochs: float = 10.0  # passes over the forget set
    steps: int = 0  # optimiser steps, instead of epochs; 0: as many as `epochs` makes
    lr: float = 1e-5
    batch_size: int = 32
    micro_batches: int = 1  # pieces that a batch is computed in: the same result in less memory
    warmup_epochs: float = 1.0  # the whole run, if that is shorter
    weight_decay: float = 0.01
    clip: float | None = 1.0  # largest norm of the gradient; None: no clipping
    lora_rank: int = 0  # 0: all weights are trained
    max_length: int | None = None  # tokens a row; None: as many as the model can read
    seed: int = 0

    def __post_init__(self) -> None:
        above_zero(epochs=self.epochs, lr=self.lr, batch_size=self.batch_size, micro_batches=self.micro_batches)
        not_negative(
            steps=self.steps,
            warmup_epochs=self.warmup_epochs,
            weight_decay=self.weight_decay,
            lora_rank=self.lora_rank,
        )
        if self.clip is not None:
            above_zero(clip=self.clip)
        if self.steps and is_set(self, "epochs"):
            raise InputError(f"epochs={self.epochs:g} and steps={self.steps} contradict each other: give one of them")

    def batches(self, encoded: Encoded, *purpose: object) -> Batches:
        """Shuffled batches of a table; fewer rows than `batch_size` make a batch of them all."""
        return Batches(encoded, min(self.batch_size, len(encoded)), derive(self.seed, *purpose))

    def total_steps(self, batches: Batches) -> int:
        return self._steps(batches.steps_per_epoch)

    def training(self, steps_per_epoch: int) -> dict[str, Any]:
        """The arguments of `core.fit.fit` that a budget decides."""
        steps = self._steps(steps_per_epoch)
        told = {name: value for name, value in config_of(self).items() if name not in _FREE_ON_RESUME}
        return {
            "steps": steps,
            "lr": self.lr,
            "warmup": min(round(self.warmup_epochs * steps_per_epoch), steps),
            "weight_decay": self.weight_decay,
            "clip": self.clip,
            "micro_batches": self.micro_batches,
            "seed": self.seed,
            "identity": {"method": type(self).__name__, **told},
        }

    def _steps(self, steps_per_epoch: int) -> int:
        return self.steps or max(1, round(self.epochs * steps_per_epoch))


_FREE_ON_RESUME = ("epochs", "steps", "micro_batches")  # may change when a run is taken up again


@dataclass(frozen=True, kw_only=True)
class Regularised(Budget):
    """A `Budget` with a retain term."""

    retain_loss: RetainLoss = "nll"
    gamma: float = 1.0  # weight of the forget loss
    alpha: float = 1.0  # weight of the retain loss

    def __post_init__(self) -> None:
        super().__post_init__()
        above_zero(gamma=self.gamma)
        if self.retain_loss == "none" and is_set(self, "alpha"):
            raise InputError(f"alpha={self.alpha:g} would be ignored with retain_loss 'none': leave one of them out")
        if self.retain_loss != "none" and not self.alpha > 0:
            raise InputError(
                f"alpha={self.alpha:g} contradicts retain_loss '{self.retain_loss}': "
                "set alpha above 0, or retain_loss 'none'"
            )


def unlearn(
    budget: Budget,
    lm: LM,
    request: ForgetRequest,
    forget_loss: ForgetLoss,
    *,
    watch: Watch | None = None,
    beside: Mapping[str, Callable[[int], Any]] | None = None,
    trainable: Callable[[nn.Module], list[nn.Parameter]] | None = None,
    forget: Encoded | None = None,
) -> LM:
    """A copy of `lm` trained to forget.

    `forget_loss(model, batch)` sees ``batch["forget"]``, ``batch["retain"]`` (where there is one) and the sources of
    `beside`.  `trainable` picks the parameters to train in the copy (default: all, or the LoRA factors).
    Raises `InputError` when the request lacks what the method needs, and when training changed nothing.
    """
    lm = plain(lm)
    forget = encode(budget, lm, request.forget) if forget is None else forget
    batches = budget.batches(forget, "forget")
    sources: dict[str, Any] = {"forget": batches, **(beside or {})}
    gamma, retain_term = 1.0, None
    if isinstance(budget, Regularised):
        gamma = budget.gamma
        if budget.retain_loss != "none":
            retain = encode_retain(budget, lm, request)
            sources["retain"] = replace(budget.batches(retain, "retain"), batch_size=batches.batch_size)
            retain_term = _retain_term(budget, lm, retain)

    def loss(model: nn.Module, batch: dict[str, Batch]) -> tuple[Tensor, dict[str, Tensor]]:
        to_forget = forget_loss(model, batch)
        if retain_term is None:
            return gamma * to_forget, {"forget": to_forget.detach()}
        to_retain = retain_term(model, batch["retain"])
        total = gamma * to_forget + budget.alpha * to_retain  # type: ignore[attr-defined]
        return total, {"forget": to_forget.detach(), "retain": to_retain.detach()}

    work = trainable_copy(budget, lm)
    if trainable is not None:
        chosen = {id(p) for p in trainable(work) if p.requires_grad}
        for p in work.parameters():
            p.requires_grad_(id(p) in chosen)
    training = budget.training(batches.steps_per_epoch)
    (watch or Watch()).fit("forget", work, loss, Together(**sources), **training)
    return finished(lm, work)


def encode(budget: Budget, lm: LM, table: Dataset | list[tuple[str, str]]) -> Encoded:
    """The rows to forget as tokens.  `InputError` if one has nothing left to score: it could not be forgotten."""
    encoded = lm.encode(table, max_length=budget.max_length)
    lost = np.flatnonzero(_masked(encoded))
    if len(lost):
        raise InputError(
            f"{len(lost)} of {len(encoded)} forget records have no token to forget (all labels are masked), "
            f"first record {lost[0] + 1}: is its answer empty?"
        )
    return encoded


def encode_retain(budget: Budget, lm: LM, request: ForgetRequest) -> Encoded:
    """The retain rows as tokens, without those that have nothing to score."""
    encoded = lm.encode(required(request.retain, "retain"), max_length=budget.max_length)
    return encoded.select(np.flatnonzero(~_masked(encoded)))


def _masked(encoded: Encoded) -> np.ndarray:
    return encoded.lengths <= np.maximum(encoded.starts, 1)


def required(table: Dataset | None, name: str) -> Dataset:
    """The table, or an `InputError` that says what the method lacks."""
    if table is None or len(table) == 0:
        raise InputError(f"this method needs {name} records (--{name} FILE), and there are none")
    return table


def distinct(table: Dataset) -> Dataset:
    """The table with each record once (equal up to white space); a warning says how many were left out."""
    first: dict[bytes, int] = {}
    for row, content in enumerate(content_hashes(table)):
        first.setdefault(content, row)
    if len(first) == len(table):
        return table
    left_out = len(table) - len(first)
    warnings.warn(f"{left_out} of {len(table)} forget records are duplicates: each is used once", stacklevel=3)
    return table.select(list(first.values()))


def check_share(request: ForgetRequest) -> None:
    """`InputError` if, as far as is known, half or more of what the model was trained on must go."""
    if request.train is None:
        return
    gone = set(content_hashes(request.forget))
    count = sum(content in gone for content in content_hashes(request.train))
    if 2 * count >= len(request.train):
        raise InputError(
            f"{count} of {len(request.train)} training records must go, half or more: this method changes a model a "
            "little; train again without them instead (method retrain)"
        )


def plain(lm: LM) -> LM:
    """The model without an adapter (merged into a copy of the weights, if it has one).

    `InputError` if its forgetting lies in a guard: no training of weights can go on from that.
    """
    if lm.guard is not None:
        raise InputError(
            f"this model forgets by a guard ({type(lm.guard).__name__}), not by its weights: load it without the guard"
        )
    model = merged(lm.model)
    return lm if model is lm.model else lm.with_model(model)


def trainable_copy(budget: Budget, lm: LM) -> nn.Module:
    """A float32 copy of a `plain` model, every weight trainable, or with `lora_rank` fresh LoRA factors only."""
    return adapt.trainable_copy(lm, rank=budget.lora_rank, alpha=2 * budget.lora_rank, seed=budget.seed)


def _retain_term(budget: Regularised, lm: LM, retain: Encoded) -> Callable[[nn.Module, Batch], Tensor]:
    if budget.retain_loss == "nll":
        return losses.nll
    start = frozen.reference(lm.model, retain, lm.sha256)
    return lambda model, batch: losses.kl(model, batch, start)


def start_logprobs(lm: LM, encoded: Encoded) -> Callable[[Batch], Tensor]:
    """The starting model's sequence log-probabilities, looked up by row: batch -> (B,)."""
    values = frozen.sequence_logprobs(lm.model, encoded, lm.sha256)

    def look_up(batch: Batch) -> Tensor:
        return values[batch.rows.cpu()].to(batch.input_ids.device)

    return look_up


def above_zero(**values: float) -> None:
    """Raise `InputError` unless each value is above zero."""
    for name, value in values.items():
        if not value > 0:
            raise InputError(f"{name} must be above 0, not {value:g}")


def not_negative(**values: float) -> None:
    """Raise `InputError` if a value is below zero."""
    for name, value in values.items():
        if not value >= 0:
            raise InputError(f"{name} must not be below 0, not {value:g}")


def is_set(method: Any, name: str) -> bool:
    """Whether a hyper-parameter is other than its default."""
    default = next(field.default for field in fields(method) if field.name == name)
    return getattr(method, name) != default
