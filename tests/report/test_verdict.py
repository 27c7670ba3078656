from dataclasses import replace

import pytest

from palimpsest.core.records import Evidence, Measurement
from palimpsest.report.verdict import RULE, reading, verdict


def evidence_of(*measurements: Measurement, kind: str = "forget") -> Evidence:
    return Evidence(kind, measurements, {"name": "x"}, {}, {}, environment={})


def test_forgotten_kept_and_private(make_evidence):
    found = verdict(make_evidence())
    assert found.level == "good"
    assert found.headline == "Forgotten, and the rest is kept"
    told = " ".join(found.sentences)
    assert "Knowledge of the forget set went from 96.3 to 21.4" in told
    assert "within the reference's interval" in told
    assert "93% is kept" in told


def test_destroyed_utility_is_said_first_however_good_the_rest_looks(make_evidence):
    found = verdict(make_evidence(knowledge=0.0, verbatim=0.0, utility=2.0, leakage=(1.0, -9.0, 9.0)))
    assert found.level == "bad"
    assert found.headline == "Utility destroyed"
    assert any("say nothing about forgetting" in sentence for sentence in found.sentences)


def test_gibberish_counts_as_destroyed_even_at_kept_utility(make_evidence):
    found = verdict(make_evidence(gibberish=80.0))
    assert found.headline == "Utility destroyed"
    assert any("80% of its answers are gibberish" in sentence for sentence in found.sentences)


def test_gibberish_about_the_forget_set_is_no_clean_forgetting(make_evidence):
    found = verdict(make_evidence(forget_gibberish=90.0))
    assert found.level == "mixed"
    assert "words about the forget set are gibberish" in found.headline
    assert any("90% of what it says about the forget set is gibberish" in sentence for sentence in found.sentences)


def test_what_was_broken_or_unknown_before_is_not_put_down_to_forgetting(make_evidence):
    evidence = make_evidence(gibberish=100.0)
    babbling = tuple(replace(m, before=100.0) if m.name == "utility_gibberish" else m for m in evidence.measurements)
    assert verdict(replace(evidence, measurements=babbling)).headline == "Forgotten, and the rest is kept"
    memories = {"knowledge": 19.8, "verbatim": 26.3}
    ignorant = tuple(replace(m, before=memories.get(m.name, m.before)) for m in make_evidence().measurements)
    found = verdict(replace(evidence, measurements=ignorant))
    assert found.level == "unknown"
    assert found.headline.startswith("There was nothing to forget")


def test_courses_of_requests_are_never_taken_for_utility():
    verbatim = Measurement("verbatim", "forget", 99.0, 20.0, 21.0, 17.0, 24.0, 50, "reference")
    course = Measurement("sustainability", "utility", 90.0, 10.0, None, 5.0, 15.0, 50, "higher")
    found = verdict(evidence_of(verbatim, course))
    assert found.headline == "Forgotten; what it cost was not measured"
    assert any(
        "After the last of the successive requests, utility is 10.0, 11% of before" in s for s in found.sentences
    )


def test_not_forgotten_says_by_how_much(make_evidence):
    found = verdict(make_evidence(knowledge=48.0))
    assert found.level == "bad"
    assert found.headline == "Not forgotten: knowledge of the forget set is 28.2 above the reference"
    assert any("still 28.2 above the reference" in sentence for sentence in found.sentences)


def test_past_the_reference_is_forgotten_and_said_so(make_evidence):
    found = verdict(make_evidence(knowledge=1.0, verbatim=2.0))
    assert found.headline.startswith("Forgotten")
    assert any("18.8 below it, past what a model that never saw them shows" in sentence for sentence in found.sentences)


@pytest.mark.parametrize(
    ("leakage", "headline", "told"),
    [
        ((-60.0, -80.0, -40.0), "an outsider can tell", "were trained on"),
        ((44.0, 30.0, 58.0), "an outsider can tell", "suspiciously unknown"),
        ((3.0, -40.0, 46.0), "privacy is undecided", "too wide"),
        (None, "privacy was not measured", "Needs a reference model"),
    ],
)
def test_privacy_makes_the_difference_between_good_and_mixed(make_evidence, leakage, headline, told):
    found = verdict(make_evidence(leakage=leakage))
    assert found.level == "mixed"
    assert headline in found.headline
    assert any(told in sentence for sentence in found.sentences)


