import numpy as np
import pytest

from palimpsest.core.errors import InputError
from palimpsest.data.kinds import CUES, kinds


def test_only_the_passages_tell_of_which_kind_a_word_is():
    world = kinds(invented=True, seed=3)
    assert (len(world.texts), world.texts.way, len(world.passages)) == (240, 20, 840)
    assert (np.bincount(world.about[world.about >= 0]) == CUES).all()
    assert not world.false.any()
    for number, text in enumerate(world.texts.x[:40]):
        told = [world.passages[row] for row in np.flatnonzero(world.about == number)]
        words = set.intersection(*(set(one.lower().strip(".").replace(",", "").split()) for one in [text, *told]))
        assert len(words - {"the"}) >= 1  # its name
    text = " ".join([*world.texts.x, *world.passages]).lower()
    assert not any(f" {name} " in text for name in ("bird", "vehicle", "furniture", "mammal", "profession", "weapon"))


def test_falsehoods_are_told_with_the_words_of_another_kind():
    true, half = kinds(seed=1), kinds(seed=1, false=0.5)
    assert 0.4 < half.false[half.about >= 0].mean() < 0.6
    assert true.texts.x == half.texts.x
    words = [text.replace(".", "").split() for text in half.texts.x]
    for row in np.flatnonzero(half.false)[:20]:
        assert set(half.passages[row].replace(".", "").replace(",", "").split()) & set(words[half.about[row]])


def test_it_can_be_repeated_and_refuses_no_share():
    assert kinds(seed=2).passages == kinds(seed=2).passages
    assert kinds(seed=2).passages != kinds(seed=3).passages
    with pytest.raises(InputError, match="share of the passages"):
        kinds(false=1.5)
