"""Runs of claims kept in the cache, under all that they depend on.  Knows nothing of what a run measures."""

from __future__ import annotations

import importlib
import inspect
import json
from dataclasses import asdict
from functools import cache
from pathlib import Path
from typing import Any

import palimpsest
from palimpsest import catalog
from palimpsest.claims.processes import Run
from palimpsest.core.cache import folder
from palimpsest.core.files import atomic_folder, sha256_file, sha256_of, write_json
from palimpsest.core.methods import VERBS
from palimpsest.core.records import environment


def get(one: Run) -> dict[str, Any] | None:
    """What the run measured before, with the same code on the same kind of machine; None if it has not been."""
    path = folder("claims", _key(one)) / "run.json"
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else None


def put(one: Run, value: dict[str, Any]) -> None:
    with atomic_folder(folder("claims", _key(one))) as temporary:
        write_json(temporary / "run.json", value)


def _key(one: Run) -> dict[str, Any]:
    source = inspect.getsourcefile(importlib.import_module(one.module))
    code = {"claim": sha256_file(source or ""), "code": _code(), "version": palimpsest.__version__}
    return asdict(one) | code | _machine()


@cache
def _code() -> str:
    """Hash of every module that a claim can stand on: a changed method must not be answered from before the change."""
    home = Path(palimpsest.__file__).parent
    papers = {paper.slug for paper in catalog.papers()}
    files = [path for room in ("core", "data", "models", *VERBS) for path in (home / room).rglob("*.py")]
    files += [path for path in (home / "claims").glob("*.py") if path.stem not in papers]
    return sha256_of({str(path.relative_to(home)): sha256_file(path) for path in files})


@cache
def _machine() -> dict[str, Any]:
    return {name: value for name, value in environment().items() if name in ("processor", "device", "packages")}