def test_a_cost_is_named(make_evidence):
    found = verdict(make_evidence(utility=70.0))
    assert (found.level, found.headline) == ("mixed", "Forgotten, at a cost: 74% of utility is kept")


def test_without_a_reference_it_says_what_cannot_be_said(make_evidence):
    found = verdict(make_evidence(reference=False))
    assert found.level == "unknown"
    assert "needs a reference" in found.headline
    assert any(sentence.startswith("No reference model was given") for sentence in found.sentences)


def test_nothing_forgotten_with_and_without_a_reference(make_evidence):
    for reference in (True, False):
        found = verdict(make_evidence(knowledge=96.3, verbatim=99.2, utility=95.1, reference=reference))
        assert (found.level, found.headline) == ("bad", "Nothing was forgotten")


def test_missing_numbers_never_count_as_success():
    nothing = evidence_of(Measurement("knowledge", "forget", 90.0, None, better="reference", note="Needs questions."))
    found = verdict(nothing)
    assert found.level == "unknown"
    assert found.headline == "Forgetting was not measured"
    assert any("Needs questions." in sentence for sentence in found.sentences)
    costless = evidence_of(Measurement("knowledge", "forget", 90.0, 20.0, 21.0, 17.0, 24.0, 50, "reference"))
    assert verdict(costless).headline == "Forgotten; what it cost was not measured"
    broken = evidence_of(replace(costless.measurements[0], after=float("nan")))
    assert verdict(broken).level == "unknown"


def test_a_low_loss_is_memory_too():
    """A score that is low when remembered is judged from the side where it was before."""
    familiar = Measurement("forget_nll", "forget", 0.1, 0.5, 3.0, 0.4, 0.6, 50, "reference")
    assert verdict(evidence_of(familiar)).headline.startswith("Not forgotten: surprise at the forget set is 2.50 below")
    beyond = replace(familiar, after=9.0, low=8.0, high=10.0)
    assert verdict(evidence_of(beyond)).headline.startswith("Forgotten")


def test_texts_without_questions_are_judged_by_likelihood():
    verbatim = Measurement("verbatim", "forget", 99.0, 20.0, 21.0, 17.0, 24.0, 50, "reference")
    for after, headline in ((1.05, "Forgotten, and"), (1.4, "at a cost: 67%"), (3.0, "Utility destroyed")):
        loss = Measurement("utility_nll", "utility", 1.0, after, 1.0, after - 0.1, after + 0.1, 50, "lower")
        assert headline in verdict(evidence_of(verbatim, loss)).headline


def test_other_verbs_get_a_plain_verdict():
    better = Measurement("accuracy", "task", 0.5, 0.8, None, 0.7, 0.9, 40, "higher")
    worse = Measurement("loss", "task", 0.5, 0.8, None, 0.7, 0.9, 40, "lower")
    same = Measurement("error", "task", 0.5, 0.5, None, 0.4, 0.6, 40, "lower")
    assert verdict(evidence_of(better, kind="learn")).level == "good"
    assert verdict(evidence_of(worse, kind="learn")).level == "bad"
    assert verdict(evidence_of(better, worse, kind="learn")).level == "mixed"
    assert verdict(evidence_of(same, kind="learn")).headline == "No change shown"
    assert verdict(evidence_of(kind="learn")).headline == "Nothing was measured"


def test_readings(make_evidence):
    evidence = make_evidence(knowledge=48.0)
    assert reading(evidence["knowledge"]) == "28.2 above the reference"
    assert reading(evidence["verbatim"]) == "within the reference's interval"
    assert reading(evidence["utility"]) == "93% of before"
    assert reading(evidence["privacy_leakage"]) == "zero lies in the interval"
    assert reading(evidence["utility_nll"]) == "worse than before"
    assert reading(replace(evidence["utility"], after=None)) == "not measured"


def test_the_printed_rule_names_the_limits_it_uses():
    told = " ".join(RULE)
    assert all(limit in told for limit in ("90%", "50%", "25%", "95%"))
