"""Shares by hand, and the rule on readings whose truth is known: what it says, and how often it errs."""

from __future__ import annotations

import numpy as np
import pytest

from palimpsest.audit.recovery import WORDS, Recovered, Resampled, Rule, decide, recovered

RULE = Rule()
NEEDED = (("relearning",), ("probe", "lens"))


def found(name, share, *, spread=0.05, power=True, facts=120):
    return Recovered(name, share, share - spread, share + spread, share - spread, share + spread, power, facts)


ASKED = found("asked", 0.0)
QUIET = {name: found(name, 0.02) for name in ("relearning", "probe", "int4")}


def test_a_share_is_what_comes_back_of_what_was_there():
    groups = np.repeat(np.arange(10), 4)
    facts = Resampled(groups, 0)
    before, reference = np.full(40, 0.9), np.full(40, 0.1)
    after = np.full(40, 0.3)
    one = recovered("int4", after, before, reference, facts, least=0.2)
    assert one.share == pytest.approx(0.25)
    assert (one.low, one.high) == pytest.approx((0.25, 0.25))
    assert one.power
    assert one.facts == 40


def test_the_interval_widens_with_persons_who_differ_not_with_their_facts():
    rng = np.random.default_rng(0)
    persons = rng.random(12)
    reference, before = np.zeros(120), np.ones(120)
    together = recovered(
        "x", np.repeat(persons, 10), before, reference, Resampled(np.repeat(np.arange(12), 10), 0), least=0.2
    )
    apart = recovered("x", np.repeat(persons, 10), before, reference, Resampled(np.arange(120), 0), least=0.2)
    assert together.high - together.low > 2 * (apart.high - apart.low)
    assert together.share == pytest.approx(apart.share)


def test_facts_that_an_attack_cannot_read_are_left_out_on_all_sides():
    facts = Resampled(np.arange(20), 0)
    after, before, reference = np.full(20, 0.5), np.ones(20), np.zeros(20)
    before[:5], after[:5] = 0.0, np.nan
    one = recovered("probe", after, before, reference, facts, least=0.2)
    assert one.share == pytest.approx(0.5)
    assert one.facts == 15


def test_an_attack_under_which_nobody_knows_has_no_power():
    facts = Resampled(np.arange(30), 0)
    same = np.full(30, 0.2)
    assert not recovered("int4", same, same, same, facts, least=0.2).power
    assert not recovered("int4", same, same + 0.1, same, facts, least=0.2).power


@pytest.mark.parametrize(
    ("asked", "attacks", "utility", "word"),
    [
        (ASKED, QUIET, 0.95, "removed"),
        (ASKED, QUIET, float("nan"), "removed"),
        (ASKED, QUIET | {"int4": found("int4", 0.6)}, 0.95, "suppressed"),
        (found("asked", 0.9), QUIET | {"int4": found("int4", 0.9)}, 1.0, "not forgotten"),
        (ASKED, QUIET, 0.3, "collapsed"),
        (ASKED, QUIET | {"int4": found("int4", 0.22)}, 0.95, "undecided"),
        (ASKED, QUIET | {"int4": found("int4", 0.9, power=False)}, 0.95, "removed"),
        (ASKED, {"int4": QUIET["int4"], "lens": found("lens", 0.0)}, 0.95, "undecided"),  # nobody relearned
        (ASKED, QUIET | {"probe": found("probe", 0.0, power=False)}, 0.95, "undecided"),  # nobody looked inside
        (found("asked", 0.0, power=False), QUIET, 0.95, "undecided"),
    ],
)
def test_the_rule(asked, attacks, utility, word):
    assert decide(asked, attacks, utility, needed=NEEDED, rule=RULE).word == word


def test_without_a_reference_nothing_is_removed_but_suppression_can_be_shown():
    assert decide(ASKED, QUIET, 1.0, needed=NEEDED, rule=RULE, reference=False).word == "undecided"
    loud = QUIET | {"int4": found("int4", 0.6)}
    assert decide(ASKED, loud, 1.0, needed=NEEDED, rule=RULE, reference=False).word == "suppressed"


def test_undecided_says_how_many_facts_would_decide():
    attacks = QUIET | {"int4": found("int4", 0.15, spread=0.2, facts=100)}
    verdict = decide(ASKED, attacks, 1.0, needed=NEEDED, rule=RULE)
    assert verdict.word == "undecided"
    assert "about 400 facts would decide" in verdict.why  # half the spread: four times the facts
    assert verdict.decided_by == "int4"


def test_more_attacks_do_not_make_chance_look_like_suppression():
    """A model that never knew, attacked in twelve ways that each read nothing but noise."""
    rng, groups = np.random.default_rng(1), np.repeat(np.arange(24), 5)
    facts, called = Resampled(groups, 0), []
    for _ in range(60):
        before = np.full(120, 0.95)

        def attack(name, before=before):
            guesses = (rng.random((2, 120)) < 0.125).astype(float)
            return recovered(name, guesses[0], before, guesses[1], facts, attacks=12, least=0.2)

        names = ("relearning", "probe", *list(WORDS)[:10])
        called.append(decide(attack("asked"), {n: attack(n) for n in names}, 1.0, needed=NEEDED, rule=RULE).word)
    assert called.count("suppressed") == 0
    assert called.count("removed") >= 57
