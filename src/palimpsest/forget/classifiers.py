"""Unlearning a plain classifier, or a stack of them: tensors in, logits out, no tokens and no tables.

`Matching` (oracle matching, and datamodel matching when the targets are predicted ones; arXiv:2410.23232) and what it
is compared with: `Finetune` (GD), `Ascent` (GA), `AscentDescent` (GDA), `Scrub` (arXiv:2302.09880).  A rule is a loss;
`unlearn` is the loop they share, with the paper's optimiser (SGD with momentum), which `core.fit` does not have and
which a stack of models could not use there.  Models are trained in evaluation mode: a batch full of forget rows would
ruin the running statistics of batch norm.
Shapes: R rows of a set, b of a batch, C classes, M models of a stack.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, ClassVar, NamedTuple, Protocol, TypeVar

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call, vmap

from palimpsest.core.attribution import Rows, check_rows
from palimpsest.core.errors import InputError, TrainingDiverged
from palimpsest.core.losses import evaluating
from palimpsest.core.many import Many, predict_many
from palimpsest.core.seeds import derive, numpy_rng

Model = TypeVar("Model", nn.Module, Many)


@dataclass(frozen=True, eq=False)
class Examples:
    """Labelled rows, and for the rules that ask for them the logits that the rule holds each row against."""

    inputs: Tensor  # (R, ...)
    labels: Tensor  # (R,)
    outputs: Tensor | None = None  # (R, C), or (M, R, C) for a stack

    def __len__(self) -> int:
        return len(self.labels)

    def less(self, effect: Tensor) -> Examples:
        """The same rows held against their outputs less `effect`, (R, C)."""
        return replace(self, outputs=_wanted(self) - effect)


class Seen(NamedTuple):
    """What a rule sees of a batch's rows of one set."""

    logits: Tensor  # (b, C)
    labels: Tensor  # (b,)
    outputs: Tensor | None  # (b, C)


class Rule(Protocol):
    """``loss(forget, retain, phase)`` is a mean over a batch; `phase` runs from 0 to 1 over the steps."""

    forget_share: ClassVar[float]  # of a batch's rows

    def loss(self, forget: Seen, retain: Seen, phase: float) -> Tensor: ...

    def rate(self, phase: float) -> float:
        """What the learning rate is multiplied by."""
        ...


@dataclass(frozen=True)
class _Steady:
    def rate(self, phase: float) -> float:
        return 1.0


@dataclass(frozen=True)
class Matching(_Steady):
    """Squared error to target logits, on forget and retain rows alike: OM with an oracle's, DMM with predicted ones."""

    forget_share: ClassVar[float] = 0.5

    def loss(self, forget: Seen, retain: Seen, phase: float) -> Tensor:
        return torch.cat([_error(forget), _error(retain)]).mean()


@dataclass(frozen=True)
class Finetune(_Steady):
    """GD: cross-entropy on retain rows alone."""

    forget_share: ClassVar[float] = 0.0

    def loss(self, forget: Seen, retain: Seen, phase: float) -> Tensor:
        return F.cross_entropy(retain.logits, retain.labels)


@dataclass(frozen=True)
class Ascent(_Steady):
    """GA: cross-entropy on forget rows, upwards.  Nothing ends it but the steps."""

    forget_share: ClassVar[float] = 1.0

    def loss(self, forget: Seen, retain: Seen, phase: float) -> Tensor:
        return -F.cross_entropy(forget.logits, forget.labels)


@dataclass(frozen=True)
class AscentDescent(_Steady):
    """GDA: up on forget rows for the first part of the steps, down on retain rows in all."""

    ascending: float = 0.5  # share of the steps; the paper's benchmark has 3 or 5 of 5 to 10 epochs
    forget_share: ClassVar[float] = 0.5

    def loss(self, forget: Seen, retain: Seen, phase: float) -> Tensor:
        down = F.cross_entropy(retain.logits, retain.labels)
        return down - F.cross_entropy(forget.logits, forget.labels) if phase < self.ascending else down


