"""Unlearning one expert: of a mixture of experts, train only the one that what must go is sent to, and hold it there.

Zhuang et al. 2024 (UOE, in ACL 2025 as SEUF; arXiv:2411.18797).  Trained freely, a mixture forgets by a shortcut: its
routers send the texts elsewhere, and innocent experts are damaged.  Here the expert with the largest affinity to the
forget set, with the router of its layer, is all that is trained, and an anchor keeps the router choosing it.
An add-on: any method that trains weights gives the loss.  Needs: a mixture of experts, forget records, and what that
method needs.  Where experts have not specialised, one of them cannot forget enough.
Shapes: B rows, T positions, E experts, N tokens.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, fields, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from palimpsest.core import losses
from palimpsest.core.errors import InputError
from palimpsest.core.fit import Trace
from palimpsest.core.methods import get, method
from palimpsest.core.watch import Watch
from palimpsest.data.batches import Batch, Batches, Together
from palimpsest.forget.unlearn import (
    Budget,
    above_zero,
    check_share,
    distinct,
    encode,
    not_negative,
    plain,
)
from palimpsest.models.anatomy import base_of, hooked
from palimpsest.models.experts import (
    Gates,
    Mixture,
    Routed,
    affinity,
    mixtures,
    most_responsible,
    overlap,
    routing,
    row_means,
    sample_of,
    selected,
    selections,
)

if TYPE_CHECKING:
    from palimpsest.data.request import ForgetRequest
    from palimpsest.models.lm import LM

Target = tuple[int, int]  # (layer, expert)

_FEW_TOKENS = 2000  # calibration tokens below which the choice of an expert is a matter of luck (sheet, traps)
_LOG = logging.getLogger(__name__)


@method(verb="forget", paper="uoe")
@dataclass(frozen=True, kw_only=True)
class UOE(Budget):
    """Unlearning one expert: any training method, confined to the expert that the forget set is sent to.

    `loss` names a method of this verb that trains weights ("npo", "gradient-ascent", "grad-diff", "rmu", ...), and
    `settings` are its own hyper-parameters; a method that works at one layer works at the expert's.
    """

    loss: str = "npo"
    settings: dict[str, int | float | str] = field(default_factory=dict)
    anchor: float = 1.0  # weight of the anchor; 0: the router may send the forget set elsewhere
    experts: int = 1  # M: how many are trained, those of the largest affinity
    targets: tuple[Target, ...] = ()  # (layer, expert) pairs to train, instead of attributed ones
    gates: Gates = "kept"  # affinity by the weights the model gives to chosen experts, or by the whole softmax
    calibration_tokens: int = 100_000
    lr: float = 1e-4
    batch_size: int = 16
    weight_decay: float = 0.0  # it would move the other experts, which share a tensor with the trained one

    def __post_init__(self) -> None:
        super().__post_init__()
        not_negative(anchor=self.anchor)
        above_zero(experts=self.experts, calibration_tokens=self.calibration_tokens)
        if self.lora_rank or self.weight_decay:
            raise InputError(
                "one expert's own weights are trained and no others: leave lora_rank and weight_decay at 0"
            )

    def __call__(self, lm: LM, request: ForgetRequest, *, watch: Watch | None = None) -> LM:
        lm = plain(lm)
        mixtures(lm.model)
        check_share(request)
        request = replace(request, forget=distinct(request.forget))
        targets = self.targets or self.attribute(lm, request)[0]
        base = self._base(targets)
        watch = watch or Watch()
        confined = OneExpert(
            watch.checkpoint, watch.until, watch.progress, watch.traces, targets, self.anchor, original=lm.model
        )
        after = base(lm, request, watch=confined)
        _check_confined(lm, after, targets)
        return after

    def attribute(self, lm: LM, request: ForgetRequest) -> tuple[tuple[Target, ...], Tensor]:
        """The experts to train, most responsible first, and the affinities of all: (mixture layers, E) float64."""
        calibration = sample_of(encode(self, lm, request.forget), self.calibration_tokens, self.seed)
        tokens = int(calibration.lengths.sum())
        if tokens < _FEW_TOKENS:
            _LOG.warning("experts are attributed by %d tokens only: the choice may not be stable", tokens)
        table = affinity(lm.model, calibration, self.gates)
        numbers = [mixture.layer for mixture in mixtures(lm.model)]
        return tuple(most_responsible(table, numbers, self.experts)), table

    def _base(self, targets: Sequence[Target]) -> Any:
        """The method that gives the loss, with this one's budget."""
        info = get("forget", self.loss)
        if not issubclass(info.cls, Budget) or isinstance(self, info.cls):
            raise InputError(f"loss '{info.name}' is no method that trains weights: choose npo, grad-diff, rmu, ...")
        budget = {one.name: getattr(self, one.name) for one in fields(Budget)}
        clash = sorted(budget.keys() & self.settings.keys())
        if clash:
            raise InputError(
                f"{', '.join(clash)} belongs to the budget: give it to uoe, not in the settings of its loss"
            )
        own = dict(self.settings)
        if "layer" in {one.name for one in fields(info.cls)}:
            own.setdefault("layer", max(layer for layer, _ in targets))
        return info(**budget, **own)


