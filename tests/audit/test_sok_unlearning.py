"""The battery on models whose truth is known, with and without a reference, and what it refuses."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest

from palimpsest.audit.cards import CARDS
from palimpsest.audit.recovery import Resampled
from palimpsest.audit.sok_unlearning import RemovalOrSuppression
from palimpsest.core.errors import InputError
from palimpsest.core.records import Evidence

ATTACKS = ("opened", "avoided", "paraphrase", "framed", "relearning", "int4", "probe", "lens", "steering")
METHOD = RemovalOrSuppression(attacks=ATTACKS, relearn_steps=8)


@pytest.fixture(scope="module")
def battery(town):
    models = town
    return METHOD.prepare(models.before, models.request, models.reference)


@pytest.mark.parametrize(
    ("name", "word"), [("retrained", "removed"), ("guarded", "suppressed"), ("before", "not forgotten")]
)
def test_known_truth_is_named(battery, name, word, town):
    findings = battery.attack(getattr(town, name))
    assert findings.skipped == {}
    assert findings.verdict.word == word, findings.verdict.why
    rooms = {
        attack: np.nanmean(read["before"].values - read["reference"].values)
        for attack, read in findings.readings.items()
        if attack != "avoided"  # held against plain asking
    }
    assert all(rooms[attack] > 0.5 * rooms["asked"] for attack in rooms if findings.shares[attack].power)


def test_behind_an_api_the_guarded_model_gives_nothing_away(battery, town):
    api = replace(battery, method=replace(METHOD, access="api", attacks=(*ATTACKS, "samples"), samples=3))
    findings = api.attack(town.guarded)
    assert set(findings.readings) == {"asked", "avoided", "paraphrase", "framed", "samples"}
    assert findings.verdict.word in ("removed", "undecided")  # sixty facts do not always decide
    assert max(share.share for share in findings.shares.values()) < 0.35


def test_without_a_reference_holdout_records_stand_in(tmp_path, town):
    models = town
    alone = METHOD.prepare(models.before, models.request)
    assert alone.control is not None
    assert alone.attack(models.guarded).verdict.word == "suppressed"
    assert alone.attack(models.before).verdict.word == "not forgotten"
    assert alone.attack(models.retrained).verdict.word in ("removed", "undecided")


def test_with_neither_what_can_be_said_is_said(town):
    models = town
    blind = METHOD.prepare(models.before, replace(models.request, holdout=None))
    findings = blind.attack(models.retrained)
    assert findings.verdict.word == "undecided"
    assert "reference" in findings.verdict.why
    assert {"relearning", "probe"} == set(findings.skipped)
    assert blind.attack(models.guarded).verdict.word == "suppressed"
    assert blind.attack(models.before).verdict.word == "not forgotten"


def test_a_broken_model_is_called_broken(battery, town):
    broken = town.before.copy()
    for parameter in broken.model.parameters():
        parameter.data.normal_(0, 0.02)
    assert battery.ask(broken).verdict.word == "collapsed"


def test_the_evidence_is_whole(battery, tmp_path, town):
    models = town
    method = replace(METHOD, attacks=("opened", "avoided", "relearning", "speed", "lens", "int4"))
    evidence = method(models.before, models.guarded, models.request, models.reference, method={"name": "filter"})
    evidence.write(tmp_path)
    assert Evidence.read(tmp_path).extras == json.loads(json.dumps(evidence.extras))
    assert {m.name for m in evidence.measurements} <= set(CARDS)
    assert evidence.extras["attacks"]["verdict"] == "suppressed"
    assert evidence["recovered"].after == pytest.approx(100)
    assert evidence["relearning_savings"].after > 50
    asked = evidence["recognition"]
    assert asked.low < asked.after < asked.high
    assert asked.after == pytest.approx(np.mean(asked.values))
    assert evidence["membership"].before < 0.3 < evidence["membership"].reference
    assert evidence["membership"].after > evidence["membership"].before  # the filter hides whom it is about


def test_too_few_facts_say_how_many_are_needed(battery, town):
    request = town.request
    small = replace(
        request, forget=request.forget.filter(lambda row: row["person"] in set(request.forget["person"][:1]))
    )
    with pytest.raises(InputError, match="at least 20 forget facts"):
        METHOD.prepare(town.before, small, town.reference)


def test_layers_that_cannot_be_addressed_leave_steering_out(battery, town):
    after = town.retrained.copy()
    for layer in after.model.model.layers:
        block = layer.mlp
        del layer.mlp
        layer.register_module("unheard_of", block)
        object.__setattr__(layer, "mlp", block)  # it still runs, but is no part by a name that we know
    only = replace(battery, method=replace(METHOD, attacks=("steering", "lens")))
    findings = only.attack(after)
    assert "addressed" in findings.skipped["steering"]
    assert "lens" in findings.readings


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"access": "root"}, "unknown access"),
        ({"attacks": ("relearnin",)}, "did you mean .*relearning"),
        ({"limit": 0.0}, "limit"),
        ({"relearn_steps": 2}, "relearn_steps"),
    ],
)
def test_what_makes_no_sense_is_refused(wrong, said):
    with pytest.raises(InputError, match=said):
        RemovalOrSuppression(**wrong)


def test_the_same_persons_are_drawn_for_every_attack(battery):
    one, two = (Resampled(battery.facts.groups, 3) for _ in range(2))
    np.testing.assert_array_equal(one.weights_SG, two.weights_SG)
