"""Results that cost time, kept on disk under the hash of what they depend on.

The folder is ``$PALIMPSEST_CACHE`` or ``~/.cache/palimpsest``.  An entry is a folder that appears whole or not at all.
Knows nothing of what is stored: the caller says how to build an entry and how to read it.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from palimpsest.core.files import atomic_folder, sha256_of

T = TypeVar("T")


def root() -> Path:
    return Path(os.environ.get("PALIMPSEST_CACHE") or Path.home() / ".cache" / "palimpsest")


def folder(kind: str, key: Any) -> Path:
    """Where the entry for `key` (any JSON-able value) lies, whether or not it exists."""
    return root() / kind / sha256_of(key)[:32]


def cached(kind: str, key: Any, build: Callable[[Path], None], read: Callable[[Path], T]) -> T:
    """`read` the entry for `key`; if there is none, `build` it in a fresh folder first."""
    path = folder(kind, key)
    if not path.exists():
        with atomic_folder(path, replace=False) as temporary:
            build(temporary)
    return read(path)
