"""Tasks of texts: an input, an output, and often a few outputs to choose among.

Knows nothing of tokens or models.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from palimpsest.core.errors import InputError
from palimpsest.core.files import sha256_of
from palimpsest.core.seeds import numpy_rng
from palimpsest.data import formats
from palimpsest.data.sources import find
from palimpsest.data.tasks import Task

Pair = tuple[str, str]  # an input and its output

_MOST_OPTIONS = 10  # different outputs of a task that are taken for its options, where the data do not name them


@dataclass(frozen=True)
class TextTask:
    """`examples` are pairs of input and output; `options`, where the output is one of a few.

    Raises `InputError` for a task without examples, an empty output, options that repeat, and an output that is none.
    """

    name: str
    examples: tuple[Pair, ...]
    options: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if not self.examples:
            raise InputError(f"task '{self.name}' has no demonstration")
        if len(set(self.options)) != len(self.options) or len(self.options) == 1:
            raise InputError(f"task '{self.name}': wanted two or more different options, not {list(self.options)}")
        for number, (_, output) in enumerate(self.examples):
            if not output.strip():
                raise InputError(f"task '{self.name}', example {number}: the output is empty")
            if self.options and output not in self.options:
                raise InputError(f"task '{self.name}', example {number}: {output!r:.40} is none of its options")

    @staticmethod
    def of(task: TextTask | Task) -> TextTask:
        """The support of a labelled task of texts as examples, its class names as options."""
        if isinstance(task, TextTask):
            return task
        support = task.check().support
        if not all(isinstance(text, str) for text in support.x):
            raise InputError("wanted a task of texts")
        pairs = tuple((text, support.names[label]) for text, label in zip(support.x, support.y, strict=True))
        return TextTask(task.name, pairs, tuple(support.names))

    @property
    def sha256(self) -> str:
        return sha256_of([self.name, self.examples, self.options])

    def parted(self, shots: int, seed: int = 0) -> tuple[TextTask, tuple[Pair, ...]]:
        """The task with `shots` examples drawn from its own, and all other examples."""
        if not 1 <= shots < len(self.examples):
            raise InputError(
                f"task '{self.name}' has {len(self.examples)} examples: {shots} demonstrations and a query need more"
            )
        order = numpy_rng(seed, "parted", self.name).permutation(len(self.examples))
        shown, rest = (tuple(self.examples[row] for row in part) for part in (order[:shots], order[shots:]))
        return TextTask(self.name, shown, self.options), rest


def read_tasks(source: str | Path) -> list[TextTask]:
    """Rows with `prompt`, `completion` and `task` (and `options`, a list), as tasks in the order of their names.

    Without a column `options`, a task of at most 10 different outputs, each given twice on average, chooses among them.
    Raises `InputError` naming file and line for what cannot be read.
    """
    found: dict[str, list[Pair]] = {}
    options: dict[str, dict[str, None]] = {}
    for file in find(Path(source).expanduser()):
        for place, row in formats.rows(file):
            for column in ("prompt", "completion", "task"):
                if not isinstance(row.get(column), str) or (column != "prompt" and not row[column].strip()):
                    found_there = f"{place}: '{column}' is {row.get(column)!r:.40}"
                    raise InputError(f"{found_there}; wanted the columns prompt, completion and task")
            name = row["task"]
            found.setdefault(name, []).append((row["prompt"], row["completion"]))
            given = row.get("options")
            if given:
                if not isinstance(given, list) or not all(isinstance(option, str) for option in given):
                    raise InputError(f"{place}: 'options' is {given!r:.40}; wanted a list of texts")
                options.setdefault(name, {}).update(dict.fromkeys(given))
    if not found:
        raise InputError(f"{source}: the file is empty")
    return [TextTask(name, tuple(found[name]), _options(found[name], options.get(name))) for name in sorted(found)]


def _options(pairs: Sequence[Pair], given: Any) -> tuple[str, ...]:
    if given:
        return tuple(given)
    outputs = sorted({output for _, output in pairs})
    return tuple(outputs) if 2 <= len(outputs) <= min(_MOST_OPTIONS, len(pairs) // 2) else ()


def split_tasks(tasks: Sequence[TextTask], test: float = 0.2, seed: int = 0) -> tuple[list[TextTask], list[TextTask]]:
    """Tasks to train on and to test on, at least one of each.  Raises `InputError` for a single task."""
    if len(tasks) < 2:
        raise InputError("one task: wanted some to train on and others to test on")
    order = numpy_rng(seed, "tasks").permutation(len(tasks))
    count = min(len(tasks) - 1, max(1, round(test * len(tasks))))
    held_out = set(order[:count].tolist())
    return (
        [task for number, task in enumerate(tasks) if number not in held_out],
        [task for number, task in enumerate(tasks) if number in held_out],
    )


def draw(tasks: Sequence[TextTask], shots: int, rng: np.random.Generator) -> tuple[tuple[Pair, ...], Pair]:
    """Demonstrations of a task drawn at random, and another example of it to be answered."""
    task = tasks[int(rng.integers(len(tasks)))]
    rows = rng.permutation(len(task.examples))[: shots + 1]
    return tuple(task.examples[row] for row in rows[1:]), task.examples[rows[0]]
