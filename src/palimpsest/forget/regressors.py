"""What unlearners of regressors share: samples and their batches, the training, and activations as attention maps.

For any torch module with one tensor in and one out.  Knows nothing of how anything is forgotten.
Shapes: N samples, B of a batch, q targets a sample.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from palimpsest.core.errors import InputError
from palimpsest.core.losses import evaluating
from palimpsest.core.seeds import numpy_rng, seed_everything
from palimpsest.core.watch import Watch
from palimpsest.forget.unlearn import above_zero
from palimpsest.models.anatomy import hooked, output_of

Samples = tuple[Tensor, Tensor]
"""Inputs (N, ...) and float targets (N,) or (N, q)."""

Tensors = dict[str, Tensor]
TaskLoss = Literal["l1", "mse"]
CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)


@dataclass(frozen=True, kw_only=True)
class RegressionBudget:
    """How long and how fast a regressor is trained."""

    epochs: int = 1
    lr: float = 1e-3
    batch_size: int = 256
    loss: TaskLoss = "l1"
    seed: int = 0

    def __post_init__(self) -> None:
        above_zero(epochs=self.epochs, lr=self.lr, batch_size=self.batch_size)

    def fit(
        self, name: str, model: nn.Module, tree: Tensors, loss: Any = None, *, watch: Watch | None, **changes: Any
    ) -> nn.Module:
        """The module, trained in place on the rows of a tree of tensors; by default on "inputs" and "targets".

        Adam as in the paper's notebooks: no weight decay, no clipping, and a constant rate unless asked for another.
        """
        batches = Shuffled(tree, self.batch_size, self.seed)

        def plain(module: nn.Module, batch: Tensors) -> Tensor:
            return task_loss(module(batch["inputs"]), batch["targets"], self.loss)

        settings = {"lr": self.lr, "clip": None, "precision": "fp32", "seed": self.seed} | changes
        epochs = settings.pop("epochs", self.epochs)
        steps = epochs * batches.steps_per_epoch
        (watch or Watch()).fit(name, model, loss or plain, batches, main=name == "forget", steps=steps, **settings)
        return model.eval()


def train(
    model: nn.Module,
    samples: Samples,
    *,
    epochs: int,
    lr: float,
    batch_size: int = 256,
    loss: TaskLoss = "l1",
    seed: int = 0,
    watch: Watch | None = None,
) -> nn.Module:
    """A copy of a regressor trained on samples with Adam, at a rate that falls along a cosine.

    The paper lowers the rate on a plateau of a validation set; a cosine needs no such set.
    """
    inputs, targets = shaped(model, samples, "training")
    budget = RegressionBudget(epochs=epochs, lr=lr, batch_size=batch_size, loss=loss, seed=seed)
    tree = {"inputs": inputs, "targets": targets}
    return budget.fit("training", copy.deepcopy(model), tree, watch=watch, schedule="cosine")


def renewed(model: nn.Module, seed: int = 0) -> nn.Module:
    """A copy of a module with the weights that its parts draw when they are made, drawn from `seed`.

    `InputError` if a part with weights of its own cannot draw them again: give `fresh` then.
    """
    made = copy.deepcopy(model)
    with torch.random.fork_rng(devices=[]):
        seed_everything(seed, "fresh weights")
        for name, module in made.named_modules():
            reset = getattr(module, "reset_parameters", None)
            if callable(reset):
                reset()
            elif next(module.parameters(recurse=False), None) is not None:
                raise InputError(
                    f"{name or type(module).__name__} has weights and no reset_parameters: give a function `fresh` "
                    "that makes the model with new weights"
                )
    return made


def task_loss(answers: Tensor, targets: Tensor, kind: TaskLoss) -> Tensor:
    """Mean absolute or squared error.  Shapes must be equal: (B,) against (B, 1) would silently compare all pairs."""
    if answers.shape != targets.shape:
        raise InputError(f"answers of shape {tuple(answers.shape)} for targets of shape {tuple(targets.shape)}")
    difference = answers - targets
    return difference.abs().mean() if kind == "l1" else difference.square().mean()


def attention_map(activation: Tensor, channels: int | None) -> Tensor:
    """(B, positions): squared activations averaged over the axis `channels` (None: over none), of length one a row."""
    squared = activation.float().square()
    flat = (squared if channels is None else squared.mean(channels)).flatten(1)
    return flat / flat.norm(dim=1, keepdim=True).clamp(min=1e-12)


@contextmanager
def maps_of(model: nn.Module, names: Sequence[str]) -> Iterator[Tensors]:
    """Inside, every forward pass leaves the attention maps of the named modules in what is given.

    A convolution's channels are its axis 1.  Any other module's (B, T, H) are averaged over H; and of a flat layer's
    (B, H) there is nothing to average over: its units are the positions.
    """
    found: Tensors = {}

    def keep(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, inputs: Any, output: Any) -> None:
            activation = output_of(output)
            axis = None if activation.ndim == 2 else 1 if isinstance(module, CONVOLUTIONS) else -1
            found[name] = attention_map(activation, axis)

        return hook

    with hooked(*((model.get_submodule(name), keep(name)) for name in names)):
        yield found


def checked(model: nn.Module, forget: Samples, retain: Samples) -> tuple[Samples, Samples]:
    """Both sets with targets shaped like the model's answers.

    `InputError` for an empty set, targets that do not fit, and a forget set as large as the retain set.
    """
    found = shaped(model, forget, "forget"), shaped(model, retain, "retain")
    if len(found[0][0]) >= len(found[1][0]):
        raise InputError(
            f"{len(found[0][0])} samples must go and {len(found[1][0])} stay: with half or more gone, train again "
            "without them (Retrain)"
        )
    return found


def shaped(model: nn.Module, samples: Samples, name: str) -> Samples:
    """The samples with targets shaped like the model's answers; `InputError` where that cannot be."""
    inputs, targets = samples
    if len(inputs) == 0 or len(inputs) != len(targets):
        raise InputError(f"{name}: {len(inputs)} inputs and {len(targets)} targets; wanted as many of both, and some")
    if not targets.is_floating_point() or not bool(torch.isfinite(targets).all()):
        raise InputError(f"{name}: targets must be finite floating-point numbers")
    with evaluating(model):
        shape = model(inputs[:1]).shape[1:]
    if targets[0].numel() != shape.numel():
        raise InputError(
            f"{name}: targets of shape {tuple(targets.shape[1:])} a sample for answers of shape {tuple(shape)}"
        )
    return inputs, targets.reshape(-1, *shape)


