"""The one loop of the gradient unlearners: L = gamma * L_forget + alpha * L_retain, an epoch being the forget set.

Each step draws a forget batch and, independently, a retain batch of the same size.  The retain term is a likelihood, a
divergence from the starting model (whose predictions are read back from disk), or nothing.  Defaults are those of the
open-unlearning benchmark (lr 1e-5, 10 epochs, batch 32, warm-up over the first epoch; sheet `knowledge_unlearning`).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn

from palimpsest.core import losses
from palimpsest.core import reference as frozen
from palimpsest.core.errors import InputError
from palimpsest.core.watch import Watch
from palimpsest.data.batches import Batch, Batches, Encoded, Together
from palimpsest.models.anatomy import same_weights

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
    steps: int = 0  # optimiser steps; 0: as many as `epochs` makes
    lr: float = 1e-5
    batch_size: int = 32
    warmup_epochs: float = 1.0
    weight_decay: float = 0.01
    lora_rank: int = 0  # 0: all weights are trained
    max_length: int | None = None  # tokens a row; None: as many as the model can read
    seed: int = 0

    def batches(self, encoded: Encoded, *purpose: object) -> Batches:
        """Shuffled batches of a table; fewer rows than `batch_size` make a batch of them all."""
        from palimpsest.core.seeds import derive

        return Batches(encoded, min(self.batch_size, len(encoded)), derive(self.seed, *purpose))

    def total_steps(self, batches: Batches) -> int:
        return self.steps or max(1, round(self.epochs * batches.steps_per_epoch))


@dataclass(frozen=True, kw_only=True)
class Regularised(Budget):
    """A `Budget` with a retain term."""

    retain_loss: RetainLoss = "nll"
    gamma: float = 1.0  # weight of the forget loss
    alpha: float = 1.0  # weight of the retain loss


def unlearn(
    budget: Budget,
    lm: LM,
    request: ForgetRequest,
    forget_loss: ForgetLoss,
    *,
    watch: Watch | None = None,
    beside: dict[str, Callable[[int], Any]] | None = None,
    trainable: Callable[[nn.Module], list[nn.Parameter]] | None = None,
    forget: Encoded | None = None,
) -> LM:
    """A copy of `lm` trained to forget.

    `forget_loss(model, batch)` sees ``batch["forget"]``, ``batch["retain"]`` (where there is one) and the sources of
    `beside`.  `trainable` picks the parameters to train in the copy (default: all, or the LoRA factors).
    Raises `InputError` when an option contradicts the request, and when training changed nothing.
    """
    gamma = getattr(budget, "gamma", 1.0)
    alpha = getattr(budget, "alpha", 0.0)
    retain_loss = getattr(budget, "retain_loss", "none")
    forget = encode(budget, lm, request.forget) if forget is None else forget
    forget_batches = budget.batches(forget, "forget")
    sources: dict[str, Any] = {"forget": forget_batches, **(beside or {})}
    retain_term = None
    if retain_loss != "none" and alpha != 0:
        retain = encode(budget, lm, required(request.retain, "retain"))
        sources["retain"] = replace(budget.batches(retain, "retain"), batch_size=forget_batches.batch_size)
        retain_term = _retain_term(retain_loss, lm, retain)
    elif retain_loss != "none":
        raise InputError(f"retain_loss '{retain_loss}' with alpha 0 would be ignored: set alpha, or retain_loss 'none'")

    def loss(model: nn.Module, batch: dict[str, Batch]) -> tuple[Tensor, dict[str, Tensor]]:
        to_forget = forget_loss(model, batch)
        logs = {"forget": to_forget.detach()}
        total = gamma * to_forget
        if retain_term is not None:
            to_retain = retain_term(model, batch["retain"])
            logs["retain"] = to_retain.detach()
            total = total + alpha * to_retain
        return total, logs

    work = trainable_copy(lm, budget.lora_rank)
    if trainable is not None:
        chosen = {id(parameter) for parameter in trainable(work)}
        for parameter in work.parameters():
            parameter.requires_grad_(id(parameter) in chosen)
    (watch or Watch()).fit(
        "forget",
        work,
        loss,
        Together(**sources),
        steps=budget.total_steps(forget_batches),
        lr=budget.lr,
        warmup=round(budget.warmup_epochs * forget_batches.steps_per_epoch),
        weight_decay=budget.weight_decay,
        seed=budget.seed,
    )
    return finished(lm, work)


def encode(budget: Budget, lm: LM, table: Dataset) -> Encoded:
    return lm.encode(table, max_length=budget.max_length)


def required(table: Dataset | None, name: str) -> Dataset:
    """The table, or an `InputError` that says what the method lacks."""
    if table is None or len(table) == 0:
        raise InputError(f"this method needs {name} records (--{name} FILE), and there are none")
    return table


def trainable_copy(lm: LM, lora_rank: int = 0) -> nn.Module:
    """A copy of the model in float32, every weight trainable; with `lora_rank`, frozen below fresh LoRA factors."""
    if lm.guard is not None:
        raise InputError("a guarded model has its forgetting outside its weights: give the model without its guard")
    model = lm.copy().model.float().requires_grad_(True)
    if lora_rank == 0:
        return model
    from peft import LoraConfig, get_peft_model
    from transformers.pytorch_utils import Conv1D

    transposed = any(isinstance(module, Conv1D) for module in model.modules())
    adapter = LoraConfig(
        r=lora_rank,
        lora_alpha=2 * lora_rank,
        target_modules="all-linear",
        fan_in_fan_out=transposed,
        task_type="CAUSAL_LM",
    )
    return get_peft_model(model, adapter)


def finished(lm: LM, work: nn.Module) -> LM:
    """The trained copy as an `LM`: adapters merged, the starting model's precision restored, in evaluation mode."""
    model: Any = work.merge_and_unload() if hasattr(work, "peft_config") else work  # type: ignore[operator]
    model = model.to(next(lm.model.parameters()).dtype).requires_grad_(True).eval()
    if same_weights(model, lm.model):
        raise InputError("the method changed no weight: raise lr, steps or epochs")
    return replace(lm, model=model)


