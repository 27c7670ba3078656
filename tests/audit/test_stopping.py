from __future__ import annotations

from dataclasses import replace

import pytest
from datasets import Dataset

from palimpsest.audit import Muse, stop_when_forgotten
from palimpsest.core.errors import InputError
from palimpsest.core.watch import Watch
from palimpsest.data.records import documents
from palimpsest.data.request import ForgetRequest
from palimpsest.forget.ascent import GradDiff
from palimpsest.models.lm import LM

MUSE = Muse(demonstrations=0)


def test_it_looks_every_few_steps_and_stops_at_the_threshold(household):
    scores = iter([80.0, 30.0])
    until = stop_when_forgotten(lambda lm: next(scores), household.before, household.request, 30.0, every=5)
    assert [until(step, household.before.model) for step in range(1, 11)] == [False] * 9 + [True]


def test_knowledge_of_the_reference_stops_and_that_of_the_model_before_does_not(household):
    until = stop_when_forgotten(MUSE, household.before, household.request, household.reference, every=1)
    assert not until(1, household.before.model)
    assert until(2, household.reference.model)


def test_of_documents_it_looks_at_recital(household):
    texts = ForgetRequest(forget=Dataset.from_dict({"text": documents(household.request.forget)}))
    until = stop_when_forgotten(MUSE, household.before, texts, 40.0, every=1)
    assert not until(1, household.before.model)
    assert until(2, household.reference.model)


def test_only_a_part_of_the_questions_is_asked(household, monkeypatch):
    asked: list[int] = []
    plain = LM.generate

    def counted(self, prompts, **kwargs):
        asked.append(len(prompts))
        return plain(self, prompts, **kwargs)

    until = stop_when_forgotten(MUSE, household.before, household.request, 0.0, every=1, records=3)
    monkeypatch.setattr(LM, "generate", counted)
    until(1, household.before.model)
    assert asked == [3]


def test_a_model_in_training_mode_is_looked_at_in_evaluation_and_given_back(household):
    until = stop_when_forgotten(MUSE, household.before, household.request, 50.0, every=1)
    model = household.before.copy().model.train()
    until(1, model)
    assert model.training


def test_unlearning_stops_before_its_steps_are_used_up(household):
    until = stop_when_forgotten(MUSE, household.before, household.request, household.reference, every=2)
    watch = Watch(until=until, progress=False)
    method = GradDiff(steps=60, lr=1e-3, warmup_epochs=0, batch_size=8)
    after = method(household.before, household.request, watch=watch)
    trace = watch.traces["forget"]
    assert trace.stopped == "until"
    assert trace.steps < 60
    known = MUSE.knowledge(MUSE.exam(household.before, household.request), after)
    reference = MUSE.knowledge(MUSE.exam(household.before, household.request), household.reference)
    assert known.mean() <= reference.mean()


def test_what_cannot_be_asked_cannot_stop(household):
    short = ForgetRequest(forget=Dataset.from_dict({"text": ["too short"]}))
    with pytest.raises(InputError, match="can be asked"):
        stop_when_forgotten(MUSE, household.before, short, 10.0)
    with pytest.raises(InputError, match="at least 1"):
        stop_when_forgotten(MUSE, household.before, household.request, 10.0, every=0)


def test_the_threshold_is_measured_on_the_same_questions(household):
    few = replace(household.request, holdout=None)
    until = stop_when_forgotten(MUSE, household.before, few, household.before, every=1, records=4)
    assert until(1, household.before.model)  # it is down to its own score
