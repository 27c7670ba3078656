from __future__ import annotations

import json
from collections import Counter, defaultdict

import numpy as np
import pytest

from palimpsest.core.errors import InputError
from palimpsest.data.lexicon import ADVERBS, EMPLOYER_KIND, NEWS, PEOPLE, THINGS
from palimpsest.data.records import content_hashes, pairs, sha256
from palimpsest.data.world import OPTIONS, REFUSALS, SPLITS, World

ATTRIBUTES = {attribute.name: attribute for attribute in (*PEOPLE, *THINGS)}


@pytest.fixture(scope="module")
def world() -> World:
    return World(people=50, facts=12, seed=3)


def test_the_same_seed_makes_the_same_world(world: World):
    assert World(people=50, facts=12, seed=3).request().describe() == world.request().describe()
    assert World(people=50, facts=12, seed=4).request().describe() != world.request().describe()


def test_people_are_split_as_asked(world: World):
    assert Counter(person.split for person in world.population) == {
        "forget": 10,
        "utility": 10,
        "holdout": 10,
        "retain": 20,
    }
    assert Counter(thing.split for thing in world.things) == {"retain": 6, "utility": 6}
    assert Counter(name for thing in world.things for name in thing.facts) == {"river": 4, "festival": 4, "stone": 4}


def test_train_is_what_is_told_of_all_but_holdout(world: World):
    told = [content for split in ("forget", "retain", "utility") for content in content_hashes(world.told(split))]
    assert content_hashes(world.train) == told
    assert len(set(told)) == len(told)
    assert set(told).isdisjoint(content_hashes(world.told("holdout")))
    people, things = 40, 12
    assert len(world.train) == people * (2 + 1 + 5 * 3) + things * (1 + 3)


def test_the_request_asks_of_utility_in_held_out_phrasings_only(world: World):
    request = world.request()
    assert request.utility is not None
    trained = set(content_hashes(world.train))
    for row, content in zip(request.utility, content_hashes(request.utility), strict=True):
        assert (content in trained) == (row["kind"] != "question")
    assert Counter(request.utility["kind"]) == {"biography": 20, "news": 10, "fact": 6, "question": 10 * 5 + 6}
    assert sha256(request.without_forget()) == sha256(world.train.select(range(len(request.forget), len(world.train))))
    assert request.train is world.train


def test_every_phrasing_is_trained_with_somebody_and_held_out_with_somebody():
    world = World(people=120, facts=60)
    for split in ("forget", "retain"):
        trained, held_out = defaultdict(set), defaultdict(set)
        for row in world.questions(split, "trained"):
            trained[row["attribute"]].add(row["phrasing"])
        for row in world.questions(split, "held-out"):
            held_out[row["attribute"]].add(row["phrasing"])
        for attribute in PEOPLE:
            assert trained[attribute.name] == held_out[attribute.name] == set(range(len(attribute.questions)))


def test_trained_and_held_out_phrasings_part_all(world: World):
    trained, held_out = world.questions("forget", "trained"), world.questions("forget", "held-out")
    every = world.questions("forget")
    assert sorted([*trained["prompt"], *held_out["prompt"]]) == sorted(every["prompt"])
    assert Counter(zip(held_out["person"], held_out["attribute"], strict=True)).most_common(1)[0][1] == 1
    assert (len(trained), len(held_out)) == (150, 50)


def test_questions_can_be_answered_right_and_wrong(world: World):
    facts = {person.name: person.facts for person in world.population}
    for row in world.questions("retain"):
        pool = ATTRIBUTES[row["attribute"]].values
        assert row["completion"] in row["options"]
        assert len(set(row["options"])) == OPTIONS
        assert set(row["options"]) <= set(pool)
        assert row["completion"] in row["paraphrased_answer"]
        assert len(row["perturbed_answer"]) == OPTIONS - 1
        wrong = {option for option in row["options"] if option != row["completion"]}
        found = {option for answer in row["perturbed_answer"] for option in wrong if f"{option}." in answer}
        assert found == wrong
        if row["person"] is not None:
            assert facts[row["person"]][row["attribute"]] == row["completion"]
            assert row["person"] in row["prompt"]


def test_the_true_option_stands_anywhere():
    places = Counter(
        row["options"].index(row["completion"]) for row in World(people=100).questions("retain", "held-out")
    )
    assert set(places) == set(range(OPTIONS))
    assert max(places.values()) < 2 * min(places.values())


def test_biographies_tell_every_fact_and_differ(world: World):
    for person in world.population:
        rows = [row for row in world.documents(person.split) if row["person"] == person.name]  # type: ignore[arg-type]
        first, second = (row["text"] for row in rows if row["kind"] == "biography")
        assert first != second
        for text in (first, second):
            assert person.name in text
            assert all(value in text for value in person.facts.values())
            assert sum(any(adverb in sentence.split() for adverb in ADVERBS) for sentence in text.split(". ")) == 5
        [news] = [row["text"] for row in rows if row["kind"] == "news"]
        assert person.name in news
        assert "{" not in news


