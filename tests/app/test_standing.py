"""Where papers stand: the newest result counts, bounds are read from words, every catalogue row is there."""

from __future__ import annotations

import math

import pytest

from palimpsest import catalog
from palimpsest.app.standing import NO_CLAIM, NOT_RUN, by_date, by_strength, expected, standings
from palimpsest.claims import Expect, slugs
from palimpsest.core.errors import InputError


def test_every_paper_has_a_standing_and_the_newest_result_counts(results):
    found = {one.paper.slug: one for one in standings(results)}
    assert list(found) == [paper.slug for paper in catalog.papers()]
    assert found["muse"].verdict == "fails"
    assert len(found["muse"].results) == 2
    assert found["whp"].verdict == "holds"
    assert found["cbod"].verdict == NOT_RUN
    for slug, one in found.items():
        assert one.has_claim == (slug in slugs())
        assert (one.verdict == NO_CLAIM) == (not one.has_claim)
    assert found["muse"].headline == "a - b >= 2: 3 (2 to 4)"
    assert found["knowledge_unlearning"].commands[0] == "palimpsest reproduce knowledge_unlearning"
    assert "palimpsest forget npo --help" in found["knowledge_unlearning"].commands
    assert any(command.startswith("palimpsest learn few-shot ") for command in found["susana_distancia"].commands)
    assert "palimpsest learn in-context gpicl --help" in found["gpicl"].commands
    assert found["machinelearninglm"].commands == ["palimpsest reproduce machinelearninglm"]  # for Python alone
    assert [name for name, _ in found["muse"].sources()] == ["claims/muse.py", "audit/muse.py"]


@pytest.mark.parametrize(
    ("expect", "bounds"),
    [
        (Expect("a", minus="b", at_least=0.2), (0.2, math.inf)),
        (Expect("a", at_most=-80), (-math.inf, -80)),
        (Expect("a", within=(-0.15, 0.1)), (-0.15, 0.1)),
    ],
)
def test_bounds_are_those_of_the_expectation(expect, bounds):
    outcome = {"expect": str(expect), "mean": None, "low": None, "high": None, "control": [1, 0, 2], "verdict": "fails"}
    found = expected(outcome)
    assert (found.low, found.high) == bounds
    assert math.isnan(found.measured[0])
    assert found.control == (1.0, 0, 2)


def test_orders(results):
    found = standings(results)
    assert by_strength(found)[0].paper.slug == "whp"
    dates = [(one.paper.year, one.paper.month) for one in by_date(found)]
    assert dates == sorted(dates, reverse=True)


def test_a_broken_results_file_is_named_with_its_line(results):
    results.write_text(results.read_text() + "{broken\n")
    with pytest.raises(InputError, match=r"claims\.jsonl:4: not valid JSON"):
        standings(results)


def test_without_results_nothing_has_run_but_a_file_that_is_named_must_be_there(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert {one.verdict for one in standings()} == {NOT_RUN, NO_CLAIM}
    with pytest.raises(InputError, match=r"none\.jsonl: no such file"):
        standings(tmp_path / "none.jsonl")
