"""The picture of GPICL's transition and its table, from trials whose numbers are known."""

from __future__ import annotations

from xml.etree import ElementTree

import pytest

from palimpsest.core.errors import InputError
from palimpsest.learn.incontext.gpicl import Curve, Diagnosis, Trial
from palimpsest.report.incontext import rows, transition


def trial(width: int, tasks: int, unseen: float, kind: str = "transformer") -> Trial:
    diagnosis = Diagnosis(Curve((0.9, 0.9, 0.9, 0.95)), Curve((0.3, 0.3, 0.5, unseen)), chance=1 / 3)
    return Trial(kind, tasks, width, 100 * width, width, diagnosis)


TRIALS = [trial(width, tasks, 0.3 + width * tasks / 1e6) for width in (16, 64) for tasks in (16, 512, 4096)]


def test_the_picture_says_its_numbers() -> None:
    svg = transition(TRIALS, "one")
    root = ElementTree.fromstring(svg)
    description = root.find("{http://www.w3.org/2000/svg}desc")
    assert description is not None
    assert "By tasks in training, 16, 512, 2^12" in description.text
    assert "width 64 30.1, 33.3, 56.2" in description.text
    assert "width 16, seen 95.0, 95.0, 95.0" in description.text
    assert description.text.index("width 64") < description.text.index("width 16")  # the largest model first
    assert "dotted rule is at 33.3" in description.text
    assert "var(--after)" in svg
    assert "#0" not in svg  # every colour is the page's


def test_the_table_has_a_row_a_trial() -> None:
    found = rows(TRIALS)
    assert len(found) == 6
    assert found[0]["unseen, last"] == 30.0
    assert found[0]["verdict"] == "memorisation"
    assert found[-1] == {
        "model": "transformer",
        "width": 64,
        "parameters": 6400,
        "state": 64,
        "tasks": 4096,
        "seen, first": 90.0,
        "seen, last": 95.0,
        "unseen, first": 30.0,
        "unseen, last": 56.2,
        "verdict": "learning to learn",
    }


def test_kinds_are_named_where_there_are_several() -> None:
    svg = transition([trial(8, 16, 0.4), trial(8, 16, 0.5, "lstm")], "two")
    assert "lstm 8" in svg
    assert "transformer 8" in svg


def test_bad_input_is_said() -> None:
    with pytest.raises(InputError, match="no trial"):
        transition([], "none")
    with pytest.raises(InputError, match="width 64 was not trained on every number of tasks"):
        transition(TRIALS[:-1], "gap")
    with pytest.raises(InputError, match="up to 5 models, not 6"):
        transition([trial(width, 16, 0.4) for width in range(1, 7)], "many")