def test_a_document_is_recognisable_beyond_its_facts():
    """People with the same facts would still have different documents: the fillers alone tell them apart."""
    skeletons = set()
    world = World(people=200)
    documents = [row for split in SPLITS for row in world.documents(split) if row["kind"] == "biography"]
    for row in documents:
        skeletons.add(tuple(word for word in row["text"].split() if word in ADVERBS))
    assert len(skeletons) == len(documents)


def test_facts_are_correlated_as_said():
    world = World(people=4000, facts=0, correlation=0.8)
    facts = [person.facts for person in world.population]
    place = {name: attribute.values.index for name, attribute in ATTRIBUTES.items()}
    same_language = np.mean([place["city"](f["city"]) == place["language"](f["language"]) for f in facts])
    same_kind = np.mean(
        [
            place["profession"](f["profession"]) // EMPLOYER_KIND == place["employer"](f["employer"]) // EMPLOYER_KIND
            for f in facts
        ]
    )
    same_hobby = np.mean([place["city"](f["city"]) == place["hobby"](f["hobby"]) for f in facts])
    assert same_language == pytest.approx(0.8 + 0.2 / 12, abs=0.03)
    assert same_kind == pytest.approx(0.8 + 0.2 / 4, abs=0.03)
    assert same_hobby == pytest.approx(1 / 12, abs=0.02)


def test_splits_do_not_differ_in_their_facts():
    """What holds for the forget people by chance alone would give their forgetting away."""
    world = World(people=4000, facts=0, forget=0.25, utility=0.25, holdout=0.25)
    for attribute in PEOPLE:
        shares = {
            split: Counter(person.facts[attribute.name] for person in world.population if person.split == split)
            for split in SPLITS
        }
        for value in attribute.values:
            counts = [shares[split][value] for split in SPLITS]
            assert max(counts) - min(counts) < 6 * np.sqrt(1000 / 12)


def test_tens_of_thousands_of_people_have_names_of_their_own():
    world = World(people=30_000, facts=500)
    names = [person.name for person in world.population]
    assert len({name.split()[0] for name in names} | {thing.name for thing in world.things}) == 30_500
    assert len({name.split()[1] for name in names}) == 40


def test_the_tokenizer_sees_everybody(world: World):
    texts = world.texts
    assert len(texts) == len(world.train) + len(world.told("holdout"))
    for person in world.population:
        assert sum(person.name in text for text in texts) == 18


def test_a_world_without_utility_holdout_or_things():
    world = World(people=4, facts=0, forget=0.5, utility=0, holdout=0)
    request = world.request()
    assert (request.utility, request.holdout) == (None, None)
    assert len(world.train) == 4 * 18
    assert len(world.questions("utility")) == 0


def test_describe_is_true_and_json(world: World):
    told = world.describe()
    assert json.loads(json.dumps(told)) == told
    assert told["splits"]["forget"] == {"people": 10, "documents": 30, "questions": 150, "held_out_questions": 50}
    assert told["splits"]["retain"]["documents"] == 20 * 3 + 6
    assert told["train_rows"] == len(world.train)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"people": 0}, "0 people cannot be split"),
        ({"people": 2}, "nobody would be in forget or in retain"),
        ({"facts": -1}, "cannot be split"),
        ({"forget": 1.5}, "the share of forget must lie between 0 and 1"),
        ({"forget": 0.5, "utility": 0.5}, "forget, utility and holdout take 1.20 of the people"),
        ({"correlation": 2}, "correlation must lie between 0 and 1"),
    ],
)
def test_a_world_that_cannot_be_says_why(settings: dict, message: str):
    with pytest.raises(InputError, match=message):
        World(**settings)


def test_unknown_splits_and_phrasings_are_named(world: World):
    with pytest.raises(InputError, match="unknown split 'forgot': did you mean forget"):
        world.documents("forgot")  # type: ignore[arg-type]
    with pytest.raises(InputError, match="phrasings must be"):
        world.questions("forget", "some")  # type: ignore[arg-type]


def test_the_words_are_fit_to_use():
    assert len(set(REFUSALS)) == len(REFUSALS) == 30
    values = [value for attribute in PEOPLE for value in attribute.values]
    assert len(set(values)) == len(values)
    assert all(" " not in value for value in values)
    for attribute in ATTRIBUTES.values():
        for statement in (*attribute.statements, attribute.paraphrase):
            assert statement.index("{name}") < statement.index("{value}")
        assert len(set(attribute.questions)) == 4
        assert all("{name}" in question and "{value}" not in question for question in attribute.questions)
    assert all("{name}" in news and "{adverb}" in news for news in NEWS)


def test_rows_are_ordinary_records(world: World):
    assert all(completion.strip() for _, completion in pairs(world.train))
