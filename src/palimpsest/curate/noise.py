"""Training on wrong labels without STORM: the same samples, batches and steps, and other answers to the same question.

Plain training, early stopping on noisy held-out samples, keeping the samples of small loss (told the share of wrong
labels, as in co-teaching, Han et al. 2018), and AGRA (Sedova et al. 2023), which keeps a sample whose gradient does not
point against that of a random batch.  Label smoothing is a field of the samples; the oracle is `select` on them.
Also how labels are made wrong on purpose.  Shapes: N samples, B a batch, C classes, D inputs of the last layer.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from palimpsest.core.errors import InputError, unknown
from palimpsest.core.fit import fit
from palimpsest.core.losses import evaluating
from palimpsest.core.seeds import derive, numpy_rng
from palimpsest.curate.samples import Draws, Samples
from palimpsest.data.batches import to_device

Weigh = Callable[[nn.Module, Any, Tensor], Tensor]
"""(model, step's batches, losses (B,) without gradient) -> weights (B,)"""

_RAMP = 10  # epochs over which trimming reaches its full share (co-teaching)


def flipped(labels: Tensor, classes: int, share: float, seed: int, how: str = "uniform") -> tuple[Tensor, Tensor]:
    """Labels (N,) of which a `share`, drawn at random, is wrong; and which ones, (N,) bool.

    "uniform": any other class; "next": the class after, a mistake that can be learned.
    """
    if not 0 <= share <= 1:
        raise InputError(f"share must lie between 0 and 1, not {share}")
    if how not in ("uniform", "next"):
        raise unknown("kind of noise", how, ("uniform", "next"))
    rng = numpy_rng(seed, "noise", how)
    wrong = np.zeros(len(labels), dtype=bool)
    wrong[rng.permutation(len(labels))[: round(share * len(labels))]] = True
    shift = rng.integers(1, classes, size=len(labels)) if how == "uniform" else np.ones(len(labels), dtype=np.int64)
    moved = (labels + torch.from_numpy(shift)) % classes
    chosen = torch.from_numpy(wrong)
    return torch.where(chosen, moved, labels), chosen


@dataclass(frozen=True)
class Plain:
    """Training as usual, with weights of the batch's samples if `weigh` gives any."""

    epochs: float
    lr: float
    batch_size: int
    seed: int = 0

    def train(
        self,
        model: nn.Module,
        samples: Samples,
        weigh: Weigh | None = None,
        *,
        beside: bool = False,
        until: Callable[[int, nn.Module], bool] | None = None,
    ) -> nn.Module:
        """A trained copy of `model`.  The batches are those that `Storm` of the same seed sees.

        `beside`: the step's batches also hold a random one ("beside"), which some ways of weighing compare with.
        """
        draws = Draws(len(samples), self.batch_size, derive(self.seed, "samples"))
        others = Draws(len(samples), self.batch_size, derive(self.seed, "meta"))

        def batches(step: int) -> dict[str, Any]:
            found = {"own": samples.batch(draws.rows(step))}
            return found | ({"beside": samples.batch(others.beside(step))} if beside else {})

        def loss(model: nn.Module, batch: dict[str, Any]) -> Tensor:
            values = samples.outcome(model, batch["own"]).loss
            if weigh is None:
                return values.mean()
            weights = weigh(model, batch, values.detach())
            return (weights * values).sum() / weights.sum().clamp_min(1)

        trained = copy.deepcopy(model)
        fit(
            trained,
            loss,
            batches,
            steps=draws.steps(self.epochs),
            lr=self.lr,
            clip=None,
            precision="fp32",
            seed=self.seed,
            until=until,
            progress="",
        )
        return trained.eval()

    def small_loss(self, model: nn.Module, samples: Samples, share: float) -> nn.Module:
        """Each batch without its `share` of largest losses, which is reached over the first ten epochs."""
        if not 0 <= share < 1:
            raise InputError(f"share must lie in [0, 1), not {share}")
        per_epoch = len(samples) / self.batch_size
        done = 0

        def weigh(model: nn.Module, batch: Any, losses: Tensor) -> Tensor:
            nonlocal done
            dropped = share * min(done / per_epoch / _RAMP, 1)
            done += 1
            kept = max(1, round((1 - dropped) * len(losses)))
            return torch.zeros_like(losses).scatter(0, losses.argsort()[:kept], 1.0)

        return self.train(model, samples, weigh)

    def agra(self, model: nn.Module, samples: Samples) -> nn.Module:
        """Only samples whose gradient in the last layer does not point against that of a random batch."""
        layers = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
        if not layers:
            raise InputError("AGRA compares gradients in the last linear layer, and the model has none")

        def weigh(model: nn.Module, batch: Any, losses: Tensor) -> Tensor:
            layer = model.get_submodule(layers[-1])
            inputs, slopes = last_layer(model, layer, samples, batch["own"])
            other_inputs, other_slopes = last_layer(model, layer, samples, batch["beside"])
            towards = slopes @ (other_slopes.T @ other_inputs)  # (B, D): a row's gradient is slope x input
            product = (towards * inputs).sum(1) + slopes @ other_slopes.sum(0)
            return (product >= 0).to(losses.dtype)

        return self.train(model, samples, weigh, beside=True)

    def stopped_early(self, model: nn.Module, samples: Samples, held_out: Samples) -> nn.Module:
        """The state of the epoch with the most agreement on `held_out` samples, whose labels may be as wrong."""
        best: tuple[float, dict[str, Tensor]] = (-1.0, {})
        per_epoch = -(-len(samples) // self.batch_size)

        def look(step: int, model: nn.Module) -> bool:
            nonlocal best
            if step % per_epoch == 0:
                found = agreement(model, held_out)
                if found > best[0]:
                    best = (found, {name: value.clone() for name, value in model.state_dict().items()})
            return False

        trained = self.train(model, samples, until=look)
        if best[1]:
            trained.load_state_dict(best[1])
        return trained


def last_layer(model: nn.Module, layer: nn.Module, samples: Samples, batch: Any) -> tuple[Tensor, Tensor]:
    """What goes into a linear layer, (B, D), and the slope of each sample's loss in what comes out, (B, C).

    A sample's gradient in the layer's matrix is their outer product, in its bias the slope.
    """
    seen: list[tuple[Tensor, Tensor]] = []
    hook = layer.register_forward_hook(lambda _, given, out: seen.append((given[0].detach(), out)))
    try:
        with torch.enable_grad():
            loss = samples.outcome(model, batch).loss
            (slopes,) = torch.autograd.grad(loss.sum(), seen[-1][1])
    finally:
        hook.remove()
    inputs = seen[-1][0]
    if inputs.dim() != 2:
        raise InputError(f"the last linear layer sees {tuple(inputs.shape)}; AGRA needs one row a sample")
    return inputs, slopes


def agreement(model: nn.Module, samples: Samples, batch_size: int = 256) -> float:
    """The share of samples whose label the model finds likeliest, without dropout: accuracy, where labels are right."""
    return float(outcomes(model, samples, batch_size)[1].mean())


def outcomes(model: nn.Module, samples: Samples, batch_size: int = 256) -> tuple[np.ndarray, np.ndarray]:
    """Loss and agreement of each sample without dropout, (N,) float64 each."""
    device = next(model.parameters()).device
    losses, agrees = [], []
    with evaluating(model):
        for start in range(0, len(samples), batch_size):
            rows = np.arange(start, min(start + batch_size, len(samples)))
            outcome = samples.outcome(model, to_device(samples.batch(rows), device))
            losses.append(outcome.loss.double().cpu().numpy())
            agrees.append(outcome.agrees.double().cpu().numpy())
    return np.concatenate(losses), np.concatenate(agrees)
