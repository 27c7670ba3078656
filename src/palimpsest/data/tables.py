"""Synthetic classification tables without end, for learners that read a table in their context.

A table comes from a random structural causal model (data/causal.py); its target is cut into classes at values drawn
from the data or from a normal distribution, some columns become categories, and rows are parted into a labelled context
and queries.  After the prior of Dong et al. 2025 (arXiv:2509.06806) and TabICL; smaller graphs by default.
``stream(step)`` is a pure function of (seed, step).  Tables are made in blocks of several steps, which share their
number of shots.  Shapes: B tables, N rows (S shots, then Q queries), F columns (absent ones are 0).
"""

from __future__ import annotations

import math
from collections import OrderedDict
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
import torch

from palimpsest.core.errors import InputError
from palimpsest.core.files import sha256_of
from palimpsest.core.seeds import numpy_rng
from palimpsest.data import causal

IGNORE = -100
_LEVELS = 20  # most categories of a column
_KEPT = 2  # blocks in memory


@dataclass(frozen=True)
class TablePrior:
    """What tables are like.  The paper's are 5 to 50 columns wide, with graphs of up to 130 values a layer."""

    columns: tuple[int, int] = (2, 10)
    classes: tuple[int, int] = (2, 10)
    tree_share: float = 0.3
    categorical: float = 0.2  # share of tables in which some columns are categories
    deepest: int = 6
    widest: int = 32

    def __post_init__(self) -> None:
        for name, least in (("columns", 1), ("classes", 2)):
            low, high = getattr(self, name)
            if not least <= low <= high:
                raise InputError(f"{name} must be two numbers from {least} up, the smaller first, not {low} and {high}")


@dataclass(frozen=True)
class Tables:
    """``tables(step)`` gives x (B, N, F) float32, y (B, N) int64, present (B, F) bool and the number of shots.

    Columns have mean 0 and deviation 1.  A query of a class that no shot shows is labelled `IGNORE`; the paper
    reshuffles up to ten times instead.  Shots are log-uniform between the bounds, one number for a block of steps.
    """

    prior: TablePrior = TablePrior()
    shots: tuple[int, int] = (8, 64)
    queries: int = 24
    batch_size: int = 16
    seed: int = 0
    block: int = 8  # steps whose tables are made together
    group: int = 16  # tables whose causal models have the same size and activations
    shuffled: bool = False  # labels without any relation to the columns: the negative control
    _blocks: OrderedDict[int, dict[str, Any]] = field(
        default_factory=OrderedDict, init=False, repr=False, compare=False
    )

    def __post_init__(self) -> None:
        if not 2 <= self.shots[0] <= self.shots[1]:
            raise InputError(f"shots must be two numbers from 2 up, the smaller first, not {self.shots}")
        if min(self.queries, self.batch_size, self.block, self.group) < 1:
            raise InputError("queries, batch_size, block and group must be at least 1")

    @property
    def features(self) -> int:
        return self.prior.columns[1]

    @property
    def labels(self) -> int:
        return self.prior.classes[1]

    @property
    def sha256(self) -> str:
        """Of the settings, which decide every table."""
        return sha256_of({name: value for name, value in asdict(self).items() if name != "_blocks"})

    def __call__(self, step: int) -> dict[str, Any]:
        number, place = divmod(step, self.block)
        block = self._blocks.get(number)
        if block is None:
            block = self._blocks[number] = self._make(number)
            while len(self._blocks) > _KEPT:
                self._blocks.popitem(last=False)
        rows = slice(place * self.batch_size, (place + 1) * self.batch_size)
        return {name: value if isinstance(value, int) else value[rows] for name, value in block.items()}

    def _make(self, number: int) -> dict[str, Any]:
        wanted = self.block * self.batch_size
        rng = numpy_rng(self.seed, "tables", number)
        low, high = (math.log(bound) for bound in self.shots)
        shots = min(self.shots[1], max(self.shots[0], round(math.exp(rng.uniform(low, high)))))
        found: list[tuple[np.ndarray, ...]] = []
        while sum(len(part[1]) for part in found) < wanted:
            found.append(tables(rng, self.prior, self.group, shots + self.queries, shots))
        x, y, present = (np.concatenate(parts) for parts in zip(*found, strict=True))
        order = rng.permutation(len(y))[:wanted]  # groups spread over the steps
        y = y[order]
        if self.shuffled:
            y = np.concatenate([rng.permuted(part, axis=1) for part in (y[:, :shots], y[:, shots:])], axis=1)
        y[:, shots:][~seen(y, shots)] = IGNORE
        parts = {"x": x[order], "y": y, "present": present[order]}
        return {name: torch.from_numpy(part) for name, part in parts.items()} | {"shots": shots}