@dataclass(frozen=True)
class Scrub:
    """SCRUB: away from the starting model on forget rows at first, and always near it on retain rows.

    `Examples.outputs` are the starting model's logits.  KL is KL(start || model), as in the paper's code.
    """

    ascending: float = 0.3  # share of the steps that push away
    temperature: float = 4.0
    label_weight: float = 0.99
    keep_weight: float = 0.1  # of KL on retain rows
    forget_share: ClassVar[float] = 0.5

    def loss(self, forget: Seen, retain: Seen, phase: float) -> Tensor:
        near = self.label_weight * F.cross_entropy(retain.logits, retain.labels) + self.keep_weight * self._kl(retain)
        return near - self._kl(forget) if phase < self.ascending else near

    def rate(self, phase: float) -> float:
        """A tenth after 3, 5 and 9 tenths of the steps."""
        return float(0.1 ** sum(phase >= part for part in (0.3, 0.5, 0.9)))

    def _kl(self, seen: Seen) -> Tensor:
        start = (_wanted(seen) / self.temperature).log_softmax(-1)
        now = (seen.logits / self.temperature).log_softmax(-1)
        return self.temperature**2 * (start.exp() * (start - now)).sum(-1).mean()  # F.kl_div is slow under vmap


def split(inputs: Tensor, labels: Tensor, rows: Rows, retained: int, *, seed: int = 0) -> tuple[Examples, Examples]:
    """The rows to forget, and `retained` of the others drawn at random (all, if there are fewer).

    `InputError` as of `check_rows`: rows named twice, not among the data, or half of them and more.
    """
    gone = check_rows(rows, len(labels))
    others = np.setdiff1d(np.arange(len(labels)), gone)
    if retained < 1:
        raise InputError(f"at least 1 retained row is needed, not {retained}: without any, everything moves")
    drawn = torch.from_numpy(np.sort(numpy_rng(seed, "retained").permutation(others)[:retained]))
    forget = torch.from_numpy(gone)
    return Examples(inputs[forget], labels[forget]), Examples(inputs[drawn], labels[drawn])


def logits_of(model: nn.Module | Many, inputs: Tensor) -> Tensor:
    """(R, C), or (M, R, C) of a stack, in evaluation mode and without gradient."""
    if isinstance(model, Many):
        return predict_many(model, inputs)
    with evaluating(model):
        return model(inputs)


def with_outputs(model: nn.Module | Many, examples: Examples) -> Examples:
    """The examples with what the model itself says of them."""
    return replace(examples, outputs=logits_of(model, examples.inputs))


def datamodel_matching(
    model: Model,
    forget: Examples,
    retain: Examples,
    removal: Tensor,
    retain_removal: Tensor | None = None,
    **training: Any,
) -> Model:
    """DMM: match the model's own logits less the predicted effects of the removal (`Datamodel.removal`).

    `removal`: (R, C) of the forget rows; `retain_removal`: of the retain rows, None to hold them where they are.  Those
    effects are small: give them shrunk to what can be told from noise (`core.attribution.trusted_share`).
    `training`: see `unlearn`.
    """
    towards, held = with_outputs(model, forget).less(removal), with_outputs(model, retain)
    if retain_removal is not None:
        held = held.less(retain_removal)
    return unlearn(model, Matching(), towards, held, **training)


