from __future__ import annotations

from dataclasses import replace

import pytest

from palimpsest.audit import marks
from palimpsest.audit.exam import Sitting, Sizes, exam
from palimpsest.core.records import Measurement
from palimpsest.data.records import questions

BARE = Sizes(demonstrations=0)


@pytest.fixture
def sittings(household):
    asked = exam(BARE, household.before, household.request)
    models = {"before": household.before, "after": household.before, "reference": household.reference}
    return {name: Sitting(asked, lm) for name, lm in models.items()}


def with_after(sittings, lm):
    return {**sittings, "after": Sitting(sittings["before"].exam, lm)}


def test_an_empty_answer_scores_nothing_and_is_counted_beside(sittings, scripted):
    silent = with_after(sittings, scripted(say=lambda prompt: ""))
    found = marks.knowledge(silent, "knowledge", "forget")
    assert found.after == 0
    assert found.note == "asked without demonstrations; 8 of 8 empty, 0 more gibberish"
    asked = replace(silent["before"].exam, recitals={})
    only_questions = {name: replace(sitting, exam=asked) for name, sitting in silent.items()}
    assert marks.gibberish(only_questions, "gibberish", "forget").after == 100


def test_knowledge_is_the_mean_rouge_of_the_answers(household, sittings, scripted):
    truth = dict(questions(household.request.forget))
    right = [prompt for number, prompt in enumerate(truth) if number % 4]
    knows = with_after(sittings, scripted(say=lambda prompt: truth[prompt] if prompt in right else "wrong"))
    found = marks.knowledge(knows, "knowledge", "forget")
    assert found.after == pytest.approx(75)
    assert found.values == (0, 100, 100, 100, 0, 100, 100, 100)
    assert found.low < 75 < found.high
    assert found.better == "reference"
    assert marks.knowledge(sittings, "utility", "utility").better == "higher"


def test_leakage_is_minus_100_for_the_model_before_and_0_for_the_reference(sittings, household):
    before = marks.leakage(sittings, "min-40%")
    assert before.after == before.before == pytest.approx(-100)
    assert before.reference == 0
    assert -100 <= before.low <= before.after <= before.high < 0
    assert before.n == 16
    same = marks.leakage(with_after(sittings, household.reference), "min-40%")
    assert same.after == 0
    assert (same.low, same.high) == (0, 0)
    assert "AUC of min-40%: before 0.000" in same.note
    assert "leakage can be -100 to +" in same.note


def test_values_behind_the_leakage_average_to_it(sittings):
    found = marks.leakage(sittings, "loss")
    for mean, values in ((found.before, found.before_values), (found.reference, found.reference_values)):
        assert len(values) == 8
        assert sum(values) / 8 == pytest.approx(mean, abs=1e-9)


def test_over_scrubbing_shows_as_a_large_positive_leakage(sittings, household, scripted):
    gone = {
        prompt + completion for prompt, completion in household.before.pairs(sittings["before"].exam.members["forget"])
    }
    scrubbed = scripted(score=lambda prompt, text: [-30.0] * 40 if text in gone else [-1.0] * 40)
    found = marks.leakage(with_after(sittings, scrubbed), "min-40%")
    aucs = marks.attack_aucs(sittings)["auc"]["min-40%"]
    assert found.after == pytest.approx(100 * (1 - aucs["reference"]) / aucs["reference"])
    assert found.after > 50


def test_without_holdout_or_reference_leakage_says_what_it_needs(sittings):
    alone = {name: sitting for name, sitting in sittings.items() if name != "reference"}
    found = marks.leakage(alone, "min-40%")
    assert (found.before, found.after, found.low) == (None, None, None)
    assert found.note.startswith("Needs a reference model trained without the forget set. AUC of min-40%: before 0.000")
    blind = replace(sittings["before"].exam, members={})
    without = {name: replace(sitting, exam=blind) for name, sitting in sittings.items()}
    assert marks.leakage(without, "min-40%").note.startswith("Needs holdout records")
    assert marks.attack_aucs(without) == {}


def test_a_reference_that_remembers_is_refused(sittings, household):
    taught = {**sittings, "reference": Sitting(sittings["before"].exam, household.before)}
    found = marks.leakage(taught, "min-40%")
    assert found.after is None
    assert "Needs a reference with an AUC of at least 0.05" in found.note


def test_surprise_is_the_mean_over_records(sittings, household):
    found = marks.surprise(sittings, "forget_nll", "forget")
    assert found.after == pytest.approx(household.before.nll(household.request.forget).mean())
    assert found.reference > found.before


def test_one_record_has_no_interval(household):
    one = replace(household.request, forget=household.request.forget.select([8]))
    asked = exam(BARE, household.before, one)
    alone = {name: Sitting(asked, household.before) for name in ("before", "after")}
    found = marks.knowledge(alone, "knowledge", "forget")
    assert found.n == 1
    assert (found.low, found.high) == (None, None)
    assert isinstance(found, Measurement)


def test_what_cannot_be_asked_comes_back_with_its_need(household):
    asked = replace(exam(BARE, household.before, household.request), recitals={}, questions={}, scored={})
    nothing = {name: Sitting(asked, household.before) for name in ("before", "after")}
    found = [
        marks.verbatim(nothing, "verbatim", "forget"),
        marks.knowledge(nothing, "knowledge", "forget"),
        marks.knowledge(nothing, "retain_knowledge", "retain"),
        marks.gibberish(nothing, "gibberish", "forget"),
        marks.surprise(nothing, "utility_nll", "utility"),
    ]
    assert all(m.after is None and m.n == 0 and m.note == marks.NEEDS[m.name] for m in found)