@dataclass(frozen=True)
class OneExpert(Watch):
    """A watch under which the main loop of any method trains only the target experts and the routers of their layers.

    Goes around any configured method: ``NPO(...)(lm, request, watch=OneExpert(targets=((1, 5),), original=lm.model))``.
    Logs beside the method's own: "anchor" (the anchor loss), "affinity" (the targets' mean probability on forget
    tokens), and "overlap" (the share of the forget tokens' experts, in all layers, that served them at the start).
    """

    targets: tuple[Target, ...] = ()
    anchor: float = 1.0
    original: nn.Module | None = field(default=None, repr=False)  # the model that must not be written into

    def fit(
        self, name: str, model: nn.Module, loss: Any, batches: Any, *, main: bool = True, **arguments: Any
    ) -> Trace:
        if not main:
            return super().fit(name, model, loss, batches, main=False, **arguments)
        found = mixtures(model)
        chosen = _located(found, self.targets)
        self._check_own_weights(model, chosen)
        rule = Anchored(found, chosen, self.anchor, loss, _start(model, batches))
        identity = {"of": arguments.get("identity"), "targets": [list(t) for t in self.targets], "anchor": self.anchor}
        arguments |= {"weight_decay": 0.0, "identity": identity}
        with confined(model, chosen):
            return super().fit(name, model, rule, batches, main=True, **arguments)

    def _check_own_weights(self, model: nn.Module, chosen: Sequence[tuple[Mixture, int]]) -> None:
        """Methods that train something beside the weights leave these in the memory of the original."""
        if self.original is None:
            return
        taken = {p.data_ptr() for p in self.original.parameters()}
        if any(p.data_ptr() in taken for mixture, _ in chosen for p in mixture.experts.parameters()):
            raise InputError("this method trains parts beside the weights, so it cannot be confined to one expert")


@contextmanager
def confined(model: nn.Module, chosen: Sequence[tuple[Mixture, int]]) -> Iterator[None]:
    """Inside, only the chosen experts and the routers of their layers are trainable.

    Where all experts of a layer are one tensor, the whole of it requires a gradient, and a mask keeps the others' at
    exactly 0, so that an optimiser without weight decay leaves them as they are, bit by bit.
    """
    before = [(p, p.requires_grad) for p in model.parameters()]
    keep: dict[nn.Parameter, list[int]] = {}
    for p, _ in before:
        p.requires_grad_(False)
    for mixture, expert in chosen:
        mixture.router.requires_grad_(True)
        for p in mixture.weights_of(expert):
            p.requires_grad_(True)
            if mixture.stacked:
                keep.setdefault(p, []).append(expert)
    with ExitStack() as hooks:
        for p, experts in keep.items():
            hooks.callback(p.register_hook(_only(experts)).remove)
        try:
            yield
        finally:
            for p, trained in before:
                p.requires_grad_(trained)


def _only(experts: list[int]) -> Any:
    def mask(gradient: Tensor) -> Tensor:
        kept = torch.zeros_like(gradient)
        kept[experts] = gradient[experts]
        return kept

    return mask


def anchor_loss(probabilities: Tensor, experts: Sequence[int], batch: Batch) -> Tensor:
    """||g - a||^2 with a = 1 at the experts and 0 elsewhere: averaged over a row's tokens, then the step's rows.

    `probabilities` are the router's softmax at all positions, (B * T, E); padding does not count.
    """
    wanted = torch.zeros_like(probabilities)
    wanted[:, list(experts)] = 1.0
    return losses.over_rows(row_means((probabilities - wanted).square().sum(1), batch), batch)


