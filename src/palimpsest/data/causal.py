"""Structural causal models, drawn and run many at once: where columns and target of a synthetic table come from.

After the prior of TabICL that Dong et al. 2025 (arXiv:2509.06806) train on.  A model is a layered random graph: each
layer is a random mixture of activated values of the layer before, or of small regression trees on it, plus noise.
Causal: columns and target are any of its hidden values, so that a column may be a cause of the target, an effect, or
neither.  Otherwise the columns are the causes and the target the outcome.  The paper fits its trees to random targets;
here they are drawn, with thresholds from the data.
The models of one call share their graph's size and activations; weights, noise and rows are each one's own.
Shapes: G models, N rows, K causes, H values of a layer, D columns.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

Array = np.ndarray
_WAVES = 6  # of a random Fourier function
_LARGEST = 1e4  # values are cut here: exp and square of widely spread values leave float32 otherwise


@dataclass(frozen=True)
class Shape:
    """What the models of one call have in common."""

    columns: int
    layers: int
    width: int
    causes: int
    causal: bool
    trees: bool


def shape(rng: np.random.Generator, columns: int, *, tree_share: float, deepest: int, widest: int) -> Shape:
    """A random size: up to `deepest` hidden layers, log-normal, of 4 to `widest` values; or one or two of trees."""
    if rng.random() < tree_share:
        return Shape(columns, int(rng.integers(1, 3)), int(rng.integers(3, 10)), columns, causal=False, trees=True)
    layers = int(np.clip(np.exp(rng.normal(np.log(2.5), 0.5)), 1, deepest))
    width = int(np.clip(4 + rng.exponential(8), 4, widest))
    causal = bool(rng.random() < rng.random())
    if causal:
        width = max(width, 2 * columns + 1)
    causes = int(rng.integers(1, 2 + width // 2)) if causal else columns
    return Shape(columns, layers, width, causes, causal, trees=False)


def run(rng: np.random.Generator, form: Shape, models: int, rows: int) -> tuple[Array, Array]:
    """Columns (G, N, D) and target (G, N) of `models` models of this form, float32, on scales of their own."""
    causes = _causes(rng, models, rows, form.causes)
    if form.trees:
        value = causes
        for _ in range(form.layers):
            value = _tree_layer(rng, value, form.width)
        return causes, value[..., rng.integers(form.width)]
    hidden = []
    value = causes @ _weights(rng, models, form.causes, form.width)
    noise = np.exp(rng.uniform(np.log(1e-4), np.log(0.3), (models, 1, 1))).astype(np.float32)
    for _ in range(form.layers):
        active = activated(rng, value)
        value = active @ _weights(rng, models, form.width, form.width)
        value += noise * rng.standard_normal(value.shape, dtype=np.float32)
        hidden.append(value)
    if not form.causal:
        return causes, value[..., 0]
    every = np.concatenate(hidden, axis=2)
    target = every.shape[2] - 1 - int(rng.integers(form.width if rng.random() < 0.5 else every.shape[2]))
    others = np.delete(np.arange(every.shape[2]), target)
    if rng.random() < 0.5:  # a block of neighbours, or any
        first = int(rng.integers(len(others) - form.columns + 1))
        picked = others[first : first + form.columns]
    else:
        picked = rng.permutation(others)[: form.columns]
    return every[..., picked], every[..., target]


def _causes(rng: np.random.Generator, models: int, rows: int, causes: int) -> Array:
    """(G, N, K): normal or uniform, or each column of a kind of its own; sometimes with means and scales."""
    size = (models, rows, causes)
    kind = rng.integers(3)
    if kind == 1:
        return rng.random(size, dtype=np.float32)
    drawn = rng.standard_normal(size, dtype=np.float32)
    if kind == 2:
        for column in range(causes):
            drawn[..., column] = _cause(rng, drawn[..., column])
    if rng.random() < 0.5:
        drawn *= rng.standard_normal((models, 1, causes), dtype=np.float32)
        drawn += rng.standard_normal((models, 1, causes), dtype=np.float32)
    return drawn


def _cause(rng: np.random.Generator, normal: Array) -> Array:
    kind = rng.integers(4)
    if kind == 1:
        return rng.integers(rng.integers(2, 21), size=normal.shape).astype(np.float32)
    if kind == 2:
        return np.minimum(rng.zipf(2 + 2 * rng.random(), normal.shape), 10).astype(np.float32)
    return rng.random(normal.shape, dtype=np.float32) if kind == 3 else normal


def _weights(rng: np.random.Generator, models: int, inputs: int, outputs: int) -> Array:
    """(G, inputs, outputs) normal weights of which a random share is missing: the edges of the graph."""
    weights = rng.standard_normal((models, inputs, outputs), dtype=np.float32)
    kept = 1 - 0.9 * rng.random((models, 1, 1), dtype=np.float32)
    weights *= rng.random(weights.shape, dtype=np.float32) < kept
    scale = np.sqrt(np.maximum(kept * inputs, 1))
    return weights / scale


def activated(rng: np.random.Generator, value: Array) -> Array:
    """Standardise (G, N, H) over the rows, scale and shift each model at random, and apply one random activation."""
    value = standardised(value)
    scale = np.exp(2 * rng.standard_normal((len(value), 1, 1), dtype=np.float32))
    value = (value + rng.standard_normal((len(value), 1, 1), dtype=np.float32)) * scale
    place = int(rng.integers(len(ACTIVATIONS) + 10))  # the Fourier function is ten times as likely as another
    found = ACTIVATIONS[place](value) if place < len(ACTIVATIONS) else _fourier(rng, value)
    return np.clip(found, -_LARGEST, _LARGEST)


def _fourier(rng: np.random.Generator, value: Array) -> Array:
    """A random smooth function of each model: waves whose height falls with their frequency."""
    size = (_WAVES, len(value), 1, 1)
    frequency = np.abs(rng.standard_normal(size, dtype=np.float32)) * 3
    phase = rng.random(size, dtype=np.float32) * np.float32(2 * np.pi)
    height = rng.standard_normal(size, dtype=np.float32) / (1 + frequency)
    found = np.zeros_like(value)
    for wave in range(_WAVES):
        found += height[wave] * np.sin(frequency[wave] * value + phase[wave])
    return found


ACTIVATIONS: tuple[Callable[[Array], Array], ...] = (
    np.tanh,
    lambda x: np.where(x > 0, x, np.float32(0.01) * x),  # leaky ReLU
    lambda x: np.maximum(x, 0),
    lambda x: np.clip(x, 0, 6),
    lambda x: np.where(x > 0, x, np.expm1(np.minimum(x, 0))),  # ELU
    lambda x: np.float32(1.0507) * np.where(x > 0, x, np.float32(1.6733) * np.expm1(np.minimum(x, 0))),  # SELU
    lambda x: x / (1 + np.exp(-np.clip(x, -60, 60))),  # SiLU
    lambda x: np.maximum(x, 0) + np.log1p(np.exp(-np.minimum(np.abs(x), 60))),  # softplus
    lambda x: np.clip(x, -1, 1),
    np.sign,
    lambda x: np.exp(-np.square(np.clip(x, -9, 9))),
    lambda x: np.exp(np.minimum(x, 9)),
    lambda x: np.sqrt(np.abs(x)),
    lambda x: (np.abs(x) <= 1).astype(np.float32),
    np.sin,
    np.square,
    np.abs,
    lambda x: x,
)


def _tree_layer(rng: np.random.Generator, value: Array, width: int) -> Array:
    """(G, N, H) sums of a few small regression trees: 1 + Exp(1) of them, 2 + Exp(1) deep, both at most 4."""
    depth, count = (min(4, least + int(rng.exponential(1))) for least in (2, 1))
    models, rows, inputs = value.shape
    trees = width * count
    asked = rng.integers(inputs, size=(models, trees, 2**depth - 1))
    row = rng.integers(rows, size=asked.shape)
    each = np.arange(models)[:, None, None]
    bound = value[each, row, asked]
    leaves = rng.standard_normal((models, trees, 2**depth), dtype=np.float32)
    node = np.zeros((models, trees, rows), dtype=np.int64)
    across = np.arange(rows)[None, None]
    for _ in range(depth):
        seen = value[each, across, np.take_along_axis(asked, node, 2)]
        node = 2 * node + 1 + (seen > np.take_along_axis(bound, node, 2))
    found = np.take_along_axis(leaves, node - (2**depth - 1), 2)
    return found.reshape(models, width, count, rows).sum(2).transpose(0, 2, 1)


def standardised(value: Array) -> Array:
    """Mean 0 and deviation 1 over the rows (axis 1); what does not vary becomes 0."""
    centred = value - value.mean(1, keepdims=True)
    spread = np.sqrt(np.square(centred).mean(1, keepdims=True))
    return np.where(spread > 1e-6, centred / np.maximum(spread, 1e-6), 0)
