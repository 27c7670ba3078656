import math

import pytest

from palimpsest.core.errors import InputError
from palimpsest.curate import Signals, pool
from palimpsest.curate.signals import SIGNALS, signals


def test_each_signal_by_hand():
    found = dict(zip(SIGNALS, signals("The cat saw 3 cats.\nTHE CAT 42"), strict=True))
    assert found == pytest.approx(
        {
            "words": 8,
            "word_length": 23 / 8,
            "words_without_letters": 2 / 8,
            "unique_words": 6 / 8,
            "entropy": -2 * (2 / 8) * math.log(2 / 8) - 4 * (1 / 8) * math.log(1 / 8),
            "sentences": 1,
            "terminated_lines": 1 / 2,
            "digits": (1 / 19 + 2 / 10) / 2,
            "capitals": (1 / 19 + 6 / 10) / 2,
            "top_bigram": 12 / 23,
            "top_trigram": 0,
        }
    )
    assert not signals("").any()
    assert not signals(" \n").any()


def test_columns_are_added():
    frame = pool.require_daft().from_pydict({"text": ["one two", None], "n": [1, 2]})
    assert Signals(only="words, digits")(frame).to_pylist() == [
        {"text": "one two", "n": 1, "score_words": 2.0, "score_digits": 0.0},
        {"text": None, "n": 2, "score_words": 0.0, "score_digits": 0.0},
    ]
    assert len(Signals()(frame).column_names) == 2 + 11
    with pytest.raises(InputError, match="unknown signal 'wordz'; known: words"):
        Signals(only="wordz")(frame)
