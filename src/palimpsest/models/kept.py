"""Models that took time to make, kept under the hash of everything that decides their weights.

A making that was interrupted leaves its checkpoints beside the store and goes on from them next time.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import palimpsest
from palimpsest.core import cache
from palimpsest.core.files import atomic_folder
from palimpsest.core.watch import Watch
from palimpsest.data.records import sha256
from palimpsest.models.train import Recipe, train

if TYPE_CHECKING:
    from datasets import Dataset

    from palimpsest.models.lm import LM


def kept(kind: str, key: Any, make: Callable[[Path], LM]) -> LM:
    """The model stored under `key` (JSON-able: all that decides it); ``make(checkpoint folder)`` if there is none.

    The versions of palimpsest and torch belong to the key: with another one the same key may make other weights.
    """
    import torch

    from palimpsest.models.lm import LM

    key = [palimpsest.__version__, torch.__version__, key]
    path = cache.folder(kind, key)
    if not path.exists():
        unfinished = cache.folder(f"{kind}-unfinished", key)
        made = make(unfinished)
        with atomic_folder(path, replace=False) as temporary:
            made.save(temporary)
        shutil.rmtree(unfinished, ignore_errors=True)
    return LM.load(path)


def trained(lm: LM, table: Dataset, recipe: Recipe, *, name: str = "training", progress: bool = True) -> LM:
    """`models.train.train`, remembered: the same start, table and recipe are trained once."""
    from dataclasses import asdict, replace

    key = [lm.sha256, sha256(table), asdict(recipe)]
    made = kept(
        "trained",
        key,
        lambda folder: train(lm, table, recipe, watch=Watch(checkpoint=folder, progress=progress), name=name),
    )
    return replace(made, source=name)