def check_alike(model: nn.Module, other: nn.Module) -> None:
    """`InputError` unless two modules have the same weights and buffers in the same sizes."""
    shapes = [{name: tuple(value.shape) for name, value in one.state_dict().items()} for one in (model, other)]
    if shapes[0] != shapes[1]:
        odd = sorted(set(shapes[0].items()) ^ set(shapes[1].items()))[0][0]
        raise InputError(f"the model and the one with fresh weights differ in architecture, at '{odd}' for one")


@dataclass(frozen=True)
class Shuffled:
    """Shuffled batches of a tree of tensors, each a function of the step; an epoch's last rows make a smaller batch."""

    tree: Tensors
    batch_size: int
    seed: int

    @property
    def steps_per_epoch(self) -> int:
        return -(-len(self.tree["inputs"]) // self.batch_size)

    def __call__(self, step: int) -> Tensors:
        epoch, place = divmod(step, self.steps_per_epoch)
        order = numpy_rng(self.seed, "epoch", epoch).permutation(len(self.tree["inputs"]))
        rows = torch.from_numpy(order[place * self.batch_size : (place + 1) * self.batch_size])
        return {name: values[rows.to(values.device)] for name, values in self.tree.items()}


def some(names: Mapping[str, Any], most: int = 6) -> str:
    """The first of the names, for an error."""
    shown = [name for name in names if name]
    return ", ".join(shown[:most]) + (", ..." if len(shown) > most else "")
