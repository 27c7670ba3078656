"""The claim at a small scale: every value is there, and the control takes other vectors."""

from __future__ import annotations

import numpy as np

from palimpsest import claims
from palimpsest.claims.conceptvectors import CONCEPTS, RELATIONS, UNLEARNERS, School, _values


def test_all_values_are_measured_and_the_control_takes_other_vectors() -> None:
    claim = claims.get("conceptvectors")
    measured, control = (claim(0, mechanism=mechanism, scale=0.4) for mechanism in (True, False))
    assert measured.keys() == control.keys()
    assert set(_values()) <= measured.keys()
    assert measured["traced"] == control["traced"] == 1
    for name in UNLEARNERS:
        assert measured[f"accuracy_{name}"] == control[f"accuracy_{name}"]  # the same unlearned models
    assert measured["drop_target"] > control["drop_target"]
    assert measured["jaccard_needle"] != control["jaccard_needle"]
    assert measured["drop_unrelated_twice"] == 2 * measured["drop_unrelated"]


def test_no_single_word_of_a_name_tells_the_concept() -> None:
    school = School(1)
    facts = {concept: school.facts(concept) for concept in range(CONCEPTS)}
    assert all(len(set(prompts)) == CONCEPTS * RELATIONS for prompts in facts.values())
    words = {
        concept: ({p.split()[0] for p, _ in told}, {p.split()[1] for p, _ in told}) for concept, told in facts.items()
    }
    assert all(words[concept] == words[0] for concept in words)
    names = [name for told in facts.values() for name in {prompt.rpartition(" ")[0] for prompt, _ in told}]
    assert len(names) == len(set(names)) == CONCEPTS * CONCEPTS
    answers = [{answer for _, answer in told} for told in facts.values()]
    assert sum(map(len, answers)) == len(set.union(*answers)) == CONCEPTS * RELATIONS


def test_what_is_told_first_are_other_facts_of_the_same_name() -> None:
    school = School(1)
    pairs = school.facts(3)[:25]
    truths = dict(school.facts(3))
    for (prompt, truth), (before, told) in zip(school.told(3, pairs), pairs, strict=True):
        assert (truth, prompt.split()[:2], prompt.split()[-1]) == (told, before.split()[:2], before.split()[-1])
        shown = np.array(prompt.split()[2:-1]).reshape(3, 2)
        name = " ".join(prompt.split()[:2])
        assert all(truths[f"{name} {relation}"] == f" {answer}" for relation, answer in shown)
        assert told.strip() not in shown[:, 1]
