"""Markup in data is shown, never executed; answers carry their probabilities as numbers too."""

from __future__ import annotations

import pytest

from palimpsest.app import words
from palimpsest.app.asking import Answer
from palimpsest.app.running import Job, Step

EVIL = "<img src=x onerror=alert(1)>"


class Finished:
    def poll(self) -> int:
        return 0


@pytest.mark.parametrize(
    "shown",
    [
        words.answers({"before": Answer(((EVIL, 0.5),))}, EVIL),
        words.complaint(EVIL),
        words.framed(EVIL, EVIL),
        words.progress(Job((), Finished(), [EVIL], Step(EVIL, 1, 2, EVIL), {EVIL: [1.0, 2.0]})),  # type: ignore[arg-type]
        words.badge(EVIL),
    ],
    ids=["answers", "complaint", "framed", "progress", "badge"],
)
def test_markup_in_data_is_text(shown):
    assert EVIL not in shown
    assert "onerror=alert(1)&gt;" in shown


def test_an_answer_has_its_numbers_beside_it():
    shown = words.answers({"before": Answer((("Paris", 0.25), ("!", 1.0))), "after": Answer(())}, "Where?")
    assert "25.0%" in shown
    assert "<em>nothing</em>" in shown
    assert "<table>" in shown


def test_no_paper_is_said():
    assert "No paper fits" in words.cards([])
