import csv
from dataclasses import replace

import numpy as np
import pytest

from palimpsest.core.errors import InputError
from palimpsest.core.records import Evidence, Measurement
from palimpsest.report import compare as module
from palimpsest.report.compare import compare, identical, labels, unbeaten, write


def method(name: str, better: str, values, reference: float | None = None, /, **extra) -> Evidence:
    values = tuple(float(v) for v in values)
    m = Measurement(
        "score", "forget", 50.0, float(np.mean(values)), reference, None, None, len(values), better, "", values
    )
    return Evidence("forget", (replace(m, **extra),), {"name": name}, {}, {}, environment={})


def one(*evidences: Evidence):
    (finding,) = compare(evidences)
    return finding


NOISE = np.random.default_rng(0).normal(0, 5, 60)


def test_a_clear_difference_is_found_and_put_in_words():
    finding = one(method("a", "lower", 20 + NOISE), method("b", "lower", 30 + NOISE[::-1]))
    assert finding.better == "a"
    assert finding.difference == pytest.approx(10)
    assert finding.low > 0
    assert finding.p_corrected < 0.001
    assert finding.n == 60
    assert finding.sentence.startswith("a is better than b on score: lower by 10.0 (95% interval ")
    assert finding.sentence.endswith("p < 0.001).")


def test_swapping_the_methods_mirrors_the_finding():
    a, b = method("a", "lower", 20 + NOISE), method("b", "lower", 30 + NOISE[::-1])
    there, back = one(a, b), one(b, a)
    assert back.better == "a"
    assert back.difference == pytest.approx(-there.difference)
    assert back.high < 0
    assert back.sentence.startswith("a is better than b on score: lower by 10.0")


def test_no_difference_is_not_called_one():
    finding = one(method("a", "lower", 20 + NOISE), method("b", "lower", 20 + NOISE[::-1]))
    assert finding.better == ""
    assert "no difference shown" in finding.sentence
    same = one(method("a", "lower", NOISE), method("b", "lower", NOISE))
    assert same.p == 1.0
    assert same.better == ""


def test_higher_is_better_the_other_way_round():
    finding = one(method("a", "higher", 20 + NOISE), method("b", "higher", 30 + NOISE))
    assert finding.better == "b"
    assert "b is better than a on score: higher by 10.0" in finding.sentence


@pytest.mark.parametrize("side", [1, -1])
def test_closeness_to_the_reference_counts_on_either_side(side):
    near = method("near", "reference", 50 - 2 * side + NOISE - NOISE.mean(), 50.0)
    far = method("far", "reference", 50 + 12 * side + NOISE - NOISE.mean(), 50.0)
    finding = one(near, far)
    assert finding.better == "near"
    assert finding.difference == pytest.approx(10)
    assert "closer to the reference by 10.0" in finding.sentence


def test_closeness_to_zero():
    finding = one(method("a", "zero", -2 + NOISE - NOISE.mean()), method("b", "zero", 9 + NOISE - NOISE.mean()))
    assert finding.better == "a"
    assert finding.difference == pytest.approx(7)


def test_reference_records_are_paired_where_they_are_known():
    """With the reference's own scores per record, noise that all three share drops out of the interval."""
    shared = np.random.default_rng(1).normal(50, 20, 40)
    reference = tuple(shared.tolist())
    mean = float(shared.mean())
    with_records = {"reference_values": reference}
    a = method("a", "reference", shared + 1, mean, **with_records)
    b = method("b", "reference", -(shared - 2 * mean) - 3, mean, **with_records)
    paired = one(a, b)
    assert paired.difference == pytest.approx(2)
    loose = one(replace_reference(a), replace_reference(b))
    assert loose.difference == pytest.approx(2)
    assert paired.high - paired.low != pytest.approx(loose.high - loose.low)


def replace_reference(evidence: Evidence) -> Evidence:
    return replace(evidence, measurements=tuple(replace(m, reference_values=()) for m in evidence.measurements))


def test_holm_is_taken_over_the_pairs_of_one_measurement():
    findings = compare([method(name, "lower", 20 + shift + NOISE[::step]) for name, shift, step in GROUP])
    raw = np.array([f.p for f in findings])
    order = np.argsort(raw, kind="stable")
    expected = np.empty(len(raw))
    running = 0.0
    for place, index in enumerate(order):
        running = max(running, min(1.0, (len(raw) - place) * raw[index]))
        expected[index] = running
    assert [f.p_corrected for f in findings] == pytest.approx(expected.tolist())


GROUP = (("a", 0.0, 1), ("b", 1.5, -1), ("c", 2.5, 1), ("d", 0.3, -1))


