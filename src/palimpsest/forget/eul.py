"""Unlearning layers: small adapters that make a frozen model answer as if it had forgotten, and that can be fused.

Chen and Yang 2023 (EUL, arXiv:2310.20150); sheet `knowledge_unlearning`, item 10.  Needs: forget and retain records.
A bottleneck adapter after the feed-forward block of every layer learns, one epoch on the retain set and one on the
forget set in turns, to agree with the model here and to differ from it there.  The weights stay as they are: the result
is a guarded model.  Later requests train adapters of their own, and all are fused into one by a formula, without data.
Shapes: L layers, D hidden units, R bottleneck units.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from palimpsest.core import losses
from palimpsest.core.errors import InputError
from palimpsest.core.methods import method
from palimpsest.core.reference import passes, reference
from palimpsest.core.seeds import torch_rng
from palimpsest.core.watch import Watch
from palimpsest.forget.unlearn import Budget, above_zero, encode, encode_retain, not_negative, plain
from palimpsest.models.anatomy import feed_forward, hooked, layers, output_of, sharing_copy, with_output
from palimpsest.models.guard import Prepared, register_guard

if TYPE_CHECKING:
    from palimpsest.data.batches import Batch, Batches, Encoded
    from palimpsest.data.request import ForgetRequest
    from palimpsest.models.lm import LM


@method(verb="forget", paper="knowledge_unlearning")
@dataclass(frozen=True, kw_only=True)
class EUL(Budget):
    """Unlearning layers: adapters that agree with the model on the retain set and differ from it on the forget set.

    Given a model that has unlearning layers already, those of the new request are fused with them.  An epoch is a pass
    over the retain set and one over the forget set.
    """

    bottleneck: int = 16
    agree: float = 0.8  # weight of KL(model || with adapters) on the retain set
    task: float = 1.0  # weight of the likelihood of the retain set
    ascend: float = 0.2  # weight of gradient ascent on the forget set
    ridge: float = 1e-6  # of the fusion, in units of the mean diagonal entry
    lr: float = 1e-3  # adapters start from nothing; the paper's rate could not be recovered

    def __post_init__(self) -> None:
        super().__post_init__()
        above_zero(bottleneck=self.bottleneck, ridge=self.ridge)
        not_negative(agree=self.agree, task=self.task, ascend=self.ascend)
        if self.lora_rank:
            raise InputError("unlearning layers are adapters themselves: leave lora_rank at 0")

    def __call__(self, lm: LM, request: ForgetRequest, *, watch: Watch | None = None) -> LM:
        earlier = lm if isinstance(lm.guard, UnlearningLayers) else None
        base = plain(lm.with_guard(None) if earlier else lm)
        forget, retain = encode(self, base, request.forget), encode_retain(self, base, request)
        start_forget = reference(base.model, forget, base.sha256)
        start_retain = reference(base.model, retain, base.sha256)

        def loss(model: nn.Module, batch: dict[str, Batch]) -> Tensor:
            if "retain" in batch:
                rows = batch["retain"]
                return self.agree * losses.kl(model, rows, start_retain) + self.task * losses.nll(model, rows)
            rows = batch["forget"]
            return -losses.kl(model, rows, start_forget) - self.ascend * losses.nll(model, rows)

        work = sharing_copy(base.model)
        width = base.model.config.get_text_config().hidden_size
        adapters = nn.ModuleList(self._adapter(number, width) for number in range(len(layers(work))))
        work.add_module("unlearning_layers", adapters.to(base.device))
        turns = InTurns(self.batches(retain, "retain"), self.batches(forget, "forget"))
        with attached(work, adapters):
            (watch or Watch()).fit("forget", work, loss, turns, **self.training(turns.steps_per_epoch))
        if not any(bool(p.any()) for name, p in adapters.named_parameters() if name.endswith(".up")):
            raise InputError("the unlearning layers learned nothing: raise lr, steps or epochs")
        unlearned = base.with_guard(UnlearningLayers.of(work, adapters, forget))
        return fuse(earlier, unlearned, ridge=self.ridge) if earlier else unlearned

    def _adapter(self, number: int, width: int) -> Adapter:
        down = torch.randn(self.bottleneck, width + 1, generator=torch_rng(self.seed, "adapter", number)) / width**0.5
        return Adapter(down, torch.zeros(width, self.bottleneck))


class Adapter(nn.Module):
    """h -> h + up relu(down [h, 1]): does nothing while `up` is zero."""

    def __init__(self, down: Tensor, up: Tensor):
        super().__init__()
        self.down = nn.Parameter(down)  # (R, D + 1), the last column being the bias
        self.up = nn.Parameter(up)  # (D, R)

    def inner(self, hidden: Tensor) -> Tensor:
        return F.linear(hidden, self.down[:, :-1], self.down[:, -1]).relu()

    def forward(self, hidden: Tensor) -> Tensor:
        return hidden + F.linear(self.inner(hidden.to(self.down.dtype)), self.up).to(hidden.dtype)


def attached(model: nn.Module, adapters: nn.ModuleList) -> AbstractContextManager[None]:
    """Inside, every layer's feed-forward output goes through its adapter."""

    def through(adapter: nn.Module):
        return lambda module, inputs, output: with_output(output, adapter(output_of(output)))

    pairs = zip(layers(model), adapters, strict=True)
    return hooked(*((feed_forward(layer), through(adapter)) for layer, adapter in pairs))


