"""The face of the verb: a learner meets many tasks, then adapts to a new one, and the result answers inputs.

    fitted    = learner.meta_fit(stream)      # once, slowly; `learner(stream)` is the same
    predictor = fitted.adapt(task)            # per task, quickly; sees the support, never the query's labels
    labels    = predictor(x)                  # numbered as in the task's support; `way` means "none of them"

A learner is a frozen dataclass under ``@method(verb="learn", paper=...)`` that derives from `Learner`.  What it learnt
is a `Fitted`, which saves itself to a folder and is read back by `load`.  Knows nothing of particular learners.
"""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from pathlib import Path
from typing import Any, ClassVar, Protocol, TypeVar, runtime_checkable

import numpy as np

from palimpsest.core import methods
from palimpsest.core.errors import InputError
from palimpsest.core.files import atomic_folder, write_json
from palimpsest.core.watch import Watch
from palimpsest.data.tasks import Task, TaskStream


class Predictor(Protocol):
    """What `adapt` returns.  Each input is answered by itself: an answer must not depend on the others."""

    def __call__(self, x: Any) -> np.ndarray:
        """(Q,) int64 labels of Q inputs of the kind of the task's support."""


@runtime_checkable
class Fitted(Protocol):
    """A learner after `meta_fit`.  `adapt` changes nothing in it."""

    @property
    def learner(self) -> Any: ...

    def adapt(self, task: Task) -> Predictor: ...

    def write(self, folder: Path) -> None:
        """Write everything but the configuration into an existing folder (safetensors and JSON)."""


F = TypeVar("F", bound=Fitted)


class Learner(ABC):
    """What every learner is.  A subclass has `meta_fit` and `read`.

    `inputs`: the kinds of `Examples.x` it takes: "features" (M, D), "images" (M, channels, height, width) or "texts".
    Texts reach a learner of features through a frozen encoder (`models.features`).
    """

    inputs: ClassVar[tuple[str, ...]] = ("features",)

    @abstractmethod
    def meta_fit(self, stream: TaskStream, *, watch: Watch | None = None) -> Any:
        """Learn from the tasks of `stream` and return a `Fitted`.  Neither the stream nor the learner is changed."""

    @abstractmethod
    def read(self, folder: Path) -> Any:
        """The `Fitted` that was written to `folder` by this configuration."""

    def __call__(self, stream: TaskStream, *, watch: Watch | None = None) -> Any:
        return self.meta_fit(stream, watch=watch)


def save(fitted: Fitted, folder: str | Path) -> Path:
    """Write what was learnt to `folder`, whole or not at all; `load` reads it back."""
    info = methods.info_of(fitted.learner)
    with atomic_folder(folder) as temporary:
        fitted.write(temporary)
        write_json(temporary / "learner.json", {"name": info.name, "config": methods.config_of(fitted.learner)})
    return Path(folder)


def load(folder: str | Path) -> Any:
    """The `Fitted` that `save` wrote.  Raises InputError for a folder without one."""
    path = Path(folder) / "learner.json"
    if not path.is_file():
        raise InputError(f"{path.parent}: no learner.json in it; wanted a folder that a learner was saved to")
    found = json.loads(path.read_text(encoding="utf-8"))
    config = {name: tuple(v) if isinstance(v, list) else v for name, v in found["config"].items()}
    return methods.get("learn", found["name"])(**config).read(path.parent)