def _retain_term(retain_loss: RetainLoss, lm: LM, retain: Encoded) -> Callable[[nn.Module, Batch], Tensor]:
    if retain_loss == "nll":
        return losses.nll
    states = frozen.reference(lm.model, retain, lm.sha256)
    return lambda model, batch: losses.kl(model, batch, states)


def mean(values: Tensor, batch: Batch) -> Tensor:
    """The mean of a value a row over the whole step's rows."""
    return values.sum() / batch.total_rows


def start_logprobs(lm: LM, encoded: Encoded) -> Callable[[Batch], Tensor]:
    """The starting model's sequence log-probabilities, looked up by row: batch -> (B,)."""
    values = frozen.sequence_logprobs(lm.model, encoded, lm.sha256)

    def look_up(batch: Batch) -> Tensor:
        return values[batch.rows.cpu()].to(batch.input_ids.device)

    return look_up


def positive(**values: float) -> None:
    """Raise `InputError` unless each value is above zero."""
    for name, value in values.items():
        if not value > 0:
            raise InputError(f"{name} must be above 0, not {value}")


def check_vocabulary(one: LM, other: LM) -> None:
    """Raise `InputError` unless two models read the same tokens."""
    if one.tokenizer.get_vocab() != other.tokenizer.get_vocab():
        raise InputError(f"the models {one.source or 'one'} and {other.source or 'other'} have different vocabularies")


@torch.no_grad()
def row_divergences(model: nn.Module, encoded: Encoded, states: frozen.Reference, rows_at_once: int = 64) -> Tensor:
    """KL(reference || model) summed over each row's tokens, (N,)."""
    values = torch.zeros(len(encoded))
    for rows in encoded.by_length(rows_at_once):
        for row in rows:
            batch = encoded.batch([row]).to(next(model.parameters()).device)
            values[row] = losses.kl(model, batch, states) * batch.total_tokens
    return values
