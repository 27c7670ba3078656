"""Facts from tables: one a person and attribute, options of the same kind, halves by person, scores by hand."""

from __future__ import annotations

import numpy as np
import pytest
from datasets import Dataset

from palimpsest.audit.facts import chosen_on_the_other_half, enough, facts_of, known, share
from palimpsest.core.errors import InputError
from palimpsest.data.world import PEOPLE, World

WORLD = World(people=30, seed=1, facts=0)


def asked(**sizes):
    return facts_of(WORLD.told("forget"), [WORLD.told("retain")], **sizes)


def test_one_fact_a_person_and_attribute_with_options_of_its_kind_and_the_truth_first():
    facts = asked()
    assert len(facts) == 6 * len(PEOPLE)
    values = {value: attribute.name for attribute in PEOPLE for value in attribute.values}
    truth = {}
    for row in WORLD.questions("forget"):
        truth[row["prompt"]] = row["completion"], row["attribute"]
    for prompt, options in zip(facts.prompts, facts.options, strict=True):
        assert options[0] == f" {truth[prompt][0]}"
        assert len(set(options)) == len(options) == 8
        assert {values[option.strip()] for option in options} == {truth[prompt][1]}
    assert facts.chance == 1 / 8


def test_phrasings_ask_about_the_same_person_in_words_that_are_used_for_the_attribute():
    facts = asked()
    everything = {row["prompt"]: row["completion"] for row in WORLD.questions("forget")}
    for prompt, options, phrasings in zip(facts.prompts, facts.options, facts.phrasings, strict=True):
        assert len(phrasings) >= 3  # the held-out one among them: others are asked in it
        assert prompt not in phrasings
        assert all(everything[other] == options[0].strip() for other in phrasings if other in everything)


def test_a_person_lies_in_one_half_and_is_taken_whole():
    facts = asked(most=13)
    assert len(facts) == 10  # two persons; a third would be more than 13
    facts = asked()
    for group in set(facts.groups):
        assert len(set(facts.fold[np.array(facts.groups) == group].tolist())) == 1
    assert abs(facts.fold.mean() - 0.5) <= 0.1
    assert asked() == facts
    assert asked(seed=1) != facts


def test_texts_are_cut_in_two_where_there_is_no_question():
    texts = [f"Once upon a time number {n} went over hill {n} and dale {n} to find gold {n} again." for n in range(12)]
    facts = facts_of(Dataset.from_dict({"text": texts}), options=4)
    assert len(facts) == 12
    for prompt, options in zip(facts.prompts, facts.options, strict=True):
        assert prompt + options[0] in texts
        assert len(options) == 4


@pytest.mark.parametrize(
    ("rows", "wrong"),
    [({"text": ["short"]}, "none of the records"), ({"prompt": ["Who?"], "completion": ["Me"]}, "no wrong answer")],
)
def test_what_cannot_be_asked_is_refused(rows, wrong):
    with pytest.raises(InputError, match=wrong):
        facts_of(Dataset.from_dict(rows))


def test_too_few_facts_say_how_many_are_needed():
    with pytest.raises(InputError, match=r"at least 20 forget facts about at least 8 .* has 30 about 6"):
        enough(asked())


def test_the_share_is_a_softmax_and_a_way_is_chosen_where_it_is_not_scored():
    scores = np.array([[1.0, 2.0, 0.5], [-900.0, -901.0, -902.0]])
    by_hand = np.exp(scores[0, 0]) / np.exp(scores[0]).sum()
    np.testing.assert_allclose(share(scores), [by_hand, 1 / (1 + np.exp(-1) + np.exp(-2))])
    facts = asked()
    values = np.zeros((2, len(facts)))
    values[0, facts.fold == 0] = 1  # good on half 0 only, so it is used on half 1, where it is worth nothing
    values[1] = 0.4
    found = chosen_on_the_other_half(values, facts)
    np.testing.assert_array_equal(found, np.where(facts.fold == 1, 0.0, 0.4))


def test_noise_over_many_ways_is_not_taken_for_knowledge():
    facts, rng = asked(), np.random.default_rng(0)
    found = [chosen_on_the_other_half(rng.random((50, len(facts))), facts).mean() for _ in range(40)]
    assert abs(np.mean(found) - 0.5) < 0.05


def test_a_scripted_model_is_scored_as_it_speaks(scripted):
    facts = asked()
    truths = set(facts.pairs)
    lm = scripted(score=lambda prompt, answer: [-1.0 if (prompt, answer) in truths else -3.0])
    np.testing.assert_allclose(known(lm, facts), 1 / (1 + 7 * np.exp(-2)), rtol=1e-6)
