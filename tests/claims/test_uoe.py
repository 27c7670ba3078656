"""UOE's claim at a small scale: every value is there, and the control trains another expert."""

from __future__ import annotations

from palimpsest import claims
from palimpsest.claims.uoe import RELATIONS, TOPICS, VALUES, Topics, Trial


def test_all_values_are_measured_and_the_control_differs() -> None:
    claim = claims.get("uoe")
    measured, control = (claim(0, mechanism=mechanism, scale=0.1) for mechanism in (True, False))
    assert measured.keys() == control.keys()
    for name in ("concentration", "known_before", "utility_full", "shift_full", "utility_random"):
        assert measured[name] == control[name]  # the control changes the attributed variants alone
    assert measured["utility_uoe"] != control["utility_uoe"] or measured["shift_uoe"] != control["shift_uoe"]
    assert all(0 <= value <= 100 for name, value in measured.items() if name.startswith("utility"))


def test_the_world_and_how_it_is_marked() -> None:
    world = Topics(4, 0)
    assert len(world.facts) == TOPICS * 4 * len(RELATIONS)
    assert all(right in known and len(set(known)) == VALUES for _, _, right, known in world.facts)
    assert len({prompt for _, prompt, _, _ in world.facts}) == len(world.facts)
    trial = Trial.of(world, 0.01, 0, 0.1)
    encoded = trial.lm.encode(world.table({0}))
    by_hand = []
    for row in world.table({0}):
        likelihoods = trial.lm.token_logprobs([(row["prompt"], f" {option}") for option in row["options"]])
        by_hand.append(max(range(VALUES), key=lambda n: likelihoods[n][0]) == row["options"].index(row["completion"]))
    assert trial.right(trial.lm, encoded) == sum(by_hand) / len(by_hand)
