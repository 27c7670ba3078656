"""Continual protocols: the stream that a learner meets, the accuracy matrix, and what is read from it.

- Class-incremental: the classes, in a seeded order, come in groups (tasks); each example is seen in its own group.
- Task-free (`batch_size` > 0): the same examples in small batches, whose classes change gradually where `blur` > 0:
  an example comes at its group's place plus `blur` times a normal number.  No border is told.
Accuracy is always single-head: every class met so far is a possible answer.
Shapes: T tasks, stages likewise T.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from palimpsest.core.errors import InputError
from palimpsest.core.seeds import numpy_rng
from palimpsest.core.watch import Watch
from palimpsest.data.tasks import Examples, Task, TaskStream


@dataclass(frozen=True, eq=False)
class ContinualStream(TaskStream):
    """`train` comes in the order of `order_seed`; `test` has the same classes.  Iterating gives one `Task` a group.

    Raises InputError for fewer than 2 classes or tasks, fewer classes than tasks, a class of the test that is not in
    training, a class without an example on either side.
    """

    train: Examples
    test: Examples
    tasks: int = 5
    order_seed: int = 0
    batch_size: int = 0  # 0: a task comes whole
    blur: float = 0.0  # in tasks

    def __post_init__(self) -> None:
        way = self.train.way
        if way < 2:
            raise InputError(f"{'one class' if way else 'no class'}: there is nothing to tell apart")
        if self.tasks < 2:
            raise InputError(f"a stream has at least 2 tasks, not {self.tasks}")
        if way < self.tasks:
            raise InputError(f"{self.tasks} tasks need at least {self.tasks} classes; there are {way}")
        unseen = [name for name in self.test.names if name not in self.train.names]
        if unseen:
            raise InputError(f"the class '{unseen[0]}' of the test is not among those to learn")
        if self.test.names != self.train.names:
            raise InputError("the test must have the very classes of training, in the same order")
        for what, part in (("learn from", self.train), ("test on", self.test)):
            if len(part) and part.y.max() >= way:
                raise InputError(f"example {int(part.y.argmax())} to {what} has a label without a name")
            if (part.counts == 0).any():
                raise InputError(f"the class '{part.names[int(part.counts.argmin())]}' has no example to {what}")
        if self.batch_size < 0 or self.blur < 0 or (self.blur and not self.batch_size):
            raise InputError(f"batch_size={self.batch_size}, blur={self.blur}: a blur needs batches")

    def __len__(self) -> int:
        return self.tasks

    @cached_property
    def groups(self) -> tuple[np.ndarray, ...]:
        """The labels of each task, as even in number as can be."""
        order = numpy_rng(self.order_seed, "class order").permutation(self.train.way)
        return tuple(np.array_split(order, self.tasks))

    def task(self, index: int) -> Task:
        names = [self.train.names[label] for label in self.groups[index % self.tasks]]
        return Task(self.train.of_classes(names), self.test.of_classes(names), name=f"task {index % self.tasks + 1}")

    def stages(self) -> Iterator[list[Examples]]:
        """The batches that come before each of the T measurements."""
        if not self.batch_size:
            for group in self.groups:
                yield [self.train.take(np.flatnonzero(np.isin(self.train.y, group)))]
            return
        rng = numpy_rng(self.order_seed, "arrival")
        place_of = np.empty(self.train.way)
        for place, group in enumerate(self.groups):
            place_of[group] = place
        when = place_of[self.train.y] + rng.random(len(self.train)) + self.blur * rng.normal(size=len(self.train))
        for rows in np.array_split(np.argsort(when, kind="stable"), self.tasks):
            starts = range(0, len(rows), self.batch_size)
            yield [self.train.take(rows[start : start + self.batch_size]) for start in starts]


@dataclass(frozen=True, eq=False)
class Course:
    """How a learner came through: `matrix[i, j]` is the accuracy on task j's test after stage i, in percent."""

    matrix: np.ndarray  # (T, T)
    seen: np.ndarray  # (T,) accuracy over all test examples of the classes of tasks 0 .. i, after stage i
    right: np.ndarray  # (Q,) whether each test example is answered right in the end
    memory_bytes: int
    kept_examples: int
    known: Any  # the state in the end

    @property
    def last_accuracy(self) -> float:
        """Over all test examples, after everything."""
        return float(self.seen[-1])

    @property
    def incremental_accuracy(self) -> float:
        """The mean over stages of the accuracy on the classes so far; papers quote it as well, so name which."""
        return float(self.seen.mean())

    @property
    def forgetting(self) -> float:
        """Mean over all tasks but the last of the best accuracy before minus that in the end (Chaudhry et al. 2018)."""
        return float((self.matrix[:-1, :-1].max(0) - self.matrix[-1, :-1]).mean())

    @property
    def backward_transfer(self) -> float:
        """Mean over all tasks but the last: accuracy in the end minus that just after it came (GEM, 2017)."""
        return float((self.matrix[-1, :-1] - np.diag(self.matrix)[:-1]).mean())


def run(
    learner: Any, stream: ContinualStream, *, watch: Watch | None = None, told: Callable[[str], None] | None = None
) -> Course:
    """Let a continual learner observe the stream, and measure it after each stage."""
    known = learner.start()
    task_of = np.empty(stream.test.way, dtype=np.int64)
    for place, group in enumerate(stream.groups):
        task_of[group] = place
    tasks = task_of[stream.test.y]
    names = np.array(stream.test.names, dtype=object)
    matrix, seen = np.zeros((stream.tasks, stream.tasks)), np.zeros(stream.tasks)
    right = np.zeros(len(stream.test), dtype=bool)
    for stage, batches in enumerate(stream.stages()):
        for batch in batches:
            known = known.observe(batch, watch=watch)
        answers = np.array(known.names, dtype=object)[known.classify(stream.test.x)]
        right = answers == names[stream.test.y]
        matrix[stage] = [100 * right[tasks == place].mean() for place in range(stream.tasks)]
        seen[stage] = 100 * right[tasks <= stage].mean()
        if told:
            told(f"after task {stage + 1} of {stream.tasks}: {seen[stage]:.1f}% of the classes so far")
    return Course(matrix, seen, right, known.memory_bytes, known.kept_examples, known)


def parted(examples: Examples, *, test: float = 0.25, seed: int = 0) -> tuple[Examples, Examples]:
    """Each class's examples to learn from and, a share of `test` and at least one, to test on.

    Raises InputError for a class with a single example.
    """
    if not 0 < test < 1:
        raise InputError(f"test is a share of the examples, above 0 and below 1, not {test}")
    learn, held = [], []
    for label, name in enumerate(examples.names):
        rows = np.flatnonzero(examples.y == label)
        if len(rows) < 2:
            raise InputError(f"the class '{name}' has {len(rows)} example; wanted one to learn from and one to test on")
        rows = numpy_rng(seed, "parted", name).permutation(rows)
        cut = min(len(rows) - 1, max(1, round(test * len(rows))))
        held.append(np.sort(rows[:cut]))
        learn.append(np.sort(rows[cut:]))
    return examples.take(np.concatenate(learn)), examples.take(np.concatenate(held))
