from __future__ import annotations

import numpy as np
import pytest

from palimpsest.core.errors import InputError
from palimpsest.data.episodes import Episodes
from palimpsest.data.evaluation import Scores, evaluate, in_words, interval
from palimpsest.data.tasks import Examples


def test_scores_of_known_and_unknown_queries():
    scores = Scores(np.array([[0, 1, 2, 2], [0, 0, 0, 2]]), np.array([[0, 0, 2, 2], [0, 1, 2, 2]]), 2)
    assert scores.accuracy.tolist() == [0.75, 0.5]
    assert scores.known.tolist() == [0.5, 0.5]
    assert scores.none_recall is not None
    assert scores.none_recall.tolist() == [1.0, 0.5]
    assert scores.none_precision == 1.0
    closed = Scores(np.array([[0, 1]]), np.array([[0, 1]]), 2)
    assert closed.none_recall is None
    assert closed.none_precision is None


def test_the_interval_of_the_field():
    values = np.array([0.2, 0.4, 0.6, 0.8])
    mean, low, high = interval(values)
    half = 1.96 * np.std(values, ddof=1) / 2
    assert (mean, low, high) == pytest.approx((0.5, 0.5 - half, 0.5 + half))
    assert in_words(values) == f"50.00 ± {100 * half:.2f} %"


class Nearest:
    """A learner of the simplest kind: only `adapt`."""

    def __init__(self, shift=0):
        self.shift = shift

    def adapt(self, task):
        def answer(x):
            return abs(np.asarray(x)[:, None, 0] - task.support.x[None, :, 0]).argmin(1) + self.shift

        return answer


def test_any_learner_can_be_evaluated():
    y = np.repeat(np.arange(5), 10)
    pool = Examples(y[:, None].astype(np.float32), y, tuple("abcde"))
    episodes = Episodes(pool=pool, way=3, queries=2, count=10)
    assert evaluate(Nearest(), episodes).accuracy.tolist() == [1.0] * 10
    assert evaluate(Nearest(), episodes, count=3).accuracy.shape == (3,)
    with pytest.raises(InputError, match="wanted 0 to 3"):
        evaluate(Nearest(shift=7), episodes)