def tables(
    rng: np.random.Generator, prior: TablePrior, count: int, rows: int, shots: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """At most `count` tables of one causal form: x (B, N, F) float32, y (B, N) int64, present (B, F).

    Tables whose first `shots` rows are of one class are left out.
    """
    columns = int(rng.integers(prior.columns[0], prior.columns[1] + 1))
    form = causal.shape(rng, columns, tree_share=prior.tree_share, deepest=prior.deepest, widest=prior.widest)
    x, target = causal.run(rng, form, count, rows)
    y = classes_of(rng, target, prior.classes)
    good = (y[:, :shots] != y[:, :1]).any(1)
    x, y = x[good], y[good]
    x = np.clip(causal.standardised(x), -4, 4)
    x = causal.standardised(with_categories(rng, x, prior.categorical))
    x = x[..., rng.permutation(columns)]
    wide = np.zeros((len(x), rows, prior.columns[1]), dtype=np.float32)
    wide[..., :columns] = x
    present = (wide != 0).any(1)
    some = present.any(1)
    return wide[some], y[some], present[some]


def classes_of(rng: np.random.Generator, target: np.ndarray, classes: tuple[int, int]) -> np.ndarray:
    """(G, N) targets cut into classes numbered at random, int64; two with probability one half, if two are allowed.

    A target's boundaries are drawn from its own values, or from a normal distribution once it is standardised.
    """
    models, rows = target.shape
    low, most = classes
    target = causal.standardised(target)
    count: np.ndarray = rng.integers(low, most + 1, size=(models,))
    if low == 2:
        count[rng.random(models) < 0.5] = 2
    own = np.take_along_axis(target, rng.integers(rows, size=(models, most - 1)), 1)
    normal = rng.standard_normal((models, most - 1), dtype=np.float32)
    bounds = np.where(rng.random((models, 1)) < 0.5, own, normal)
    bounds[np.arange(most - 1)[None] >= count[:, None] - 1] = np.inf
    y = (target[..., None] > bounds[:, None]).sum(-1)
    keys = rng.random((models, most))
    keys[np.arange(most)[None] >= count[:, None]] = np.inf
    return np.take_along_axis(keys.argsort(1), y, 1)


def with_categories(rng: np.random.Generator, x: np.ndarray, share: float) -> np.ndarray:
    """(G, N, D) with a random part of the columns of a `share` of the tables as categories, coded in no order.

    The number of levels is 2 and more, Gamma(1, 10) distributed, at most 20.
    """
    chosen = (rng.random(len(x)) < share)[:, None] & (rng.random((len(x), x.shape[2])) < rng.random((len(x), 1)))
    table, column = np.nonzero(chosen)
    if not len(table):
        return x
    values = x[table, :, column]  # (P, N)
    levels = np.clip(np.ceil(rng.gamma(1, 10, len(table))), 2, _LEVELS)
    bounds = np.take_along_axis(values, rng.integers(values.shape[1], size=(len(table), _LEVELS - 1)), 1)
    bounds[np.arange(_LEVELS - 1)[None] >= levels[:, None] - 1] = np.inf
    codes = (values[..., None] > bounds[:, None]).sum(-1)
    names = rng.random((len(table), _LEVELS)).argsort(1)
    x = x.copy()
    x[table, :, column] = np.take_along_axis(names, codes, 1)
    return x


def seen(y: np.ndarray, shots: int) -> np.ndarray:
    """(B, Q): whether the class of each row after the first `shots` is among these."""
    return (y[:, shots:, None] == y[:, None, :shots]).any(2)
