"""UnUnlearning's claim at a small scale: all values are there, and training tells no named combination."""

from __future__ import annotations

import numpy as np
import pytest

from palimpsest import claims
from palimpsest.audit.retelling import PLAIN
from palimpsest.claims.ununlearning import FORBIDDEN, KINDS, NAMED, PROPERTIES, Named
from palimpsest.data.records import pairs


@pytest.fixture
def tables(monkeypatch):
    """What models would have been trained on, in turn."""
    found = []

    def remember(lm, table, *_, **__):
        found.append(table)
        return lm

    monkeypatch.setattr("palimpsest.claims.ununlearning.trained", remember)
    return found


def told(world: Named, prompt: str) -> tuple[int, ...]:
    """The property of each kind that a prompt tells."""
    meaning = {str(word): (kind, place) for (kind, place, _), word in np.ndenumerate(world.properties)}
    return tuple(place for _, place in sorted(meaning[word] for word in prompt.split() if word in meaning))


def test_all_values_are_measured_and_the_control_differs(monkeypatch) -> None:
    monkeypatch.setattr("palimpsest.claims.ununlearning.PHRASINGS", 2)
    claim = claims.get("ununlearning")
    measured, control = (claim(0, mechanism=mechanism, scale=0.03) for mechanism in (True, False))
    assert measured.keys() == control.keys() >= {expected.value for expected in claim.expectations}
    assert all(np.isfinite(list(measured.values())))
    assert measured["target_plain"] == control["target_plain"]  # the same questions, nothing told
    assert measured["names_stop_definition"] == 100
    assert measured["names_stop_alias"] == 0
    assert measured["definitions_stops_alias"] == measured["definitions_stops_chain"] == 100
    assert measured["definitions_false_alarms"] == measured["definitions_alarms_near"] == 0


def test_no_definition_in_training_tells_a_named_combination(tables) -> None:
    world = Named(0)
    world.named(world.base(0.2), range(NAMED), 0.1)
    definitions = [told(world, prompt) for table in tables for prompt, _ in pairs(table) if "define" in prompt]
    assert {len(one) for one in definitions} == {KINDS}
    assert not set(world.concepts) & set(definitions)
    assert not any(name in prompt.split() for prompt, _ in pairs(tables[0]) for name in world.names)


def test_answers_in_training_follow_from_what_is_told_and_stand_in_no_prompt(tables) -> None:
    world = Named(1)
    world.base(0.02)
    consequences = set(world.follows.ravel().tolist())
    for prompt, answer in pairs(tables[0]):
        kind = world.kinds.index(prompt.split(" . ")[-1].split()[1])
        place = told(world, prompt)[kind if "define" in prompt else 0]
        assert answer.strip() == world.follows[kind, place]
        assert not consequences & set(prompt.split())


def test_the_exact_model_is_never_shown_the_forbidden_names(tables) -> None:
    world = Named(0)
    world.named(world.start, range(FORBIDDEN, NAMED), 1.0)
    words = {word for prompt, _ in pairs(tables[0]) for word in prompt.split()}
    assert set(world.names) & words == set(world.names[FORBIDDEN:])


def test_each_concept_is_told_by_its_own_definition_and_in_the_control_by_another() -> None:
    world = Named(0)
    assert len(set(world.concepts)) == NAMED
    for described in (True, False):
        asked = world.asked(range(FORBIDDEN), described)
        assert len(asked.questions) == FORBIDDEN * KINDS
        for way in ("definition", "alias", "chain"):
            for owner, prompt in zip(asked.owner, asked.prompts(way), strict=True):
                assert (told(world, str(prompt)) == world.concepts[owner]) == described
        for question, owner in zip(asked.questions, asked.owner, strict=True):
            kind = world.kinds.index(question.prompt.split()[1])
            assert question.answer == world.follows[kind, world.concepts[owner][kind]]
            assert len(question.options) == PROPERTIES
        assert all(prompt is not None for prompt in asked.prompts(PLAIN))


def test_near_combinations_differ_in_one_property() -> None:
    world, rng = Named(2), np.random.default_rng(0)
    for concept in world.concepts:
        near = world.near(concept, rng)
        assert near not in world.concepts
        assert sum(a != b for a, b in zip(near, concept, strict=True)) == 1
