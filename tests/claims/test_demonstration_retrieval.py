import numpy as np
import pytest

from palimpsest.claims import demonstration_retrieval as claim
from palimpsest.core.seeds import numpy_rng
from palimpsest.data.lexicon import PEOPLE


@pytest.fixture
def embedded(monkeypatch):
    """Sums of word vectors in the place of the encoder's: the claim's own arithmetic is what is tried here."""

    def vectors_of(texts, encoder):
        words = [text.replace("?", "").split() for text in texts]
        vectors = [sum(numpy_rng(0, word).normal(size=48) for word in one) for one in words]
        return np.stack([vector / np.linalg.norm(vector) for vector in vectors]).astype(np.float32)

    monkeypatch.setattr("palimpsest.learn.fewshot.demonstration_retrieval.vectors_of", vectors_of)


def test_one_seed_at_a_small_scale(embedded):
    measured = claim.measure(0, scale=0.04)
    control = claim.measure(0, mechanism=False, scale=0.04)
    assert set(control) <= set(measured)
    for name in ("none", "random", "closed_book", "new_form_random"):
        assert control[name] == measured[name]  # the baselines know nothing of the mechanism
    assert control["retrieved"] == control["random"]
    assert control["recall"] < measured["recall"]
    assert all(np.isfinite(value) for value in measured.values())


def test_facts_stand_once_in_the_bank_and_are_asked_in_other_words():
    world = claim.Facts.drawn(3, 30)
    bank, asked, unseen = world.bank(), world.questions(world.asked), world.questions(world.unseen)
    assert len({row.question for row in bank}) == len(bank) == 30 * len(PEOPLE)
    assert not {row.question for row in bank} & {row.question for row in [*asked, *unseen]}
    assert not {row.question for row in asked} & {row.question for row in unseen}
    assert [row.answer for row in bank] == [row.answer for row in [*asked, *unseen]]
    assert claim.Facts.drawn(4, 30).names == world.names
    assert [row.answer for row in claim.Facts.drawn(4, 30).bank()] != [row.answer for row in bank]


def test_the_new_form_names_the_answer_and_another_value():
    world = claim.Facts.drawn(3, 30)
    for row in world.choices(world.asked, 50, np.random.default_rng(0)):
        named = [value for about in PEOPLE for value in about.values if value in row.question.replace("?", "").split()]
        assert row.answer in named
        assert len(set(named)) == 2
