from __future__ import annotations

import pytest

from palimpsest.core import progress
from palimpsest.core.progress import Progress


@pytest.fixture
def clock(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    return now


def test_a_log_gets_a_line_a_minute(clock, capsys):
    with Progress("training", total=1000, done=100) as bar:
        for step in range(101, 301):
            clock[0] += 1.0
            bar.update(step, loss=2.0, tokens=50)
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 3
    assert lines[0] == "training: step 160/1000, loss 2, 50 tokens/s, 14 min 00 s left"


@pytest.mark.parametrize("label", ["training", ""])
def test_a_short_run_says_nothing_in_a_log(label, clock, capsys):
    with Progress(label, total=3) as bar:
        clock[0] += 100.0 if not label else 1.0
        bar.update(3, loss=1.0, tokens=3)
    assert capsys.readouterr() == ("", "")


def test_a_terminal_gets_a_bar(monkeypatch, capsys):
    monkeypatch.setattr(progress.sys.stderr, "isatty", lambda: True, raising=False)
    monkeypatch.setenv("COLUMNS", "120")
    with Progress("training", total=3) as bar:
        bar.update(3, loss=1.5, tokens=12)
    said = capsys.readouterr().err
    assert "training" in said
    assert "3/3" in said
    assert "loss 1.5" in said


@pytest.mark.parametrize(("seconds", "text"), [(5, "0 min 05 s"), (125, "2 min 05 s"), (3720, "1 h 02 min")])
def test_durations(seconds, text):
    assert progress._duration(seconds) == text
