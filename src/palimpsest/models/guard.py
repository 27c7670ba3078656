"""Guards: what stands in front of a model at inference time and makes it answer as if it had forgotten.

A guard may rewrite the prompts, and may change what the model does while it runs on them (hooks, per-row adapters).
The weights stay.  `LM` asks its guard whenever it answers or scores; a document is a completion of the empty prompt.
A guard is saved as ``guard.json`` (name and settings) and, if it has tensors, ``guard.safetensors``; never as a pickle.
Knows nothing of how tokens are generated or scored.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

import numpy as np
from torch import Tensor

from palimpsest.core.errors import InputError, unknown
from palimpsest.core.files import write_json

if TYPE_CHECKING:
    from palimpsest.models.lm import LM

Around = Callable[[np.ndarray, Tensor], AbstractContextManager[Any]]
"""``around(rows, prompt)`` is entered for forward passes on the given rows; see `Prepared`."""


def untouched(rows: np.ndarray, prompt: Tensor) -> AbstractContextManager[Any]:
    return nullcontext()


@dataclass(frozen=True)
class Prepared:
    """A guard's decision on N prompts, made once and used for every batch cut from them.

    `prompts` are the N prompts to use instead.  `active(rows, prompt)` is a context manager that is entered around the
    forward passes of a batch: `rows` (B,) are the numbers of its rows among the N, `prompt` (B, T) is True where a
    position of the pass holds a token of the prompt (padding, the first `<bos>` and completions are False).  While
    answers are decoded T is 1 and `prompt` is False; when rows finish, it is entered anew for the rows that are left.
    """

    prompts: Sequence[str]
    active: Around = untouched


class Guard(Protocol):
    """What a guard must offer; register the class with `register_guard` so that a saved one can be found again."""

    def prepare(self, lm: LM, prompts: Sequence[str]) -> Prepared:
        """Decide on the prompts; `lm` is the guarded model itself (use ``lm.with_guard(None)`` to ask it something)."""
        ...

    def state(self) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """JSON-able settings, and tensors."""
        ...

    @classmethod
    def restore(cls, settings: dict[str, Any], tensors: dict[str, Tensor]) -> Guard:
        """The guard whose `state` this is."""
        ...


_guards: dict[str, type[Guard]] = {}
G = TypeVar("G", bound=type)


def register_guard(name: str) -> Callable[[G], G]:
    """Make a guard's class known by `name`, the name written to ``guard.json``."""

    def register(cls: G) -> G:
        known = _guards.get(name)
        if known and known.__qualname__ != cls.__qualname__:
            raise ValueError(f"two guards are called {name}: {known} and {cls}")
        _guards[name] = cls
        return cls

    return register


def name_of(guard: Guard) -> str:
    for name, cls in _guards.items():
        if cls is type(guard):
            return name
    raise InputError(f"{type(guard).__name__} is not a registered guard, so it could not be loaded again")


def save_guard(guard: Guard, folder: str | Path) -> None:
    """Write ``guard.json`` and, if there are tensors, ``guard.safetensors`` into a folder."""
    from safetensors.torch import save_file

    settings, tensors = guard.state()
    if tensors:
        ready = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
        save_file(ready, Path(folder, "guard.safetensors"))
    write_json(Path(folder, "guard.json"), {"guard": name_of(guard), "settings": settings})


def load_guard(folder: str | Path) -> Guard | None:
    """The guard saved in a folder; None if there is none.  `InputError` if it is broken or of an unknown kind."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    path = Path(folder, "guard.json")
    if not path.exists():
        return None
    try:
        saved = json.loads(path.read_text(encoding="utf-8"))
        cls, settings = _class_of(saved["guard"]), saved["settings"]
        tensors = path.with_suffix(".safetensors")
        return cls.restore(settings, load_file(tensors) if tensors.exists() else {})
    except InputError:
        raise
    except (ValueError, TypeError, KeyError, SafetensorError) as error:
        raise InputError(f"{path}: not a saved guard ({error})") from error


def _class_of(name: str) -> type[Guard]:
    if name not in _guards:
        from palimpsest.core.methods import all_methods

        all_methods("forget")  # guards are registered where the methods that make them are
    if name not in _guards:
        raise unknown("guard", name, _guards)
    return _guards[name]


@register_guard("prompt")
@dataclass(frozen=True)
class PromptGuard:
    """Puts every prompt into a template: an instruction or demonstrations before it (in-context unlearning).

    `template` has ``{prompt}`` once where the prompt goes.  A document, whose prompt is empty, is scored after the bare
    template.  Where the whole is longer than the context, its head goes first: keep demonstrations short.
    """

    template: str

    def __post_init__(self) -> None:
        if self.template.count("{prompt}") != 1:
            raise InputError("a prompt guard's template must contain {prompt} exactly once")

    def prepare(self, lm: LM, prompts: Sequence[str]) -> Prepared:
        before, after = self.template.split("{prompt}")
        return Prepared([before + prompt + after for prompt in prompts])

    def state(self) -> tuple[dict[str, Any], dict[str, Tensor]]:
        return dataclasses.asdict(self), {}

    @classmethod
    def restore(cls, settings: dict[str, Any], tensors: dict[str, Tensor]) -> PromptGuard:
        return cls(**settings)
