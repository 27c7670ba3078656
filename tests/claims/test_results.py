import dataclasses
import os

import pytest
from rich.console import Console

from palimpsest.claims import results
from palimpsest.claims.results import Outcome, Result
from palimpsest.core.errors import InputError


def result(**changes):
    outcome = Outcome("a - b >= 0.2", 0.5, 0.123456789, 0.6, "BCa", "holds", (0.0, None, None), "fails")
    values = {
        "paper": "muse", "statement": "a is above b.", "paper_says": {"a": 1.0}, "seeds": (0, 1),
        "measured": {"a": (1.0, 0.5, 1.5)}, "expectations": (outcome,), "verdict": "holds", "control": "fails",
        "note": "", "seconds": 1.0, "version": "0.1.0",
        "machine": {"threads": 1, "packages": {"torch": "2.9"}}, "date": "2026-01-01T00:00:00+00:00",
    }  # fmt: skip
    return Result(**values | changes)


def text(renderable):
    console = Console(width=80, record=True, file=open(os.devnull, "w"))  # noqa: SIM115 (closed with the console)
    console.print(renderable)
    console.file.close()
    return console.export_text()


def test_lines_are_appended_and_read_back(tmp_path):
    path = tmp_path / "results" / "claims.jsonl"
    assert results.read(path) == []
    results.append(path, result())
    results.append(path, result(verdict="fails"))
    first, second = results.read(path)
    assert (first["verdict"], second["verdict"]) == ("holds", "fails")
    assert first["measured"] == {"a": [1.0, 0.5, 1.5]}
    assert first["expectations"][0]["low"] == 0.123457  # six digits
    assert first["expectations"][0]["control"] == [0.0, None, None]


def test_a_line_is_not_glued_to_one_that_was_left_open(tmp_path):
    path = tmp_path / "claims.jsonl"
    results.append(path, result())
    path.write_bytes(path.read_bytes().rstrip())
    results.append(path, result())
    assert len(results.read(path)) == 2


def test_a_full_disk_leaves_no_half_line(tmp_path, monkeypatch):
    path = tmp_path / "claims.jsonl"
    results.append(path, result())
    before = path.read_bytes()
    write = os.write
    monkeypatch.setattr(os, "write", lambda handle, data: write(handle, data[:100]))
    with pytest.raises(OSError, match="No space left"):
        results.append(path, result())
    assert path.read_bytes() == before


@pytest.mark.parametrize(
    ("line", "error"),
    [
        (b"{", "not valid JSON"),
        (b"[]", "not the result of a claim"),
        (b"{}", "not the result"),
        (b'"\xff"', "not valid JSON"),
    ],
)
def test_a_broken_line_is_named(tmp_path, line, error):
    path = tmp_path / "claims.jsonl"
    results.append(path, result())
    with path.open("ab") as handle:
        handle.write(line + b"\n")
    with pytest.raises(InputError, match=rf"claims.jsonl:2: {error}"):
        results.read(path)


def test_the_difference_names_what_can_change_a_number():
    then = result(seconds=2.0, date="2025-01-01").to_json()
    now = result(version="0.2.0", machine={"threads": 2, "packages": {"torch": "2.10", "numpy": "2"}}).to_json()
    assert results.difference(then, now) == [
        ("version", "0.1.0", "0.2.0"),
        ("machine.threads", "1", "2"),
        ("machine.packages.torch", "2.9", "2.10"),
        ("machine.packages.numpy", "-", "2"),
    ]
    assert results.difference(then, then) == []


def test_the_difference_table_shows_the_means_that_moved():
    then, now = result(verdict="fails", measured={"a": (0.25, 0, 1), "z": (1, 1, 1)}).to_json(), result().to_json()
    printed = text(results.difference_table("muse", then, now))
    assert "measured.a" in printed
    assert "0.25" in printed
    assert "verdict" in printed


def test_the_table_shows_every_expectation_with_its_control():
    broken = dataclasses.replace(result().expectations[0], mean=float("nan"), low=None, high=None)
    printed = text(
        results.table([result(note="a [note]"), result(paper="whp", expectations=(broken,))], without=["eco"])
    )
    for words in (
        "muse",
        "a - b >= 0.2",
        "0.5 (0.123 to 0.6)",
        "holds",
        "a [note]",
        "not measured",
        "no claim yet (1): eco",
    ):
        assert words in printed
    assert max(map(len, printed.splitlines())) <= 80


@pytest.mark.parametrize(("verdict", "code"), [("holds", 0), ("unclear", 0), ("untested", 0), ("fails", 1)])
def test_only_a_failed_claim_fails_the_command(verdict, code):
    assert results.exit_code([result(), result(verdict=verdict)]) == code
