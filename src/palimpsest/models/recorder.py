"""What the attention of a Hugging Face decoder did in a pass: scores, outputs, queries; whole maps are not kept.

Knows nothing of why anybody asks.  Shapes: B rows, H heads, T tokens of the pass, K keys (with those of a cache),
D hidden units, E = H times the size of a head.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from torch import Tensor, nn

from palimpsest.core.errors import InputError
from palimpsest.models.anatomy import hooked, output_of
from palimpsest.models.attention import attention_modules, register, use_attention

NAME = "palimpsest_recorded"


@dataclass(eq=False)
class Recorder:
    """The last pass, one entry a layer."""

    scores: list[Tensor] = field(default_factory=list)  # (B, H, K): of the last token, scaled, before the softmax
    outputs: list[Tensor] = field(default_factory=list)  # (B, D): of the last token, before the residual is added
    queries: list[Tensor] = field(default_factory=list)  # (B, T, E): before rotation


@contextmanager
def recording(model: nn.Module) -> Iterator[Recorder]:
    """Inside, each pass of `model` fills the recorder anew; afterwards the model is as it was.

    Raises `InputError` for a model whose attention cannot be addressed.
    """
    modules = attention_modules(model)
    before: Any = cast(Any, model).config._attn_implementation
    recorder = Recorder()
    register(NAME, _forward)
    hooks: list[tuple[nn.Module, Callable[..., Any]]] = []
    for place, module in enumerate(modules):
        source, width = _query_source(module)
        hooks.append((source, _keep_queries(recorder, width, first=place == 0)))
        hooks.append((module, _keep_output(recorder)))
    use_attention(model, NAME)
    for module in modules:
        module.__dict__["recorder"] = recorder  # no part of the module's state
    try:
        with hooked(*hooks):
            yield recorder
    finally:
        for module in modules:
            del module.__dict__["recorder"]
        use_attention(model, before)


def _query_source(module: Any) -> tuple[nn.Module, int | None]:
    """The module whose output is the queries before rotation, and how much of its last dimension they are."""
    for name in ("q_norm", "q_proj"):
        if isinstance(getattr(module, name, None), nn.Module):
            return getattr(module, name), None
    if isinstance(getattr(module, "c_attn", None), nn.Module):
        return module.c_attn, module.split_size
    raise InputError(f"{type(module).__name__} has no query projection that can be addressed (wanted q_proj or c_attn)")


def _keep_queries(recorder: Recorder, width: int | None, *, first: bool) -> Callable[..., None]:
    def keep(module: nn.Module, inputs: Any, output: Tensor) -> None:
        if first:
            recorder.scores, recorder.outputs, recorder.queries = [], [], []
        found = output.detach().flatten(2)
        recorder.queries.append(found if width is None else found[..., :width])

    return keep


def _keep_output(recorder: Recorder) -> Callable[..., None]:
    def keep(module: nn.Module, inputs: Any, output: Any) -> None:
        recorder.outputs.append(output_of(output)[:, -1].detach())

    return keep


def _forward(
    module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **settings: Any
) -> tuple[Tensor, None]:
    """What transformers calls in the place of its own attention."""
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    scaling = settings.get("scaling")
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    with torch.no_grad():
        keys = key.repeat_interleave(query.shape[1] // key.shape[1], dim=1)
        scores = (query[:, :, -1:] @ keys.transpose(2, 3))[:, :, 0] * scale
    module.__dict__["recorder"].scores.append(scores)
    return sdpa_attention_forward(module, query, key, value, attention_mask, **settings)
