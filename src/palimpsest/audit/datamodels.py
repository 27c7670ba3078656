"""Datamodels as an audit: train models on random subsets, predict held-out subsets, and say how good the prediction is.

The estimators themselves (regression, TRAK) are in `core.attribution`, because unlearners stand on them too.
The number to report with any of them is the linear datamodelling score, LDS (Park et al. 2023, arXiv:2303.14186): for
each query the rank correlation, over held-out subsets, of predicted and true outputs.
Shapes: M models, N training rows, P queries.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from palimpsest.core.attribution import Datamodel, Trak, draw_subsets, group_removal, margins, regression, trak
from palimpsest.core.errors import InputError
from palimpsest.core.gradients import projected_gradients
from palimpsest.core.many import Loss, predict_many, train_many
from palimpsest.core.seeds import derive

__all__ = [
    "Datamodel",
    "Trak",
    "draw_subsets",
    "group_removal",
    "lds",
    "margins",
    "projected_gradients",
    "regression",
    "subset_outputs",
    "trak",
    "trak_of",
]

FEWEST = 20  # held-out subsets below which a rank correlation says little
_AT_ONCE = 200  # models whose weights are in memory together


def subset_outputs(
    init: Callable[[], nn.Module],
    loss: Loss,
    data: Any,
    masks: np.ndarray,
    queries: Tensor | tuple[Tensor, ...],
    *,
    seed: int = 0,
    **training: Any,
) -> Tensor:
    """Train a model on each subset, `masks` (M, N) bool, and give their outputs for the queries, (M, P, ...).

    `training` are the settings of `core.many.train_many`; the models' weights are not kept.
    """
    seeds = [derive(seed, "model", model) for model in range(len(masks))]
    parts = [slice(first, first + _AT_ONCE) for first in range(0, len(masks), _AT_ONCE)]
    trained = (train_many(init, loss, data, masks[part], seed=seeds[part], **training) for part in parts)
    return torch.cat([predict_many(many, queries) for many in trained])


def trak_of(
    models: Sequence[nn.Module],
    score: Callable[[nn.Module, Any], Tensor],
    rows: Sequence[Any],
    queries: Sequence[Any],
    *,
    dimension: int = 512,
    ridge: float = 0.1,
    seed: int = 0,
) -> Datamodel:
    """TRAK's effects of every training row on every query, (N, P), from models trained on everything.

    `rows` and `queries` are batches for ``score(model, batch)``, which gives the margin of each row's own answer, (B,).
    Each model is seen through a projection of its own.
    """
    if not models:
        raise InputError("TRAK needs at least one trained model")
    seen = []
    for number, model in enumerate(models):
        mine = derive(seed, "model", number)
        values, features = projected_gradients(model, score, rows, dimension, seed=mine)
        seen.append((features, values, projected_gradients(model, score, queries, dimension, seed=mine)[1]))
    features_M, values_M, queries_M = zip(*seen, strict=True)
    return trak(features_M, values_M, ridge).datamodel(queries_M)


def lds(predicted: Tensor | np.ndarray, observed: Tensor | np.ndarray) -> np.ndarray:
    """(P,) Spearman correlation over M held-out subsets of predicted and true outputs, both (M, P); ties share ranks.

    0 for a query whose outputs do not vary.  `InputError` for fewer than 20 subsets or values that are not finite.
    """
    from scipy.stats import rankdata

    told, true = (np.asarray(values, dtype=np.float64) for values in (predicted, observed))
    if told.shape != true.shape or told.ndim != 2:
        raise InputError(f"an LDS compares outputs (subsets, queries) of one shape, not {told.shape} and {true.shape}")
    if len(told) < FEWEST:
        raise InputError(f"an LDS needs at least {FEWEST} held-out subsets, not {len(told)}")
    if not (np.isfinite(told).all() and np.isfinite(true).all()):
        raise InputError("predictions and outputs must be finite")
    a, b = (rankdata(values, axis=0) for values in (told, true))
    a, b = a - a.mean(0), b - b.mean(0)
    lengths = np.sqrt((a**2).sum(0) * (b**2).sum(0))
    return np.divide((a * b).sum(0), lengths, out=np.zeros_like(lengths), where=lengths > 0)