def unlearn(
    model: Model,
    rule: Rule,
    forget: Examples,
    retain: Examples,
    *,
    steps: int = 90,
    lr: float = 1e-2,
    batch_size: int = 40,
    momentum: float = 0.9,
    seed: int = 0,
) -> Model:
    """A copy of a classifier, or of a stack of them, trained by the rule; each of a stack as if alone.

    A batch has `batch_size` rows, the rule's `forget_share` of them to forget; each set is gone through in epochs.
    `InputError` for examples without the outputs that the rule needs, `TrainingDiverged` when weights are not finite.
    """
    if steps < 1 or batch_size < 2 or lr <= 0:
        raise InputError(f"steps {steps}, batch_size {batch_size}, lr {lr:g}: wanted at least 1, at least 2, above 0")
    models = len(model) if isinstance(model, Many) else 1
    count = round(batch_size * rule.forget_share)
    sets = [(forget, count, "forget"), (retain, batch_size - count, "retain")]
    orders = [_orders(len(one), size * steps, models, derive(seed, name)) for one, size, name in sets]
    work, parameters, values_of = _copied(model, rule)
    optimizer = torch.optim.SGD([p for p in parameters.values() if p.requires_grad], lr, momentum)
    for step in range(steps):
        phase = step / steps
        batch = [
            _pick(one, order[:, step * size : (step + 1) * size])
            for (one, size, _), order in zip(sets, orders, strict=True)
        ]
        optimizer.param_groups[0]["lr"] = lr * rule.rate(phase)
        optimizer.zero_grad(set_to_none=True)
        value = values_of(batch, phase).sum()
        value.backward()
        optimizer.step()
        if not torch.isfinite(value):
            raise TrainingDiverged(step + 1, steps, f"the loss is {float(value.detach())}", None, lr)
    if not all(torch.isfinite(p).all() for p in parameters.values()):
        raise TrainingDiverged(steps, steps, "weights are not finite", None, lr)
    if isinstance(work, Many):
        return replace(work, parameters={name: p.detach() for name, p in parameters.items()})
    work.zero_grad(set_to_none=True)
    for mine, theirs in zip(work.modules(), model.modules(), strict=True):
        mine.training = theirs.training
    return work


def _copied(model: Model, rule: Rule) -> tuple[Model, dict[str, Tensor], Callable[[Any, float], Tensor]]:
    """The copy to train, its parameters, and ``values(batch, phase)``: the loss of each model's batch, (M,)."""

    def loss_of(call: Callable[[Tensor], Tensor], batch: Any, phase: float) -> Tensor:
        parts = call(torch.cat([rows[0] for rows in batch])).split([len(rows[0]) for rows in batch])
        forget, retain = (Seen(part, rows[1], rows[2]) for part, rows in zip(parts, batch, strict=True))
        return rule.loss(forget, retain, phase)

    if not isinstance(model, Many):
        work = copy.deepcopy(model).eval()

        def alone(batch: Any, phase: float) -> Tensor:
            return loss_of(work, [[None if part is None else part[0] for part in rows] for rows in batch], phase)

        return work, dict(work.named_parameters()), alone
    module = copy.deepcopy(model.module).eval()
    parameters = {
        name: value.detach().clone().requires_grad_(module.get_parameter(name).requires_grad)
        for name, value in model.parameters.items()
    }

    def together(batch: Any, phase: float) -> Tensor:
        def one(own: dict[str, Tensor], rows: Any) -> Tensor:
            return loss_of(lambda inputs: functional_call(module, (own, model.buffers), (inputs,)), rows, phase)

        return vmap(one)(parameters, batch)

    return replace(model, parameters=parameters), parameters, together


def _orders(rows: int, drawn: int, models: int, seed: int) -> Tensor:
    """(M, drawn): the rows that each model sees, epoch after epoch."""
    if rows == 0:
        raise InputError("a set of examples is empty")
    epochs = -(-drawn // rows)
    lines = [
        np.concatenate(
            [numpy_rng(seed, model, epoch).permutation(rows) for epoch in range(epochs)] or [np.empty(0, int)]
        )
        for model in range(models)
    ]
    return torch.from_numpy(np.stack(lines)[:, :drawn].astype(np.int64))


def _pick(examples: Examples, rows: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
    """Inputs, labels and outputs, (M, b, ...) each, of each model's rows (M, b)."""
    outputs = examples.outputs
    if outputs is not None:
        stack = outputs if outputs.ndim == 3 else outputs.expand(len(rows), -1, -1)
        outputs = stack[torch.arange(len(rows))[:, None], rows]
    return examples.inputs[rows], examples.labels[rows], outputs


def _error(seen: Seen) -> Tensor:
    return (seen.logits - _wanted(seen)).square().mean(-1)


def _wanted(rows: Seen | Examples) -> Tensor:
    if rows.outputs is None:
        raise InputError("the rows are to be held against logits, and the examples have none (Examples.outputs)")
    return rows.outputs