@pytest.mark.parametrize(
    ("other", "why"),
    [
        ({"values": (1.0, 2.0), "after": 1.5}, "60 records against 2"),
        ({"values": ()}, "b has no per-record scores whose mean this is"),
        ({"after": None}, "b has no number"),
        ({"better": "higher"}, "a wants it lower, b wants it higher"),
    ],
)
def test_where_no_test_is_possible_it_says_why(other, why):
    finding = one(method("a", "lower", 20 + NOISE), method("b", "lower", 30 + NOISE, **other))
    assert finding.p is None
    assert finding.better == ""
    assert finding.why == why
    assert f"no test, because {why}" in finding.sentence


def test_scores_behind_an_auc_are_not_tested_as_if_they_were_records():
    finding = one(method("a", "zero", NOISE, after=-60.0), method("b", "zero", NOISE, after=40.0))
    assert finding.p is None


def test_a_reference_is_needed_to_be_close_to_it():
    finding = one(method("a", "reference", 20 + NOISE), method("b", "reference", 30 + NOISE))
    assert finding.why == "there is no reference to be close to"


def test_different_data_are_refused(make_evidence):
    a, b = make_evidence("npo"), make_evidence("sim-npo")
    b.data["forget"]["sha256"] = "f" * 64
    with pytest.raises(InputError, match="npo and sim-npo were not measured on the same data: the forget sets differ"):
        compare([a, b])
    with pytest.raises(InputError, match="at least two methods, found 1"):
        compare([a])


def test_labels_tell_twins_apart(make_evidence):
    evidences = [make_evidence("npo", config={"beta": beta, "steps": 10}) for beta in (0.1, 0.5)]
    assert labels(evidences) == ["npo (beta=0.1)", "npo (beta=0.5)"]
    assert labels([evidences[0], evidences[0]]) == ["npo", "npo [2]"]


def test_identical_weights_are_noticed(make_evidence, tmp_path):
    evidences = [make_evidence("npo", config={"beta": beta}) for beta in (0.1, 0.5)]
    assert identical(evidences) == [("npo (beta=0.1)", "npo (beta=0.5)")]
    assert "left identical weights" in write(evidences, tmp_path).read_text(encoding="utf-8")


def test_page_and_table(make_evidence, tmp_path):
    evidences = [
        make_evidence("npo"),
        make_evidence("<b>ascent</b>", knowledge=0.0, verbatim=0.0, utility=2.0, gibberish=95.0),
        make_evidence("difference", knowledge=45.0),
    ]
    page = write(evidences, tmp_path)
    text = page.read_text(encoding="utf-8")
    assert page == tmp_path / "compare.html"
    assert "1 of 3 methods holds up." in text
    assert "&lt;b&gt;ascent&lt;/b&gt;" in text
    assert "<b>ascent" not in text
    assert "npo is better than difference on knowledge of the forget set: closer to the reference by" in text
    with (tmp_path / "compare.csv").open(newline="", encoding="utf-8") as handle:
        rows = list(csv.DictReader(handle))
    assert len(rows) == 3 * len(evidences[0].measurements)
    assert {row["better"] for row in rows if row["measurement"] == "utility"} == {"npo", "difference", ""}


def test_many_methods_are_ranked_and_their_pairs_left_to_the_table(tmp_path):
    evidences = [method(f"m{k:02}", "lower", 10 * k + NOISE) for k in range(11)]
    text = write(evidences, tmp_path).read_text(encoding="utf-8")
    first, last = "m00: better than 10, worse than none of the others.", "m10: better than none, worse than 10"
    assert 0 < text.index(first) < text.index(last)
    assert "Every test as a table" not in text
    assert "compare.csv" in text
    assert len((tmp_path / "compare.csv").read_text(encoding="utf-8").splitlines()) == 1 + 55


def test_the_page_says_what_each_method_took(make_evidence, tmp_path):
    cost = {"seconds": 3.2, "steps": 1200, "changed": "guard", "extra_parameters": 34567}
    guarded = replace(make_evidence("eco"), extras={"cost": cost})
    text = write([guarded, make_evidence("npo", knowledge=45.0)], tmp_path).read_text(encoding="utf-8")
    assert "What each took" in text
    assert "34,567" in text
    assert "1,200" in text
    without = [make_evidence("npo"), make_evidence("difference", knowledge=45.0)]
    assert "What each took" not in write(without, tmp_path).read_text(encoding="utf-8")


def test_unbeaten_is_never_a_raw_ranking():
    findings = compare(
        [
            method("a", "lower", 20 + NOISE),
            method("b", "lower", 20.4 + NOISE[::-1]),
            far := method("c", "lower", 60 + NOISE),
        ]
    )
    assert far.method["name"] == "c"
    assert [unbeaten(findings, "score", name) for name in "abc"] == [True, True, False]
    assert not unbeaten([], "score", "a")


def test_probabilities_in_words():
    assert module.probability(0.0002) == "p < 0.001"
    assert module.probability(0.0421) == "p = 0.042"
    assert module.probability(None) == ""
