"""Tasks, and streams of them: what a learner is given, one small labelled problem at a time.

`Task(support, query, instruction, name)` is one problem: learn from the support, answer the query.  A `TaskStream`
hands out tasks by number.  Knows nothing of learners, files or models.
Shapes: M examples of a pool, C classes of it.
"""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np
import torch

from palimpsest.core.errors import InputError
from palimpsest.core.files import sha256_of
from palimpsest.core.seeds import numpy_rng


@dataclass(frozen=True)
class Examples:
    """Labelled examples of any kind.  `names[y]` is the name of a label; a label past the names is *none of them*.

    `x`: an array or tensor (M, ...), or a sequence of M things (texts, relations, rows of a table).
    Raises InputError where the lengths differ, a label is negative, or a number is NaN or infinite.
    """

    x: Any
    y: np.ndarray  # (M,) int64
    names: tuple[str, ...]
    contexts: np.ndarray | None = None  # (M,) int64: where or how an example was seen, apart from what it is

    def __post_init__(self) -> None:
        y = np.asarray(self.y)
        if y.size == 0:
            y = y.astype(np.int64)
        if y.ndim != 1 or y.dtype.kind not in "iu":
            raise InputError(f"labels must be whole numbers, one an example, not {y.dtype} of shape {y.shape}")
        object.__setattr__(self, "y", y.astype(np.int64))
        for what, value in (("labels", self.y), ("contexts", self.contexts)):
            if value is not None and len(value) != len(self.x):
                raise InputError(f"{len(self.x)} examples but {len(value)} {what}")
        if len(self.y) and self.y.min() < 0:
            raise InputError(f"example {int(self.y.argmin())} has the label {self.y.min()}; labels count from 0")
        _check_finite(self.x)

    @staticmethod
    def of(x: Any, labels: Sequence[Any] | np.ndarray, contexts: Sequence[Any] | np.ndarray | None = None) -> Examples:
        """Examples whose labels (and contexts) are names or numbers of any kind; classes are sorted by them."""
        names, y = np.unique(np.asarray(labels), return_inverse=True)
        places = None if contexts is None else np.unique(np.asarray(contexts), return_inverse=True)[1]
        return Examples(x, y.astype(np.int64), tuple(str(name) for name in names), places)

    def __len__(self) -> int:
        return len(self.y)

    @property
    def way(self) -> int:
        """How many classes have a name."""
        return len(self.names)

    @cached_property
    def sha256(self) -> str:
        """Of inputs, labels, names and contexts."""
        x = self.x.numpy() if isinstance(self.x, torch.Tensor) else self.x
        if isinstance(x, np.ndarray):
            inputs = [hashlib.sha256(np.ascontiguousarray(x).tobytes()).hexdigest(), str(x.dtype), list(x.shape)]
        else:
            inputs = [repr(value) for value in x]
        contexts = None if self.contexts is None else self.contexts.tolist()
        return sha256_of([inputs, self.y.tolist(), list(self.names), contexts])

    @property
    def counts(self) -> np.ndarray:
        """(C,) examples of each named class."""
        return np.bincount(self.y, minlength=self.way)[: self.way]

    def take(self, rows: np.ndarray | Sequence[int]) -> Examples:
        """The given rows, in that order, under the same names."""
        rows = np.asarray(rows, dtype=np.int64)
        contexts = None if self.contexts is None else self.contexts[rows]
        return replace(self, x=pick(self.x, rows), y=self.y[rows], contexts=contexts)

    def of_classes(self, names: Sequence[str]) -> Examples:
        """The examples of the named classes only, labelled in the order given; InputError for an unknown one."""
        places = {name: place for place, name in enumerate(self.names)}
        missing = [name for name in names if name not in places]
        if missing:
            raise InputError(f"no example of the class '{missing[0]}' ({len(missing)} of {len(names)} are not there)")
        new = np.full(max(self.way, int(self.y.max(initial=-1)) + 1), -1)
        new[[places[name] for name in names]] = np.arange(len(names))
        rows = np.flatnonzero(new[self.y] >= 0)
        return replace(self.take(rows), y=new[self.y[rows]], names=tuple(names))


