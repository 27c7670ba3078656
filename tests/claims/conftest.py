from __future__ import annotations

import importlib
import itertools
import textwrap

import pytest

_numbers = itertools.count()

HEAD = """
from pathlib import Path
from palimpsest.claims import Expect, claim

LOG = Path(__file__).with_suffix(".log")

def settings(**changes):
    return dict(
        paper="muse", statement="a is above b.", paper_says={"a": 1.0}, minutes=1, data="generated: two numbers",
        expectations=(Expect("a", minus="b", at_least=0.2),),
    ) | changes

def note(*words):
    with LOG.open("a") as log:
        print(*words, file=log)
"""


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("PALIMPSEST_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def write_claims(tmp_path, monkeypatch):
    """Write a module of claims to a folder that measuring processes see as well, and import it."""

    def write(body: str):
        name = f"claims_of_test_{next(_numbers)}"
        (tmp_path / f"{name}.py").write_text(HEAD + textwrap.dedent(body), encoding="utf-8")
        monkeypatch.syspath_prepend(tmp_path)
        return importlib.import_module(name)

    return write


@pytest.fixture
def paper_claims(tmp_path, monkeypatch):
    """Write modules that stand beside the package's own claims: ``paper_claims(muse=body, whp=body)``."""
    import sys

    import palimpsest.claims

    folder = tmp_path / "papers"
    folder.mkdir()
    monkeypatch.setattr(palimpsest.claims, "__path__", [str(folder), *palimpsest.claims.__path__])

    def write(**bodies: str):
        for slug, body in bodies.items():
            (folder / f"{slug}.py").write_text(HEAD + textwrap.dedent(body), encoding="utf-8")
            monkeypatch.delitem(sys.modules, f"palimpsest.claims.{slug}", raising=False)
        importlib.invalidate_caches()
        return folder

    yield write
    for path in folder.glob("*.py"):
        sys.modules.pop(f"palimpsest.claims.{path.stem}", None)
        vars(palimpsest.claims).pop(path.stem, None)