@dataclass(frozen=True)
class InTurns:
    """One epoch of retain batches, then one of forget batches, and so on."""

    retain: Batches
    forget: Batches

    @property
    def steps_per_epoch(self) -> int:
        return self.retain.steps_per_epoch + self.forget.steps_per_epoch

    def __call__(self, step: int) -> dict[str, Batch]:
        epoch, place = divmod(step, self.steps_per_epoch)
        size = self.retain.steps_per_epoch
        if place < size:
            return {"retain": self.retain(epoch * size + place)}
        return {"forget": self.forget(epoch * self.forget.steps_per_epoch + place - size)}


@register_guard("unlearning-layers")
@dataclass(frozen=True, eq=False)
class UnlearningLayers:
    """The adapters of all layers, and the Gram matrices of their inputs on the forget set, for fusing them later."""

    down: Tensor  # (L, R, D + 1)
    up: Tensor  # (L, D, R)
    gram: Tensor  # (L, D + 1, D + 1): sum over tokens of [h, 1] [h, 1]^T
    gram_inner: Tensor  # (L, R, R): the same of the bottleneck's values

    @staticmethod
    def of(work: nn.Module, adapters: nn.ModuleList, forget: Encoded) -> UnlearningLayers:
        """Trained adapters, with the Gram matrices of the forget set's tokens in `work`."""
        trained: list[Adapter] = list(adapters)  # type: ignore[arg-type]
        width, bottleneck = trained[0].up.shape
        device = trained[0].up.device
        gram = torch.zeros(len(trained), width + 1, width + 1, device=device)
        gram_inner = torch.zeros(len(trained), bottleneck, bottleneck, device=device)
        real: Tensor

        def count(number: int, adapter: Adapter):
            def hook(module: nn.Module, inputs: Any, output: Any) -> None:
                hidden = output_of(output)[real].to(adapter.down.dtype)
                inner = adapter.inner(hidden)
                extended = torch.cat([hidden, torch.ones_like(hidden[:, :1])], dim=1)
                gram[number] += extended.T @ extended
                gram_inner[number] += inner.T @ inner

            return hook

        blocks = [feed_forward(layer) for layer in layers(work)]
        counting = hooked(*((blocks[n], count(n, adapter)) for n, adapter in enumerate(trained)))
        with losses.evaluating(work), counting, attached(work, adapters):  # counted before the adapter acts
            for _, batch in passes(work, forget):
                real = batch.attention_mask.bool()  # type: ignore[union-attr]
                work(**losses.inputs_of(batch))
        down = torch.stack([adapter.down.detach() for adapter in trained])
        up = torch.stack([adapter.up.detach() for adapter in trained])
        return UnlearningLayers(down.cpu(), up.cpu(), gram.cpu(), gram_inner.cpu())

    def prepare(self, lm: LM, prompts: Sequence[str]) -> Prepared:
        if len(layers(lm.model)) != len(self.up):
            raise InputError(f"unlearning layers for {len(self.up)} layers on a model of {len(layers(lm.model))}")
        adapters = nn.ModuleList(Adapter(down, up) for down, up in zip(self.down, self.up, strict=True)).to(lm.device)
        return Prepared(prompts, lambda rows, prompt: attached(lm.model, adapters))

    def state(self) -> tuple[dict[str, Any], dict[str, Tensor]]:
        return {}, {field.name: getattr(self, field.name) for field in fields(self)}

    @classmethod
    def restore(cls, settings: dict[str, Any], tensors: dict[str, Tensor]) -> UnlearningLayers:
        return cls(**tensors)


def fuse(*unlearned: LM, ridge: float = 1e-6) -> LM:
    """One model with the unlearning layers of several requests in one, found without any data.

    Each linear map is the least-squares fit to all of them on their own forget sets,
    W = (sum_i X_i^T X_i + ridge)^-1 sum_i X_i^T X_i W_i; only the Gram matrices X_i^T X_i are needed.  Raises
    `InputError` unless all are guarded by unlearning layers of one size over the same weights.
    """
    guards = [lm.guard for lm in unlearned]
    if not guards or not all(isinstance(guard, UnlearningLayers) for guard in guards):
        raise InputError("only models with unlearning layers (of the method eul) can be fused")
    if len({guard.up.shape for guard in guards}) > 1 or len({lm.weights_sha256 for lm in unlearned}) > 1:  # type: ignore[union-attr]
        raise InputError("only unlearning layers of one size, made for the same weights, can be fused")
    downs, ups, grams, inner_grams = (
        torch.stack([getattr(guard, name) for guard in guards]) for name in ("down", "up", "gram", "gram_inner")
    )
    return unlearned[0].with_guard(
        UnlearningLayers(
            fused_maps(downs, grams, ridge), fused_maps(ups, inner_grams, ridge), grams.sum(0), inner_grams.sum(0)
        )
    )


def fused_maps(maps: Tensor, grams: Tensor, ridge: float) -> Tensor:
    """(L, outputs, inputs): the maps (k, L, outputs, inputs) of k requests fused by their inputs' Gram matrices."""
    maps, grams = maps.double(), grams.double()
    total = grams.sum(0)
    size = total.shape[-1]
    diagonal = total.diagonal(dim1=-2, dim2=-1).mean(-1).clamp(min=torch.finfo(torch.float32).tiny)
    total = total + ridge * diagonal[:, None, None] * torch.eye(size, dtype=total.dtype)
    wanted = (grams @ maps.mT).sum(0)
    return torch.linalg.solve(total, wanted).mT.float().contiguous()
