"""Ordinary training on a table of records: how `run` makes the model that must forget, its reference, and experts.

Knows nothing of forgetting.  A table's documents are learned whole, its questions by their completions.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal

import torch

from palimpsest.core import losses
from palimpsest.core.errors import InputError
from palimpsest.core.seeds import derive
from palimpsest.core.watch import Watch
from palimpsest.data.batches import Batches

if TYPE_CHECKING:
    from datasets import Dataset

    from palimpsest.models.lm import LM


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """How a model is trained.  The same recipe makes the target and the reference, or the reference is none."""

    steps: int
    lr: float
    batch_size: int = 32
    warmup: int = 20
    schedule: Literal["constant", "linear", "cosine"] = "cosine"
    weight_decay: float = 0.0
    max_length: int | None = None
    seed: int = 0


def train(lm: LM, table: Dataset, recipe: Recipe, *, watch: Watch | None = None, name: str = "training") -> LM:
    """A copy of `lm` trained on `table`; `lm` itself is left as it is."""
    encoded = lm.encode(table, max_length=recipe.max_length)
    trained = lm.copy()
    (watch or Watch()).fit(
        name,
        trained.model,
        losses.nll,
        Batches(encoded, min(recipe.batch_size, len(encoded)), recipe.seed),
        main=False,
        steps=recipe.steps,
        lr=recipe.lr,
        warmup=min(recipe.warmup, recipe.steps // 2),
        schedule=recipe.schedule,
        weight_decay=recipe.weight_decay,
        seed=recipe.seed,
    )
    trained.model.eval()
    return replace(trained.to(lm.device), source=name)


def fresh(lm: LM, seed: int) -> LM:
    """A model like `lm` (configuration, tokenizer) with new random weights: those that `LM.build` draws from `seed`."""
    from transformers import AutoModelForCausalLM

    if lm.guard is not None:
        raise InputError("a guarded model cannot be trained afresh: load the model without its guard")
    config = lm.model.config
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(derive(seed, "weights"))
        model = AutoModelForCausalLM.from_config(
            config, dtype=lm.model.dtype, attn_implementation=config._attn_implementation
        )
    return replace(lm, model=model.eval(), source=f"fresh weights, seed {seed}").to(lm.device)
