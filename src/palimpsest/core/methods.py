"""The registry of methods: a frozen dataclass becomes the Python API, the command, the form and the record.

A method's module registers it with the decorator; other packages join through the entry-point group
``palimpsest.methods`` (each entry names a module to import).  Knows nothing of what methods do.
"""

from __future__ import annotations

import dataclasses
import importlib
import importlib.metadata
import inspect
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

from palimpsest.core.errors import InputError, unknown

VERBS = ("curate", "pretrain", "learn", "forget", "audit")

C = TypeVar("C", bound=type)


@dataclass(frozen=True)
class MethodInfo:
    """One registered method."""

    name: str  # kebab-case: its command
    verb: str
    paper: str  # the slug of its paper
    cls: type

    @property
    def summary(self) -> str:
        """The first sentence of the method's docstring."""
        return inspect.cleandoc(self.cls.__doc__ or "").split("\n\n")[0].replace("\n", " ")

    def __call__(self, **hyper_parameters: Any) -> Any:
        known = {field.name for field in dataclasses.fields(self.cls)}
        for name in hyper_parameters:
            if name not in known:
                raise unknown(f"hyper-parameter of {self.name}", name, known)
        return self.cls(**hyper_parameters)


_registry: dict[tuple[str, str], MethodInfo] = {}
_entry_points_loaded = False


def kebab(class_name: str) -> str:
    """``GradientAscent`` -> ``gradient-ascent``, ``SimNPO`` -> ``sim-npo``, ``NPO`` -> ``npo``."""
    return re.sub(r"(?<=[a-z0-9])(?=[A-Z])|(?<=[A-Z])(?=[A-Z][a-z])", "-", class_name).lower()


def method(*, verb: str, paper: str, name: str | None = None) -> Callable[[C], C]:
    """Register a frozen dataclass as a method of `verb`, from the paper with slug `paper`."""
    if verb not in VERBS:
        raise unknown("verb", verb, VERBS)

    def register(cls: C) -> C:
        made_by: Any = getattr(cls, "__dataclass_params__", None)
        if made_by is None or not made_by.frozen:
            raise TypeError(f"{cls.__name__} must be a frozen dataclass")
        info = MethodInfo(name or kebab(cls.__name__), verb, paper, cls)
        known = _registry.get((verb, info.name))
        if known and known.cls.__qualname__ != cls.__qualname__:
            raise ValueError(f"two methods of {verb} are called {info.name}: {known.cls} and {cls}")
        _registry[verb, info.name] = info
        return cls

    return register


def all_methods(verb: str | None = None) -> list[MethodInfo]:
    """Every method (of one verb), by name.  Imports the verbs' packages and the registered third-party modules."""
    global _entry_points_loaded
    if verb is not None and verb not in VERBS:
        raise unknown("verb", verb, VERBS)
    for room in VERBS if verb is None else (verb,):
        package = importlib.import_module(f"palimpsest.{room}")
        for offered in getattr(package, "__all__", ()):  # a room may import its modules only when they are asked for
            getattr(package, offered)
    if not _entry_points_loaded:
        for entry in importlib.metadata.entry_points(group="palimpsest.methods"):
            entry.load()
        _entry_points_loaded = True
    return sorted(
        (info for info in _registry.values() if verb in (None, info.verb)), key=lambda info: (info.verb, info.name)
    )


def get(verb: str, name: str) -> MethodInfo:
    """The method of `verb` called `name`; an `InputError` with the nearest names if there is none."""
    known = {info.name: info for info in all_methods(verb)}
    wanted = name.lower().replace("_", "-")
    if wanted not in known:
        raise unknown(f"{verb} method", name, known)
    return known[wanted]


def info_of(instance: Any) -> MethodInfo:
    """The registry entry of a method instance."""
    for info in _registry.values():
        if info.cls is type(instance):
            return info
    raise InputError(f"{type(instance).__name__} is not a registered method")


def config_of(instance: Any) -> dict[str, Any]:
    """The hyper-parameters of a method instance as plain JSON-able values."""
    return dataclasses.asdict(instance)
