"""palimpsest: teach a model, make it forget, and prove both."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from palimpsest import audit, curate, forget, learn, pretrain
    from palimpsest.core.errors import InputError
    from palimpsest.core.records import Evidence, Measurement
    from palimpsest.data.request import ForgetRequest
    from palimpsest.models.lm import LM

_rooms = ("audit", "curate", "forget", "learn", "pretrain")
_names = {
    "LM": "palimpsest.models.lm",
    "ForgetRequest": "palimpsest.data.request",
    "Evidence": "palimpsest.core.records",
    "Measurement": "palimpsest.core.records",
    "InputError": "palimpsest.core.errors",
}
__all__ = [
    "LM",
    "Evidence",
    "ForgetRequest",
    "InputError",
    "Measurement",
    "audit",
    "curate",
    "forget",
    "learn",
    "pretrain",
]


def __getattr__(name: str) -> Any:  # rooms are opened when they are entered, so that importing palimpsest is quick
    if name in _rooms:
        return importlib.import_module(f"palimpsest.{name}")
    if name in _names:
        return getattr(importlib.import_module(_names[name]), name)
    raise AttributeError(f"module 'palimpsest' has no attribute '{name}'")


def __dir__() -> list[str]:
    return sorted(__all__)
