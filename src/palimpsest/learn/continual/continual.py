"""What the continual learners share: batches of labelled features come one after another, and nothing is seen twice.

    known  = learner.start()            # knows no class
    known  = known.observe(examples)    # a new state; the old one is left as it was
    labels = known.classify(x)           # numbers into `known.names`: every class met so far is a possible answer

Classes are told apart by name, so any batch may bring old and new ones.  `meta_fit(stream)` observes the supports of a
stream's tasks; `adapt(task)` observes one more and answers among its classes.  All that is carried from one batch to
the next is in `tensors`, so its size is the learner's memory.  Features come from a frozen encoder, which is not ours.
Shapes: M examples, D features, C classes met.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar, Self

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from palimpsest.core.errors import InputError
from palimpsest.core.files import write_json
from palimpsest.core.watch import Watch
from palimpsest.data.tasks import Examples, Task, TaskStream
from palimpsest.learn.learner import Learner


@dataclass(frozen=True)
class ContinualLearner(Learner):
    """A learner of a stream.  A subclass has `update` and `scores`."""

    inputs: ClassVar[tuple[str, ...]] = ("features",)
    family: ClassVar[str] = "continual"
    answers_none: ClassVar[bool] = False

    normalise: bool = True  # features to length one

    def update(self, known: Known, z: Tensor, y: Tensor, watch: Watch | None) -> dict[str, Tensor]:
        """The tensors after (M, D) float64 features with (M,) labels; `known.names` has their classes already."""
        raise NotImplementedError

    def scores(self, known: Known, z: Tensor) -> Tensor:
        """(Q, C) float64, the highest is the answer."""
        raise NotImplementedError

    def start(self) -> Known:
        """The state that has met no class."""
        return Known(self)

    def meta_fit(self, stream: TaskStream, *, watch: Watch | None = None) -> Any:
        """The `Known` after the support of each task of `stream`, in order."""
        known = self.start()
        for task in stream:
            known = known.observe(task.check().support, watch=watch)
        return known

    def read(self, folder: Path) -> Known:
        spec = json.loads((folder / "known.json").read_text(encoding="utf-8"))
        tensors = load_file(folder / "known.safetensors")
        return replace(
            self.start(),
            names=tuple(spec["names"]),
            tensors=tensors,
            dimensions=spec["dimensions"],
            observed=spec["observed"],
        )


@dataclass(frozen=True, eq=False)
class Known:
    """What a continual learner knows after `observed` batches."""

    learner: Any
    names: tuple[str, ...] = ()  # of the classes met, in the order met
    tensors: dict[str, Tensor] | None = None
    dimensions: int = 0
    observed: int = 0

    def observe(self, examples: Examples, *, watch: Watch | None = None) -> Self:
        """The state after `examples`.

        Raises InputError for no example, features of another kind or size than before, a zero vector where features are
        brought to length one, and a label without a name.
        """
        if not len(examples):
            raise InputError("there is no example to observe")
        if examples.y.max() >= examples.way:
            raise InputError(f"an example has the label {examples.y.max()}; only {examples.way} classes have a name")
        z = self.features(examples.x)
        counts = examples.counts
        met = [name for name, count in zip(examples.names, counts, strict=True) if count]
        names = (*self.names, *(name for name in met if name not in set(self.names)))
        places = {name: place for place, name in enumerate(names)}
        numbers = np.array([places.get(name, -1) for name in examples.names])
        grown = replace(self, names=names, dimensions=z.shape[1], observed=self.observed + 1)
        tensors = self.learner.update(grown, z, torch.from_numpy(numbers[examples.y]), watch)
        return replace(grown, tensors=tensors)

    def features(self, x: Any) -> Tensor:
        """(M, D) float64, of length one if the learner says so."""
        z = torch.as_tensor(np.asarray(x)).double()
        if z.ndim != 2:
            raise InputError(f"wanted features (M, D), got an array of shape {tuple(z.shape)}")
        if self.dimensions and z.shape[1] != self.dimensions:
            raise InputError(f"inputs have {z.shape[1]} features; those before had {self.dimensions}")
        if not torch.isfinite(z).all():
            raise InputError("inputs have values that are NaN or infinite")
        if not self.learner.normalise:
            return z
        norms = z.norm(dim=1, keepdim=True)
        if (norms == 0).any():
            raise InputError(f"example {int(norms.argmin())} is all zeros: it has no direction (normalise=False)")
        return z / norms

    def scores(self, x: Any) -> np.ndarray:
        """(Q, C) float64.  Raises InputError before any class was met."""
        if not self.names:
            raise InputError("no class has been met yet: there is nothing to answer")
        return self.learner.scores(self, self.features(x)).numpy()

    def classify(self, x: Any) -> np.ndarray:
        """(Q,) int64 numbers into `names`."""
        return self.scores(x).argmax(1)

    def adapt(self, task: Task) -> Answers:
        """A predictor that has also observed the task's support and answers among its classes."""
        known = self.observe(task.check().support)
        return Answers(known, tuple(known.names.index(name) for name in task.support.names))

    @property
    def memory_bytes(self) -> int:
        """What is carried to the next batch, the encoder apart."""
        return sum(value.numel() * value.element_size() for value in (self.tensors or {}).values())

    @property
    def kept_examples(self) -> int:
        """How many single examples are among it."""
        return len((self.tensors or {}).get("kept_labels", ()))

    def write(self, folder: Path) -> None:
        save_file(
            {name: value.contiguous() for name, value in (self.tensors or {}).items()}, folder / "known.safetensors"
        )
        spec = {"names": list(self.names), "dimensions": self.dimensions, "observed": self.observed}
        write_json(folder / "known.json", spec)


@dataclass(frozen=True, eq=False)
class Answers:
    """A state, asked for the classes of one task only."""

    known: Known
    classes: tuple[int, ...]

    def __call__(self, x: Any) -> np.ndarray:
        return self.known.scores(x)[:, list(self.classes)].argmax(1)


def grown(value: Tensor | None, rows: int, *shape: int, kind: torch.dtype = torch.float64) -> Tensor:
    """A copy of `value` with `rows` rows, the new ones zero."""
    new = torch.zeros(rows, *shape, dtype=kind)
    if value is not None:
        new[: len(value)] = value
    return new
