from __future__ import annotations

from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
from datasets import Dataset

from palimpsest.audit import Muse
from palimpsest.core.errors import InputError
from palimpsest.core.methods import config_of, get
from palimpsest.core.records import Evidence
from palimpsest.data.records import documents, questions
from palimpsest.data.request import ForgetRequest
from palimpsest.models import generate, score
from palimpsest.models.lm import LM

NAMES = [
    "verbatim",
    "knowledge",
    "gibberish",
    "privacy_leakage",
    "utility",
    "utility_gibberish",
    "retain_knowledge",
    "forget_nll",
    "utility_nll",
    "scalability",
    "sustainability",
]


@pytest.fixture(scope="module")
def proof(household, tmp_path_factory) -> Evidence:
    """The reference itself, audited as if it were an unlearned model."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PALIMPSEST_CACHE", str(tmp_path_factory.mktemp("muse")))
        return Muse()(
            household.before, household.reference, household.request, household.reference, method={"name": "x"}
        )


def test_every_way_is_measured_before_after_and_on_the_reference(proof):
    assert [m.name for m in proof.measurements] == NAMES
    for m in proof.measurements[:-2]:
        assert None not in (m.before, m.after, m.reference)
        assert m.low <= m.after <= m.high
        assert len(m.values) == len(m.before_values) == len(m.reference_values) > 0
        assert np.mean(m.values) == pytest.approx(m.after, abs=1e-9)


def test_the_model_before_remembers_and_the_reference_does_not(proof):
    assert proof["verbatim"].before > 60 > proof["verbatim"].after
    assert proof["knowledge"].before == 100
    assert proof["knowledge"].after < 60
    assert proof["privacy_leakage"].before < -90
    assert proof["privacy_leakage"].after == 0
    assert proof["utility"].before > 80
    assert proof["utility"].after > 80


def test_evidence_names_models_data_and_the_audit_itself(proof, household):
    assert proof.kind == "forget"
    assert proof.method == {"name": "x"}
    assert proof.model["before"] == {"source": household.before.source, "sha256": household.before.sha256}
    assert set(proof.model) == {"before", "after", "reference"}
    assert proof.data == household.request.describe()
    assert proof.extras["audit"] == {"name": "muse", "paper": "muse", "config": config_of(Muse())}
    assert "without demonstrations: " in proof.extras["asked"]
    assert proof.extras["membership"]["texts"] == {"forget": 8, "holdout": 8}
    assert get("audit", "muse").cls is Muse


def test_examples_show_the_same_record_side_by_side(proof, household):
    shown = proof.extras["examples"]
    assert [one["set"] for one in shown] == ["forget"] * 8 + ["utility"] * 4
    truth = dict(questions(household.request.forget))
    for one in shown[:4]:
        assert truth[one["prompt"]].strip() == one["truth"] == one["before"]
    document = documents(household.request.forget)[0]
    assert shown[4]["prompt"] + shown[4]["truth"] == document
    assert shown[4]["after"] == shown[4]["reference"] != shown[4]["before"]


def test_evidence_survives_the_disk(proof, tmp_path):
    proof.write(tmp_path)
    assert Evidence.read(tmp_path).measurements == proof.measurements


def test_numbers_do_not_depend_on_the_batch_size(proof, household, monkeypatch, tmp_path):
    monkeypatch.setenv("PALIMPSEST_CACHE", str(tmp_path))
    monkeypatch.setattr(generate, "TOKENS", 1)
    monkeypatch.setattr(
        score, "by_tokens", lambda lengths, tokens=1, rows=None: [np.array([i]) for i in range(len(lengths))]
    )
    alone = Muse()(household.before, household.reference, household.request, household.reference)
    assert alone.extras["examples"] == proof.extras["examples"]
    for one, other in zip(alone.measurements, proof.measurements, strict=True):
        assert one.values == pytest.approx(other.values, abs=1e-4)
        assert one.before_values == pytest.approx(other.before_values, abs=1e-4)


def test_the_model_before_sits_the_exam_once_however_many_methods_are_compared(household, monkeypatch, tmp_path):
    monkeypatch.setenv("PALIMPSEST_CACHE", str(tmp_path))
    asked: list[str] = []
    plain = LM.generate

    def counted(self, *args, **kwargs):
        asked.append(self.source)
        return plain(self, *args, **kwargs)

    monkeypatch.setattr(LM, "generate", counted)
    muse = Muse(demonstrations=0)
    for name in ("first", "second"):
        after = replace(household.reference, source=name)
        muse(replace(household.before, source="before"), after, household.request)
    assert asked.count("before") == 3  # forget, utility and retain questions, once each
    assert asked.count("first") == 3
    assert asked.count("second") == 0  # the same weights as the first, which have been asked


def test_without_a_reference_or_a_holdout_what_can_be_said_is_said(household):
    request = replace(household.request, holdout=None)
    found = Muse(demonstrations=0)(household.before, household.reference, request)
    assert found["knowledge"].after is not None
    assert found["knowledge"].reference is None
    assert found["privacy_leakage"].after is None
    assert found["privacy_leakage"].note.startswith("Needs holdout records")
    assert all(one["reference"] is None for one in found.extras["examples"])
    assert set(found.model) == {"before", "after"}


def test_texts_alone_are_recited_and_scored(household):
    tables = {
        name: Dataset.from_dict({"text": documents(getattr(household.request, name))}) for name in ("forget", "utility")
    }
    found = Muse()(household.before, household.reference, ForgetRequest(**tables))
    assert found["verbatim"].after < found["verbatim"].before
    assert found["utility_verbatim"].before > 60
    assert found["utility_verbatim"].better == "higher"
    for name in ("knowledge", "utility", "retain_knowledge"):
        assert found[name].after is None
        assert "prompt" in found[name].note


def test_questions_alone_are_asked(household):
    asked = questions(household.request.forget)
    table = Dataset.from_dict({"prompt": [q for q, _ in asked], "completion": [a for _, a in asked]})
    found = Muse()(household.before, household.reference, ForgetRequest(forget=table))
    assert found["knowledge"].before == 100
    assert found["verbatim"].after is None
    assert "documents" in found["verbatim"].note


def test_models_that_read_other_tokens_are_refused(household):
    other = LM.build(["other words"], "llama-tiny", vocab_size=262)
    with pytest.raises(InputError, match="before and after have different vocabularies"):
        Muse()(household.before, other, household.request)
    with pytest.raises(InputError, match="before and reference"):
        Muse()(household.before, household.before, household.request, other)


def test_folds_and_examples_must_make_sense():
    with pytest.raises(InputError, match="folds"):
        Muse(folds=0)
    with pytest.raises(InputError, match="examples"):
        Muse(examples=-1)


class Recorder:
    """An unlearner that only notes what it was given, and returns the reference under a new name each time."""

    def __init__(self, household):
        self.household, self.calls = household, []

    def __call__(self, lm, request):
        self.calls.append((lm.source, set(documents(request.forget))))
        return replace(self.household.reference, source=f"made-{len(self.calls)}")


def test_scalability_forgets_growing_sets_from_the_same_start(household):
    unlearner = Recorder(household)
    course = Muse(demonstrations=0).scalability(unlearner, household.before, household.request, folds=4)
    starts, sets = zip(*unlearner.calls, strict=True)
    assert starts == (household.before.source,) * 4
    assert all(one < other for one, other in pairwise(sets))
    assert sets[-1] == set(documents(household.request.forget))
    assert course.curves["rows"] == [0, 4, 8, 12, 16]
    assert {len(curve) for curve in course.curves.values()} == {5}
    assert set(course.curves) == {"rows", "utility", "knowledge", "verbatim"}
    assert course.measurement.name == "scalability"
    assert course.measurement.before == course.curves["utility"][0]
    assert course.measurement.after == course.curves["utility"][-1]


def test_sustainability_forgets_disjoint_sets_each_from_where_the_last_one_ended(household):
    """So the reference of NPO and KL, which is the model they are given, is the start of the current request."""
    unlearner = Recorder(household)
    course = Muse(demonstrations=0, folds=4).sustainability(unlearner, household.before, household.request)
    starts, sets = zip(*unlearner.calls, strict=True)
    assert starts == (household.before.source, "made-1", "made-2", "made-3")
    assert sum(map(len, sets)) == len(set.union(*sets)) == 8
    assert course.measurement.name == "sustainability"
    assert course.curves["rows"] == [0, 4, 8, 12, 16]
    assert course.curves["knowledge"][0] == 100


def test_courses_need_a_utility_set_with_questions(household):
    texts = Dataset.from_dict({"text": documents(household.request.utility)})
    unlearner = Recorder(household)
    course = Muse().scalability(unlearner, household.before, replace(household.request, utility=texts))
    assert course.measurement.after is None
    assert "utility set" in course.measurement.note
    assert unlearner.calls == []


def test_given_the_unlearner_the_evidence_holds_both_courses(household):
    unlearner = Recorder(household)
    found = Muse(demonstrations=0, folds=2)(
        household.before, household.reference, household.request, household.reference, unlearner=unlearner
    )
    assert len(unlearner.calls) == 4
    assert found["scalability"].after == found["utility"].after
    assert found["sustainability"].reference == found["utility"].reference
    assert set(found.extras["requests"]) == {"scalability", "sustainability"}