def pick(x: Any, rows: np.ndarray) -> Any:
    """Rows of an array, a tensor (both keep their kind; `rows` of any shape) or a sequence (a list comes back)."""
    if isinstance(x, torch.Tensor):
        return x[torch.from_numpy(rows)]
    return x[rows] if isinstance(x, np.ndarray) else [x[int(row)] for row in rows]


@dataclass(frozen=True)
class Task:
    """One problem.  Labels count from 0 within the task; the label `way` marks a query of none of its classes.

    A learner adapts to `support`, `instruction` and `unlabelled`.  Of `query` it may see the inputs, one by one, and
    never the labels.
    """

    support: Examples
    query: Examples
    instruction: str = ""
    name: str = ""
    unlabelled: Any = None  # further inputs without labels, of the kind of support.x

    @property
    def way(self) -> int:
        return self.support.way

    def check(self) -> Task:
        """The task itself; InputError if there is nothing to tell apart, a class has no example, or a label no name."""
        what = self.name or "the task"
        if self.way < 2:
            raise InputError(f"{what} has {'one class' if self.way else 'no class'}: there is nothing to tell apart")
        counts = self.support.counts
        if (counts == 0).any():
            name = self.support.names[int(np.flatnonzero(counts == 0)[0])]
            raise InputError(f"{what}: the class '{name}' has no example in the support")
        for part, y, most in (("support", self.support.y, self.way - 1), ("query", self.query.y, self.way)):
            if len(y) and y.max() > most:
                found = f"example {int(y.argmax())} of the {part} has the label {y.max()}"
                raise InputError(f"{what}: {found}, which is not among the {self.way} classes of the support")
        return self


class TaskStream(ABC):
    """Tasks by number.  `len` is one pass; `task` answers any number: a finite stream begins anew, others go on."""

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def task(self, index: int) -> Task: ...

    def __iter__(self) -> Iterator[Task]:
        return (self.task(index) for index in range(len(self)))


@dataclass(frozen=True)
class Tasks(TaskStream):
    """A finite stream: the tasks of a continual protocol, a benchmark, a set of instructions."""

    tasks: tuple[Task, ...]

    def __post_init__(self) -> None:
        object.__setattr__(self, "tasks", tuple(self.tasks))
        if not self.tasks:
            raise InputError("a stream without tasks")

    def __len__(self) -> int:
        return len(self.tasks)

    def task(self, index: int) -> Task:
        return self.tasks[index % len(self.tasks)]


def split_classes(
    examples: Examples, *, train: float = 0.64, valid: float = 0.16, seed: int = 0
) -> tuple[Examples, Examples | None, Examples]:
    """Pools of disjoint classes to meta-train on, to tune on (None if `valid` is 0) and to test on.

    The shares are miniImageNet's.  Raises InputError where a part that is wanted would have fewer than 2 classes.
    """
    if not (0 < train < 1 and 0 <= valid < 1 and train + valid < 1):
        raise InputError(f"train={train} and valid={valid} must be shares that leave some classes to test on")
    order = numpy_rng(seed, "classes").permutation(examples.way)
    ends = np.round(np.cumsum([train, valid]) * examples.way).astype(int)
    parts = [np.sort(part) for part in np.split(order, ends)]
    for name, part in zip(("train", "valid", "test"), parts, strict=True):
        if len(part) < 2 and (name != "valid" or valid > 0):
            raise InputError(
                f"{examples.way} classes leave {len(part)} for {name}: wanted at least 2 (split otherwise)"
            )
    pools = [examples.of_classes([examples.names[label] for label in part]) for part in parts]
    return pools[0], pools[1] if valid > 0 else None, pools[2]


def _check_finite(x: Any) -> None:
    if isinstance(x, torch.Tensor) and x.is_floating_point():
        bad = torch.nonzero(~torch.isfinite(x.flatten(1) if x.ndim > 1 else x[:, None]).all(dim=1)).flatten().numpy()
    elif isinstance(x, np.ndarray) and x.dtype.kind == "f":
        bad = np.flatnonzero(~np.isfinite(x.reshape(len(x), -1)).all(axis=1)) if len(x) else np.empty(0)
    else:
        return
    if len(bad):
        raise InputError(f"example {int(bad[0])} has a value that is NaN or infinite ({len(bad)} such examples)")
