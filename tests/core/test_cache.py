from __future__ import annotations

from pathlib import Path

import pytest

from palimpsest.core import cache


@pytest.fixture(autouse=True)
def empty_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("PALIMPSEST_CACHE", str(tmp_path))


def build(path: Path) -> None:
    (path / "value").write_text("built")


def read(path: Path) -> str:
    return (path / "value").read_text()


def no_build(path: Path) -> None:
    raise AssertionError("built twice")


def test_an_entry_is_built_once_for_equal_keys(tmp_path):
    assert cache.root() == tmp_path
    assert cache.cached("kind", {"a": 1, "b": 2}, build, read) == "built"
    assert cache.cached("kind", {"b": 2, "a": 1}, no_build, read) == "built"
    with pytest.raises(AssertionError):
        cache.cached("kind", {"a": 1, "b": 3}, no_build, read)
    with pytest.raises(AssertionError):
        cache.cached("other kind", {"a": 1, "b": 2}, no_build, read)


def test_a_failed_build_leaves_no_entry(tmp_path):
    def broken(path: Path) -> None:
        build(path)
        raise RuntimeError

    with pytest.raises(RuntimeError):
        cache.cached("kind", 1, broken, read)
    assert list((tmp_path / "kind").iterdir()) == []
    assert cache.cached("kind", 1, build, read) == "built"
