"""Copies of a model to be trained, whole or through fresh LoRA factors, and what becomes of them when they are done.

Knows nothing of what they are trained for.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from torch import nn

from palimpsest.core.errors import InputError
from palimpsest.core.seeds import seed_everything
from palimpsest.models.anatomy import own_weights, same_weights, sharing_copy

if TYPE_CHECKING:
    from palimpsest.models.lm import LM


def trainable_copy(
    lm: LM,
    *,
    rank: int = 0,
    alpha: float = 0.0,
    dropout: float = 0.0,
    matrices: Sequence[str] = (),
    seed: int = 0,
) -> nn.Module:
    """A float32 copy of a model without an adapter, every weight trainable.

    With a `rank`, fresh LoRA factors instead, on the `matrices` whose names end so (none: on all of its layers), scaled
    by alpha / rank: the weights under them are `lm`'s own.
    """
    if rank == 0:
        return lm.copy().model.float().requires_grad_(True)
    from peft import LoraConfig, get_peft_model
    from transformers.pytorch_utils import Conv1D

    model = sharing_copy(lm.model)
    seed_everything(seed, "lora")
    adapter = LoraConfig(
        r=rank,
        lora_alpha=alpha,  # type: ignore[arg-type]  # any number works
        lora_dropout=dropout,
        target_modules=list(matrices) or "all-linear",
        fan_in_fan_out=any(isinstance(module, Conv1D) for module in model.modules()),
        task_type="CAUSAL_LM",
    )
    with warnings.catch_warnings():  # peft 0.21 reads an attribute that transformers 5.24 has deprecated
        warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated", FutureWarning)
        return get_peft_model(model, adapter)


def finished(lm: LM, work: nn.Module) -> LM:
    """The trained copy as an `LM`: adapters merged, on the device and in the precision of the starting model."""
    model: Any = work
    if hasattr(work, "peft_config"):
        model = work.merge_and_unload(safe_merge=True)  # type: ignore[operator]  # safe: not into shared memory
        own_weights(model, lm.model)
    kinds = {name: p.dtype for name, p in lm.model.named_parameters()}
    for name, p in model.named_parameters():
        p.data = p.data.to(kinds[name])
    model = model.to(lm.device).requires_grad_(True).eval()
    if same_weights(model, lm.model):
        raise InputError("the method changed no weight: raise lr, steps or epochs")
    return lm.with_model(model)


def check_vocabulary(one: LM, other: LM) -> None:
    """Raise `InputError` unless two models read the same tokens."""
    if one.tokenizer.get_vocab() != other.tokenizer.get_vocab():
        raise InputError(f"the models {one.source or 'one'} and {other.source or 'other'} have different vocabularies")
