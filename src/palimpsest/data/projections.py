"""Many tasks out of one small data set: its inputs through a random matrix, its labels permuted.

GPICL's task distribution (Kirsch et al. 2022, arXiv:2212.04458).
A task is an integer: matrix and permutation are drawn from it, so 2^25 tasks need no storage.
A batch is a pure function of (seed, step).  Shapes: N examples, F features of the base set, X features of a task,
B sequences, T examples a sequence, C classes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor

from palimpsest.core.errors import InputError, unknown
from palimpsest.core.seeds import derive, numpy_rng
from palimpsest.data.tasks import TaskStream

BUNDLED = ("digits", "wine", "breast-cancer", "iris")


@dataclass(frozen=True, eq=False)
class BaseSet:
    """Examples with their classes, scaled by one mean and one standard deviation over all examples and features."""

    x: Tensor  # (N, F) float32
    y: Tensor  # (N,) int64 in [0, classes)
    classes: int
    name: str = ""

    @staticmethod
    def of(x: np.ndarray | Tensor, y: np.ndarray | Tensor, *, per_feature: bool = False, name: str = "") -> BaseSet:
        """Scale and number the classes.  `per_feature`: for tables, whose columns have units of their own.

        Raises `InputError` for values that are not finite (naming row and column), sizes that do not match, fewer than
        two classes, or inputs that are all equal.
        """
        inputs = np.asarray(x, dtype=np.float64).reshape(len(x), -1)
        labels = np.asarray(y).reshape(-1)
        if len(inputs) != len(labels):
            raise InputError(f"{len(inputs)} inputs but {len(labels)} labels")
        if not np.isfinite(inputs).all():
            row, column = np.argwhere(~np.isfinite(inputs))[0]
            raise InputError(f"row {row}, column {column} of the inputs is NaN or infinite")
        known, numbered = np.unique(labels, return_inverse=True)
        if len(known) < 2:
            raise InputError(f"a base set needs at least 2 classes, not {len(known)}")
        spread = inputs.std(0) if per_feature else inputs.std()
        if not np.any(spread):
            raise InputError("all inputs are equal: there is nothing to learn from")
        scaled = (inputs - (inputs.mean(0) if per_feature else inputs.mean())) / np.where(spread > 0, spread, 1.0)
        return BaseSet(torch.tensor(scaled, dtype=torch.float32), torch.tensor(numbered), len(known), name)

    @staticmethod
    def bundled(name: str) -> BaseSet:
        """One of scikit-learn's own sets: ``digits`` (8 x 8 images), ``wine``, ``breast-cancer``, ``iris``."""
        from sklearn import datasets

        if name not in BUNDLED:
            raise unknown("bundled data set", name, BUNDLED)
        x, y = getattr(datasets, f"load_{name.replace('-', '_')}")(return_X_y=True)
        return BaseSet.of(x, y, per_feature=name != "digits", name=name)

    def only(self, classes: Sequence[int]) -> BaseSet:
        """The examples of the given classes, numbered anew in that order."""
        places = [torch.nonzero(self.y == one)[:, 0] for one in classes]
        y = torch.cat([torch.full((len(rows),), number) for number, rows in enumerate(places)])
        return BaseSet(self.x[torch.cat(places)], y, len(classes), self.name)

    def split(self, share: float, seed: int = 0) -> tuple[BaseSet, BaseSet]:
        """Two parts, the first with `share` of the examples, the classes mixed."""
        order = torch.from_numpy(numpy_rng(seed, "split").permutation(len(self.y)))
        cut = round(share * len(order))
        first, second = order[:cut], order[cut:]
        return (
            BaseSet(self.x[first], self.y[first], self.classes, self.name),
            BaseSet(self.x[second], self.y[second], self.classes, self.name),
        )


