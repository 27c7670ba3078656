"""The claim at a tenth of its scale: that it measures what it says, not what comes out."""

from __future__ import annotations

from dataclasses import replace

import pytest

from palimpsest.claims import muse
from palimpsest.claims.muse import FOLDS, NEAR, QUIET, measure

SCALE = 0.1


@pytest.fixture(scope="module")
def stage(session_cache):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PALIMPSEST_CACHE", str(session_cache))
        yield muse._Stage.set_up(0, SCALE)


def test_method_and_control_yield_every_expected_value(monkeypatch, session_cache):
    monkeypatch.setenv("PALIMPSEST_CACHE", str(session_cache))
    few = {name: muse._UNLEARNERS[name] for name in ("ga", "ga_gdr", "npo_gdr")}
    monkeypatch.setattr(muse, "_UNLEARNERS", few)
    monkeypatch.setattr(muse, "RATES", (1e-3,))
    monkeypatch.setattr(muse, "FOLDS", 2)
    method, control = measure(0, scale=SCALE), measure(0, mechanism=False, scale=SCALE)
    assert set(method) == set(control) >= set(measure.names)
    assert method["leakage_reference"] == control["leakage_reference"] == 0
    assert method["knowledge_before"] == control["knowledge_before"]  # the same world, the same models
    assert method["utility_ga"] != control["utility_ga"]
    assert len({control[f"utility_{name}"] for name in few}) == 1  # one retrained model stands for all


def test_the_reference_has_not_seen_what_must_go(stage, monkeypatch, session_cache):
    monkeypatch.setenv("PALIMPSEST_CACHE", str(session_cache))
    assert stage.reference.nll(stage.request.forget).mean() > stage.before.nll(stage.request.forget).mean() + 0.5
    twin = stage.retrained(stage.request)
    assert twin.sha256 != stage.reference.sha256
    assert twin.nll(stage.request.forget).mean() > stage.before.nll(stage.request.forget).mean() + 0.5


def test_each_successive_request_starts_where_the_last_one_ended(stage, monkeypatch):
    starts = []

    def forget(self, name, lm, request):
        starts.append((lm.source, request.name))
        return replace(lm, source=request.name)

    monkeypatch.setattr(muse._Stage, "unlearned", forget)
    models = stage.course("npo_gdr")
    names = [fold.name for fold in stage.folds]
    assert starts == list(zip([stage.before.source, *names[:-1]], names, strict=True))
    assert [lm.source for lm in models] == names
    assert len(models) == FOLDS


def test_every_unlearner_takes_the_same_budget(stage):
    budget = {"steps": 7, "lr": 1e-4, "batch_size": 16, "warmup_epochs": 0, "seed": 3}
    for build in muse._UNLEARNERS.values():
        method = build(**budget)
        assert {name: getattr(method, name) for name in budget} == budget


def test_standing_asks_for_verbatim_privacy_and_utility_at_once():
    reference = {"verbatim": 30.0, "utility": 90.0}
    good = {"verbatim": 30 + NEAR, "utility": 90 - NEAR, "leakage": QUIET - 1}
    assert muse._stands(good, reference)
    assert not muse._stands(good | {"verbatim": 24.0}, reference)
    assert not muse._stands(good | {"utility": 84.0}, reference)
    assert not muse._stands(good | {"leakage": -QUIET}, reference)
