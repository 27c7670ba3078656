from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from palimpsest.core.errors import InputError
from palimpsest.data.relations import PLACEHOLDERS, Relation, hidden, parse, renamed, semifactuals, thinned

ROW = {
    "tokens": ["the", "city", "of", "new", "york", "was", "home", "to", "mary", "."],
    "head": ["mary", "Q1", [[8]]],
    "tail": ["new york", "Q2", [[3, 4]]],
}
MARY = Relation(tuple(ROW["tokens"]), (8, 9), (3, 5))


def test_a_row_of_fewrel():
    assert parse(ROW, "x:1") == MARY
    assert parse({"tokens": ROW["tokens"], "h": ROW["head"], "t": ROW["tail"]}, "x:1") == MARY
    assert MARY.mentions == ("mary", "new york")
    assert MARY.text.startswith("the city of new york")


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"tokens": "a sentence"}, "x:7: 'tokens' must be a list of words"),
        ({"head": ["mary", "Q1", []]}, "x:7: 'head' must be"),
        ({"tail": None}, "x:7: 'tail' must be"),
        ({"tail": ["york", "Q2", [[12]]]}, r"the positions \[12\] in a sentence of 10 words"),
        ({"tail": ["mary", "Q1", [[8]]]}, "the same words, or overlap"),
    ],
)
def test_rows_that_cannot_be_used(changes, words):
    with pytest.raises(InputError, match=words):
        parse(ROW | changes, "x:7")


def test_other_names_and_none():
    other = renamed(MARY, ["john", "smith"], ["paris"])
    assert other.text == "the city of paris was home to john smith ."
    assert other.mentions == ("john smith", "paris")
    assert hidden(MARY).mentions == PLACEHOLDERS


@given(st.integers(0, 10_000), st.sampled_from([0.0, 0.15, 1.0]))
def test_a_thinner_sentence_keeps_its_mentions(seed, share):
    thin = thinned(MARY, np.random.default_rng(seed), share)
    assert thin.mentions == MARY.mentions
    assert len(thin.words) >= 3
    if share == 1.0:
        assert thin.words == ("new", "york", "mary")
    if share == 0.0:
        assert thin == MARY


def test_views_are_three_and_repeat():
    relations = [MARY, renamed(MARY, ["john"], ["rome"]), renamed(MARY, ["ann", "lee"], ["oslo"])]
    views = semifactuals(relations, seed=1)
    assert views == semifactuals(relations, seed=1)
    heads = {one.mentions[0] for one in relations}
    assert all(named.mentions[0] in heads for named, _, _ in views)
    assert sorted(named.mentions[0] for named, _, _ in views) == sorted(heads)
    assert all(quiet.mentions == PLACEHOLDERS for _, quiet, _ in views)
