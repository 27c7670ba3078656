"""The loop of STORM: a step on weighted losses that can be differentiated, and a step of the network that weighs them.

A loop of its own because the inner step must be differentiated (`core.inner`): one process, and no checkpoints.
Shapes: N samples, B a batch, E epochs.
"""

from __future__ import annotations

import math
import time
import warnings
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from palimpsest.core import inner
from palimpsest.core.errors import TrainingDiverged
from palimpsest.core.progress import Progress
from palimpsest.core.seeds import derive, seed_everything, torch_rng
from palimpsest.curate.rescaler import WIDTHS, Memory, Rescaler, binary, observe
from palimpsest.curate.samples import Draws, Outcome, Samples
from palimpsest.data.batches import count_tokens, to_device

if TYPE_CHECKING:
    from palimpsest.curate.storm import Storm


@dataclass(frozen=True)
class Trained:
    """A trained copy of the model, and what was found out about the samples on the way."""

    model: nn.Module
    weights: np.ndarray  # (N, E) float32: the weight of each sample in each epoch
    losses: list[float]  # (steps,) mean unweighted loss of the batch
    meta_losses: list[float]  # (steps,)
    forwards: int  # passes of a batch through the model, where plain training makes one a step
    seconds: float


class Training:
    """One run: the model's parameters and those of the rescaler, step by step."""

    def __init__(self, plan: Storm, model: nn.Module, samples: Samples, meta: Samples, shuffle: bool):
        self.plan, self.model, self.samples, self.meta, self.shuffle = plan, model.train(), samples, meta, shuffle
        self.device = next(model.parameters()).device
        self.draws = Draws(len(samples), plan.batch_size, derive(plan.seed, "samples"))
        self.others = Draws(len(meta), plan.batch_size, derive(plan.seed, "meta"))
        self.steps = self.draws.steps(plan.epochs)
        groups = samples.classes if plan.separate_classes else 1
        seed_everything(plan.seed, "rescaler")
        self.rescaler = Rescaler(WIDTHS[plan.features], groups).to(self.device)
        self.descent = torch.optim.Adam(self.rescaler.parameters(), plan.rescaler_lr)
        self.memory, self.other_memory = (Memory(plan.stats_window, plan.by_agreement, plan.features) for _ in range(2))
        self.optimiser = inner.Adam(plan.lr)
        self.parameters = inner.leaves(model)
        self.state = self.optimiser.start(self.parameters)
        self.forwards = 0

    def run(self, progress: str) -> Trained:
        started = time.monotonic()
        history = np.full((len(self.samples), max(1, math.ceil(self.plan.epochs))), np.nan)
        losses, meta_losses = [], []
        with Progress(progress, self.steps) as bar, inner.twice_differentiable():
            for number in range(self.steps):
                rows = self.draws.rows(number)
                seed_everything(self.plan.seed, "step", number)  # as `fit` does: the arms of a comparison share dropout
                batch = to_device(self.samples.batch(rows), self.device)
                other = to_device(self.meta.batch(self.others.beside(number)), self.device)
                loss, meta_loss, weights = self._step(number, batch, other, rows)
                epochs = (number * self.plan.batch_size + np.arange(len(rows))) // len(self.samples)
                history[rows, epochs.clip(max=history.shape[1] - 1)] = weights.cpu().numpy()
                losses.append(loss)
                meta_losses.append(meta_loss)
                bar.update(number + 1, loss, count_tokens(batch))
        with torch.no_grad():
            for name, value in self.parameters.items():
                self.model.get_parameter(name).copy_(value)
        seconds = time.monotonic() - started
        return Trained(self.model.eval(), _filled(history), losses, meta_losses, self.forwards, seconds)

    def _step(self, number: int, batch: Any, other: Any, rows: np.ndarray) -> tuple[float, float, Tensor]:
        """Weigh, step, and learn to weigh: the mean loss, the meta loss, and the weights (B,)."""
        plan = self.plan
        loss_B, weights_B = self._look(self.parameters, self.samples, batch, self.memory)
        used_B = weights_B
        if self.shuffle:
            order = torch.randperm(len(rows), generator=torch_rng(plan.seed, "shuffle", number))
            used_B = weights_B[order.to(self.device)]
        weighted = (self._scaled(used_B, loss_B) * loss_B).mean()
        new, state = inner.step(weighted, self.parameters, self.optimiser, self.state)

        loss_V, weights_V = self._look(new, self.meta, other, self.other_memory)
        meta_loss = (self._scaled(weights_V, loss_V) * loss_V if plan.meta_rescaling else loss_V).mean()
        if not torch.isfinite(meta_loss):
            raise TrainingDiverged(
                number + 1, self.steps, f"the meta loss is {float(meta_loss.detach())}", None, plan.lr
            )
        waiting = number * plan.batch_size < plan.warmup_epochs * len(self.samples)
        self.descent.zero_grad(set_to_none=True)
        targets = list(self.rescaler.parameters())
        gradients = torch.autograd.grad(meta_loss, targets, retain_graph=waiting, allow_unused=True)
        for target, gradient in zip(targets, gradients, strict=True):
            target.grad = gradient
        if waiting:  # the step above was only tried
            new, state = inner.step(loss_B.mean(), self.parameters, self.optimiser, self.state, differentiable=False)
        self.parameters, self.state = inner.detached(new), inner.detached(state)
        self.descent.step()
        return float(loss_B.detach().mean()), float(meta_loss.detach()), weights_B.detach()

    def _look(self, parameters: inner.Tensors, samples: Samples, batch: Any, memory: Memory) -> tuple[Tensor, Tensor]:
        """The losses of a batch (B,), with gradient, and the weights that the rescaler gives them (B,)."""

        def look() -> Outcome:
            return inner.evaluate(samples.outcome, self.model, parameters, batch)

        passes = [look()]
        with torch.no_grad():
            passes += [look() for _ in range(self.plan.dropout_rounds)]
        signals = observe(passes)
        if self.forwards == 0 and self.plan.dropout_rounds and self.plan.features == "all":
            _warn_without_dropout(signals.values[:, 1])
        self.forwards += len(passes)
        groups = batch["labels"] if self.plan.separate_classes else torch.zeros_like(signals.agrees, dtype=torch.int64)
        weights = self.rescaler(memory(signals, groups), groups)
        if self.plan.threshold:
            weights = binary(weights, self.plan.threshold)
        return passes[0].loss, self.plan.floor + (1 - self.plan.floor) * weights

    def _scaled(self, weights: Tensor, losses: Tensor) -> Tensor:
        if not self.plan.preserve_scale:
            return weights
        losses = losses.detach()
        return weights * (losses.sum() / (weights.detach() * losses).sum().clamp_min(1e-12))


def _warn_without_dropout(spreads: Tensor) -> None:
    if not bool((spreads > 0).any()):
        warnings.warn(
            "no dropout is active in this model: passes agree, and 12 of the rescaler's 19 features say nothing",
            stacklevel=2,
        )


def _filled(history: np.ndarray) -> np.ndarray:
    """Samples that the last epoch had no room for keep the weight of the epoch before."""
    for epoch in range(1, history.shape[1]):
        missing = np.isnan(history[:, epoch])
        history[missing, epoch] = history[missing, epoch - 1]
    missing = np.isnan(history[:, 0])
    history[missing, 0] = 1.0  # less than one epoch: never weighed
    return history.astype(np.float32)
