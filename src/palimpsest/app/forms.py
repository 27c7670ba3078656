"""A method's form from its dataclass, and the command-line flags from what was filled in."""

from __future__ import annotations

import dataclasses
import typing
from collections.abc import Mapping
from typing import Any

from palimpsest.core.errors import InputError
from palimpsest.core.methods import MethodInfo

ALSO_OPTIONS = ("seed", "steps", "lr", "lora_rank")  # fields that `palimpsest run` has flags for


@dataclasses.dataclass(frozen=True)
class Entry:
    """One hyper-parameter: its name, default, and the choices where only some values make sense."""

    name: str
    default: Any
    kind: str  # "bool" | "number" | "choice" | "text"
    choices: tuple[str, ...] = ()


def entries(info: MethodInfo) -> list[Entry]:
    """The hyper-parameters that a form can ask for: numbers, switches, choices and texts."""
    hints = typing.get_type_hints(info.cls)
    default = info.cls()
    found = []
    for field in dataclasses.fields(info.cls):
        if field.name in ALSO_OPTIONS:
            continue
        value, hint = getattr(default, field.name), hints[field.name]
        if typing.get_origin(hint) is typing.Literal:
            found.append(Entry(field.name, value, "choice", tuple(map(str, typing.get_args(hint)))))
        elif isinstance(value, bool):
            found.append(Entry(field.name, value, "bool"))
        elif isinstance(value, int | float):
            found.append(Entry(field.name, value, "number"))
        elif isinstance(value, str):
            found.append(Entry(field.name, value, "text"))
    return found


def settings(info: MethodInfo, values: Mapping[str, Any]) -> list[str]:
    """``--set NAME=VALUE ...`` with every value that is not the default; nothing where all are."""
    changed: list[str] = []
    for entry in entries(info):
        value = values.get(entry.name, entry.default)
        if value is None:
            raise InputError(f"{entry.name} is empty; its default is {entry.default}")
        if isinstance(entry.default, int) and not isinstance(entry.default, bool) and float(value).is_integer():
            value = int(value)
        if value != entry.default:
            changed.append(f"{entry.name}={value}")
    return ["--set", *changed] if changed else []