@dataclass(eq=False)
class Anchored:
    """A method's loss with the anchor added: a `core.fit` loss."""

    found: list[Mixture]
    chosen: list[tuple[Mixture, int]]
    weight: float
    loss: Any
    start: list[Tensor]  # each forget row's experts at the start; empty where the rows are not known beforehand

    def __call__(self, model: nn.Module, batch: dict[str, Batch]) -> tuple[Tensor, dict[str, Any]]:
        """The routers are read while the loss itself runs the forget rows: no pass is made for the anchor alone."""
        rows = batch["forget"]
        seen: list[list[Routed]] = [[] for _ in self.found]
        embedding = base_of(model).get_input_embeddings()
        with ExitStack() as reading:

            def begin(module: nn.Module, inputs: Any, output: Any) -> None:
                reading.close()
                if inputs[0] is rows.input_ids and not any(seen):
                    seen[:] = reading.enter_context(routing(self.found))

            with hooked((embedding, begin)):
                returned = self.loss(model, batch)
        value, logs = returned if isinstance(returned, tuple) else (returned, {})
        number = {mixture.layer: place for place, mixture in enumerate(self.found)}
        anchor = value.new_zeros(())
        share = value.new_zeros(())
        for layer in sorted({mixture.layer for mixture, _ in self.chosen}):
            experts = [expert for mixture, expert in self.chosen if mixture.layer == layer]
            if not seen[number[layer]]:
                raise InputError(f"the loss never takes the forget records through layer {layer}, where the expert is")
            probabilities = seen[number[layer]][0].probabilities
            anchor = anchor + anchor_loss(probabilities, experts, rows)
            share = share + losses.over_rows(row_means(probabilities[:, experts].detach().sum(1), rows), rows)
        logs = {**logs, "anchor": anchor.detach(), "affinity": share}
        if self.start and all(seen):
            before = [self.start[row] for row in rows.rows.tolist()]
            logs["overlap"] = overlap(selected(seen, rows), before) * len(rows) / rows.total_rows
        return value + self.weight * anchor if self.weight else value, logs


def _start(model: nn.Module, batches: Any) -> list[Tensor]:
    """Which experts serve the rows that the batches of "forget" come from, before anything is trained."""
    source = batches.sources.get("forget") if isinstance(batches, Together) else None
    return selections(model, source.encoded) if isinstance(source, Batches) else []


def _located(found: list[Mixture], targets: Sequence[Target]) -> list[tuple[Mixture, int]]:
    by_layer = {mixture.layer: mixture for mixture in found}
    if not targets:
        raise InputError("no expert was named: targets are (layer, expert) pairs")
    for layer, expert in targets:
        if layer not in by_layer or not 0 <= expert < by_layer[layer].count:
            known = f"layers {', '.join(map(str, by_layer))} with experts 0 to {found[0].count - 1}"
            raise InputError(f"there is no expert {expert} in layer {layer}: this model has {known}")
    return [(by_layer[layer], expert) for layer, expert in dict.fromkeys(targets)]


def _check_confined(before: LM, after: LM, targets: Sequence[Target]) -> None:
    """`InputError` if anything but the targets has changed: the method does not train by one loop, or a launcher that
    cuts weights into shards (FSDP2) has lost the gradient masks."""
    allowed: dict[int, set[int] | None] = {}  # of a parameter: the experts in it that may change; None: all of it
    for mixture, expert in _located(mixtures(after.model), targets):
        allowed |= {id(p): None for p in mixture.router.parameters()}
        for p in mixture.weights_of(expert):
            if mixture.stacked:
                allowed.setdefault(id(p), set()).add(expert)  # type: ignore[union-attr]
            else:
                allowed[id(p)] = None
    old = dict(before.model.named_parameters())
    for name, p in after.model.named_parameters():
        if id(p) in allowed:
            mine = allowed[id(p)]
            others = [] if mine is None else [expert for expert in range(len(p)) if expert not in mine]
            same = all(torch.equal(p[expert], old[name][expert]) for expert in others)
        else:
            same = torch.equal(p, old[name])
        if not same:
            raise InputError(f"more than the chosen expert was trained ({name}): this method cannot be confined to one")