@dataclass(frozen=True, eq=False)
class Projections:
    """A stream of few-shot classification tasks; ``stream(step)`` gives x (B, T, X), y (B, T) and task (B,).

    `tasks` is how many different ones there are, numbered from `first`: streams with other numbers share none.
    `bias`: the share of each batch whose labels are permuted as in task 0 of `seed`, whatever its number (the paper's
    way off the loss plateau); 0 for evaluation, always.  `classes`: labels that a task may use, 0 for the base's own.
    """

    base: BaseSet
    tasks: int
    features: int = 32
    length: int = 32
    batch_size: int = 32
    bias: float = 0.0
    first: int = 0
    classes: int = 0
    seed: int = 0

    def __post_init__(self) -> None:
        if self.tasks < 1 or self.features < 1 or self.length < 1 or self.batch_size < 1:
            raise InputError("tasks, features, length and batch_size must be at least 1")
        if not 0 <= self.bias <= 1:
            raise InputError(f"bias is a share of the batch, between 0 and 1, not {self.bias}")
        if self.classes and self.classes < self.base.classes:
            raise InputError(
                f"{self.base.name or 'the base set'} has {self.base.classes} classes, more than {self.classes}"
            )

    @property
    def labels(self) -> int:
        """How many different labels there are."""
        return self.classes or self.base.classes

    def transform(self, task: int) -> tuple[Tensor, Tensor]:
        """The matrix (X, F) and the permutation (C,) of a task."""
        return transform(self.base.x.shape[1], self.features, self.labels, derive(self.seed, "task", task))

    def __call__(self, step: int) -> dict[str, Tensor]:
        rng = numpy_rng(self.seed, "batch", self.first, step)
        numbers = self.first + rng.integers(self.tasks, size=self.batch_size)
        drawn = [self.transform(int(number)) for number in numbers]
        matrices = torch.stack([matrix for matrix, _ in drawn])
        permutations = torch.stack([permutation for _, permutation in drawn])
        biased = round(self.bias * self.batch_size)
        if biased:
            permutations[:biased] = self.transform(0)[1]
        rows = torch.from_numpy(rng.integers(len(self.base.y), size=(self.batch_size, self.length)))
        return {
            "x": self.base.x[rows] @ matrices.transpose(1, 2),
            "y": permutations.gather(1, self.base.y[rows]),
            "task": torch.from_numpy(numbers),
        }


@dataclass(frozen=True, eq=False)
class ProjectedTasks:
    """Sequences made of any stream's tasks: each task's examples shuffled, projected anew and relabelled.

    For a task of fewer examples than `length` some come more than once; queries of none of its classes are left out.
    """

    stream: TaskStream
    features: int
    length: int
    batch_size: int
    seed: int = 0

    @cached_property
    def labels(self) -> int:
        return max(2, self.stream.task(0).way)

    def __call__(self, step: int) -> dict[str, Tensor]:
        numbers = range(step * self.batch_size, (step + 1) * self.batch_size)
        x, y = zip(*map(self._sequence, numbers), strict=True)
        return {"x": torch.stack(x), "y": torch.stack(y), "task": torch.tensor(numbers)}

    def _sequence(self, number: int) -> tuple[Tensor, Tensor]:
        task = self.stream.task(number)
        if task.way > self.labels:
            raise InputError(f"task {number} has {task.way} classes, the first one {self.labels}: order them by size")
        x = torch.cat([scaled(part, task.support.x) for part in (task.support.x, task.query.x)])
        y = torch.from_numpy(np.concatenate([task.support.y, task.query.y]))
        x, y = x[y < task.way], y[y < task.way]
        rng = numpy_rng(self.seed, "sequence", number)
        rows = torch.from_numpy(rng.choice(len(y), self.length, replace=len(y) < self.length))
        matrix, permutation = transform(x.shape[1], self.features, self.labels, derive(self.seed, "task", number))
        return x[rows] @ matrix.T, permutation[y[rows]]


def transform(width: int, features: int, labels: int, seed: int) -> tuple[Tensor, Tensor]:
    """A random matrix (features, width) and a permutation (labels,); the matrix keeps the variance of its inputs."""
    generator = torch.Generator().manual_seed(seed)
    matrix = torch.randn(features, width, generator=generator) / width**0.5
    return matrix, torch.randperm(labels, generator=generator)


def scaled(x: Any, support: Any) -> Tensor:
    """(n, F) float32 inputs, shifted and scaled by the one mean and standard deviation of the (m, F) support.

    Raises `InputError` for inputs of another shape, for those that are not finite, and for a support without spread.
    """
    inputs, known = (torch.as_tensor(np.asarray(part), dtype=torch.float32) for part in (x, support))
    if inputs.ndim != 2 or known.ndim != 2 or inputs.shape[1] != known.shape[1]:
        raise InputError(f"inputs must be (rows, features) like the support, not {tuple(inputs.shape)}")
    if not torch.isfinite(inputs).all():
        row, column = (~torch.isfinite(inputs)).nonzero()[0].tolist()
        raise InputError(f"row {row}, column {column} is NaN or infinite")
    spread = known.std(correction=0)
    if not spread > 0:
        raise InputError("all numbers of the support are equal: there is nothing to learn from")
    return (inputs - known.mean()) / spread
