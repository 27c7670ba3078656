from __future__ import annotations

import hashlib
import json
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from palimpsest.core.files import atomic_file, atomic_folder, sha256_file, sha256_of, write_json


def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path):
    path = tmp_path / "deep" / "value.json"
    write_json(path, {"a": 1})

    def fail_halfway() -> None:
        with atomic_file(path) as part:
            part.write_text("half")
            raise RuntimeError

    with pytest.raises(RuntimeError):
        fail_halfway()
    with pytest.raises(ValueError):
        write_json(path, math.nan)
    assert json.loads(path.read_text()) == {"a": 1}
    assert [entry.name for entry in path.parent.iterdir()] == ["value.json"]


def test_a_folder_is_replaced_whole_or_not_at_all(tmp_path):
    path = tmp_path / "run"
    for content in ("old", "new"):
        with atomic_folder(path) as part:
            (part / content).write_text(content)
    assert [entry.name for entry in path.iterdir()] == ["new"]

    def fail_halfway() -> None:
        with atomic_folder(path) as part:
            (part / "newest").write_text("half")
            raise RuntimeError

    with pytest.raises(RuntimeError):
        fail_halfway()
    assert [entry.name for entry in path.iterdir()] == ["new"]
    assert [entry.name for entry in tmp_path.iterdir()] == ["run"]


@given(st.dictionaries(st.text(), st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text()))
def test_the_hash_of_a_value_does_not_depend_on_the_order_of_keys(value):
    assert sha256_of(value) == sha256_of(dict(reversed(value.items())))


def test_hashes(tmp_path):
    (tmp_path / "file").write_bytes(b"abc")
    assert sha256_file(tmp_path / "file") == hashlib.sha256(b"abc").hexdigest()
    assert sha256_of({"b": 1, "a": "ä"}) == hashlib.sha256('{"a":"ä","b":1}'.encode()).hexdigest()
    assert sha256_of([1, 2]) != sha256_of([2, 1])


def test_a_folder_that_somebody_else_finished_first_stays(tmp_path):
    with atomic_folder(tmp_path / "entry", replace=False) as slow:
        (slow / "by").write_text("slow")
        with atomic_folder(tmp_path / "entry", replace=False) as quick:
            (quick / "by").write_text("quick")
    assert (tmp_path / "entry" / "by").read_text() == "quick"
    assert [path.name for path in tmp_path.iterdir()] == ["entry"]
