"""The survey's claim at a small scale: its values, its control, and the pieces it is made of."""

from __future__ import annotations

from pathlib import Path
from typing import ClassVar

import numpy as np
import pytest

from palimpsest.claims import knowledge_unlearning as module
from palimpsest.claims.knowledge_unlearning import CHOSEN, FORGOTTEN, RATES, UNLEARNERS, _choices, _Stage, measure

SCALE = 0.1


@pytest.fixture(scope="module")
def stage(session_cache: Path) -> _Stage:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PALIMPSEST_CACHE", str(session_cache))
        return _Stage.set_up(0, SCALE)


def test_it_measures_all_it_expects_with_and_without_the_mechanism() -> None:
    with_it, without = (measure(0, mechanism=mechanism, scale=SCALE) for mechanism in (True, False))
    assert set(measure.names) <= set(with_it) == set(without)
    assert all(np.isfinite(value) for values in (with_it, without) for value in values.values())
    for name in ("ga", "npo", "task_vector"):  # they never see the retain set
        assert with_it[f"kept_{name}"] == without[f"kept_{name}"]
    assert with_it["kept_regularised"] != without["kept_regularised"]
    assert with_it["probe_in_context"] == 0.0
    assert with_it["forget_before"] > with_it["forget_reference"]


def test_the_control_permutes_answers_within_an_attribute_and_nothing_else(stage: _Stage) -> None:
    retain, permuted = stage.request.retain, stage.without_knowledge().retain
    assert retain is not None
    assert permuted is not None
    assert list(permuted["prompt"]) == list(retain["prompt"])
    for attribute in set(retain["attribute"]):
        places = [n for n, name in enumerate(retain["attribute"]) if name == attribute]
        before, after = ([table["completion"][n] for n in places] for table in (retain, permuted))
        assert sorted(before) == sorted(after)
    moved = [one != other for one, other in zip(retain["completion"], permuted["completion"], strict=True)]
    assert np.mean(moved) > 0.5
    assert stage.without_knowledge().forget is stage.request.forget


def test_utility_is_whole_before_and_choices_are_about_the_true_answer(stage: _Stage) -> None:
    assert stage.kept(stage.before) == 1.0
    prompts, options, right = _choices(stage.asked["forget"])
    for row, place, answer in zip(options, right, stage.asked["forget"]["completion"], strict=True):
        assert row[place] == f" {answer}"
        assert len(row) == 4
    assert len(prompts) == len(stage.asked["forget"])
    assert stage.quality(stage.reference) == 0.0


def test_unlearning_stops_once_it_has_forgotten(stage: _Stage) -> None:
    forgot = stage.unlearned("ga", 3e-3, stage.request)
    assert stage.accuracy(forgot) <= FORGOTTEN
    still = stage.unlearned("ga", 1e-7, stage.request)
    assert stage.accuracy(still) > FORGOTTEN


def test_drift_is_the_slope_of_the_log_ratio(stage: _Stage) -> None:
    slow, _ = stage.drift("npo", 3e-4, stage.request)
    fast, lm = stage.drift("ga", 3e-4, stage.request)
    assert fast > 0
    assert slow < fast
    assert lm.sha256 != stage.before.sha256


def test_the_rates_are_those_that_were_tried() -> None:
    assert set(CHOSEN) == set(UNLEARNERS)
    assert set(CHOSEN.values()) <= set(RATES)


def test_a_rate_is_chosen_by_forgetting_first_and_utility_second(monkeypatch: pytest.MonkeyPatch) -> None:
    class Fake:
        left: ClassVar = {1e-4: 0.9, 3e-4: 0.3, 1e-3: 0.2, 3e-3: 0.1}
        useful: ClassVar = {1e-4: 1.0, 3e-4: 0.4, 1e-3: 0.6, 3e-3: 0.1}
        request = None

        def unlearned(self, name: str, rate: float, request: object) -> float:
            return rate

        def accuracy(self, rate: float) -> float:
            return self.left[rate]

        def kept(self, rate: float) -> float:
            return self.useful[rate]

    fake = Fake()
    monkeypatch.setattr(module._Stage, "set_up", staticmethod(lambda seed, scale: fake))
    assert set(module.choose_rates().values()) == {1e-3}
    fake.left = dict.fromkeys(RATES, 0.9) | {3e-3: 0.8}
    assert set(module.choose_rates().values()) == {3e-3}
