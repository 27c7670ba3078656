"""Unlearning for regressors: what a model that never saw a range of targets would answer, found without retraining it.

Tarun et al. 2022 (arXiv:2210.08196, ICML 2023).  A regression has no wrong label that is as good as any, and no uniform
output that means "I do not know".  Blindspot takes the answers of a second network that read only what stays, and only
briefly; Gaussian Amnesiac draws them from the distribution of all targets; `Finetune` and `Retrain` are what both are
held against.  They work on any torch module and on tensors, not on an `LM` and records, so they stand outside the
registry of the verb; otherwise they are like its methods: frozen, called, giving a new model.  All need both sets.
The measures are in audit/regression.py.  Shapes: B samples of a batch.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from palimpsest.core.errors import InputError
from palimpsest.core.seeds import torch_rng
from palimpsest.core.watch import Watch
from palimpsest.forget.regressors import (
    CONVOLUTIONS,
    RegressionBudget,
    Samples,
    Tensors,
    check_alike,
    checked,
    evaluating,
    maps_of,
    renewed,
    shaped,
    some,
    task_loss,
    train,
)
from palimpsest.forget.unlearn import above_zero, not_negative

Fresh = Callable[[], nn.Module]

_AT_ONCE = 256  # samples in a pass without a gradient


@dataclass(frozen=True, kw_only=True)
class Blindspot(RegressionBudget):
    """Blindspot: on what must go, answer like a network that saw only what stays; on what stays, as the targets say.

    The blind network is trained from fresh weights on the retain samples, for so few epochs that it knows no more than
    their general shape.  With `attention`, the activations of the layers are pulled towards the blind network's too.
    """

    blind_epochs: int = 2
    blind_lr: float = 1e-2
    attention: float = 50.0  # weight of the attention-transfer term (lambda); 0: answers alone
    layers: tuple[str, ...] = ()  # modules that are compared; none named: all convolutions and recurrent layers
    reduction: Literal["mean", "sum"] = "mean"  # over a map; a mean shrinks as maps grow, and lambda's effect with it

    def __post_init__(self) -> None:
        super().__post_init__()
        above_zero(blind_epochs=self.blind_epochs, blind_lr=self.blind_lr)
        not_negative(attention=self.attention)

    def __call__(
        self,
        model: nn.Module,
        forget: Samples,
        retain: Samples,
        *,
        fresh: Fresh | None = None,
        blind: nn.Module | None = None,
        watch: Watch | None = None,
    ) -> nn.Module:
        """`fresh()` makes the same architecture with new weights (default: `renewed`); `blind`: one trained before."""
        forget, retain = checked(model, forget, retain)
        if blind is None:
            blind = self.blind(model, retain, fresh=fresh, watch=watch)
        check_alike(model, blind)
        names = self._compared(model) if self.attention else []
        beside = _seen(blind, forget[0], names)

        def loss(module: nn.Module, batch: Tensors) -> tuple[Tensor, Tensors]:
            with maps_of(module, names) as maps:
                answers = module(batch["inputs"])
            gone, zero = batch["forget"], answers.new_zeros(())
            terms = {"retain": zero, "forget": zero, "attention": zero}
            if not bool(gone.all()):  # the mean over no sample would be NaN
                terms["retain"] = task_loss(answers[~gone], batch["targets"][~gone], self.loss)
            if bool(gone.any()):
                terms["forget"] = task_loss(answers[gone], batch["wanted"][gone], self.loss)
                distances = [(maps[name][gone] - batch[name][gone]).square() for name in names]
                terms["attention"] = zero + self.attention * sum(map(self._reduced, distances))
            share = gone.float().mean()
            value = share * (terms["forget"] + terms["attention"]) + (1 - share) * terms["retain"]
            return value, {name: term.detach() for name, term in terms.items()}

        gone, kept = len(forget[0]), len(retain[0])
        tree = _joined(forget, retain)
        tree["forget"] = torch.arange(gone + kept, device=forget[0].device) < gone
        for name, values in beside.items():
            tree[name] = torch.cat([values, values.new_zeros(kept, *values.shape[1:])])
        return self.fit("forget", copy.deepcopy(model), tree, loss, watch=watch)

    def blind(
        self, model: nn.Module, retain: Samples, *, fresh: Fresh | None = None, watch: Watch | None = None
    ) -> nn.Module:
        """The blind network, in evaluation mode."""
        start = renewed(model, self.seed) if fresh is None else fresh()
        inputs, targets = shaped(start, retain, "retain")
        tree = {"inputs": inputs, "targets": targets}
        return self.fit("blind", start, tree, watch=watch, epochs=self.blind_epochs, lr=self.blind_lr)

    def _reduced(self, distances: Tensor) -> Tensor:
        return distances.mean() if self.reduction == "mean" else distances.sum(1).mean()

    def _compared(self, model: nn.Module) -> list[str]:
        known = dict(model.named_modules())
        if self.layers:
            missing = [name for name in self.layers if name not in known]
            if missing:
                raise InputError(f"the model has no module called '{missing[0]}': its modules are {some(known)}")
            return list(self.layers)
        kinds = (*CONVOLUTIONS, nn.RNNBase, nn.TransformerEncoderLayer)
        found = [name for name, module in known.items() if isinstance(module, kinds)]
        if not found:  # a plain stack of linear layers: all but the one that answers
            found = [name for name, module in known.items() if isinstance(module, nn.Linear)][:-1]
        if not found:
            raise InputError("the model has no inner layer to compare: name some in `layers`, or set attention to 0")
        return found


@dataclass(frozen=True, kw_only=True)
class GaussianAmnesiac(RegressionBudget):
    """Gaussian Amnesiac: fine-tune on everything, what must go having targets drawn from the normal fit to all targets.

    The draws can lie outside the range of the targets (negative ages), unless `clip_range`.
    """

    clip_range: bool = False  # keep them between the smallest and the largest target

    def __call__(self, model: nn.Module, forget: Samples, retain: Samples, *, watch: Watch | None = None) -> nn.Module:
        forget, retain = checked(model, forget, retain)
        tree = _joined((forget[0], self.targets(forget, retain)), retain)
        return self.fit("forget", copy.deepcopy(model), tree, watch=watch)

    def targets(self, forget: Samples, retain: Samples) -> Tensor:
        """What the forget samples are taught, drawn once."""
        every = torch.cat([forget[1], retain[1]]).double()
        draws = torch.randn(forget[1].shape, generator=torch_rng(self.seed, "targets"), dtype=torch.float64)
        wrong = every.mean(0) + every.std(0) * draws.to(every.device)
        if self.clip_range:
            wrong = wrong.clamp(every.amin(0), every.amax(0))
        return wrong.to(forget[1].dtype)


@dataclass(frozen=True, kw_only=True)
class Finetune(RegressionBudget):
    """Fine-tuning on what stays: what goes away by itself."""

    epochs: int = 5

    def __call__(self, model: nn.Module, forget: Samples, retain: Samples, *, watch: Watch | None = None) -> nn.Module:
        _, (inputs, targets) = checked(model, forget, retain)
        return self.fit("forget", copy.deepcopy(model), {"inputs": inputs, "targets": targets}, watch=watch)


@dataclass(frozen=True, kw_only=True)
class Retrain(RegressionBudget):
    """Retraining on what stays: the exact answer, at the price of a training."""

    epochs: int = 100
    lr: float = 1e-2

    def __call__(
        self,
        model: nn.Module,
        forget: Samples,
        retain: Samples,
        *,
        fresh: Fresh | None = None,
        watch: Watch | None = None,
    ) -> nn.Module:
        _, retain = checked(model, forget, retain)
        start = renewed(model, self.seed) if fresh is None else fresh()
        check_alike(model, start)
        budget = {"epochs": self.epochs, "lr": self.lr, "batch_size": self.batch_size}
        return train(start, retain, **budget, loss=self.loss, seed=self.seed, watch=watch)  # type: ignore[arg-type]


def _joined(forget: Samples, retain: Samples) -> Tensors:
    names = ("inputs", "targets")
    return {name: torch.cat(pair) for name, pair in zip(names, zip(forget, retain, strict=True), strict=True)}


def _seen(blind: nn.Module, inputs: Tensor, names: list[str]) -> Tensors:
    """What the blind network answers ("wanted"), and its maps: once, so that it need not run beside the training."""
    found: dict[str, list[Tensor]] = {"wanted": [], **{name: [] for name in names}}
    with evaluating(blind), maps_of(blind, names) as maps:
        for part in inputs.split(_AT_ONCE):
            found["wanted"].append(blind(part))
            for name in names:
                found[name].append(maps[name])
    return {name: torch.cat(parts) for name, parts in found.items()}
