import numpy as np
import pytest

from palimpsest.claims import meta_rater

pytest.importorskip("daft")


def test_one_seed_at_a_small_scale():
    measured = meta_rater.measure(0, scale=0.1)
    control = meta_rater.measure(0, mechanism=False, scale=0.1)
    assert set(measured) - set(control) == {"random_x1.5", "random_x2.5", "catch_up"}
    assert 1 <= measured["catch_up"] <= 2.5
    for name in ("random", "single", "uniform", "signal"):
        assert control[name] == measured[name]  # the control changes the learned mixture only
    assert control["learned"] != measured["learned"]
    assert all(np.isfinite(value) for value in measured.values())


def test_catching_up():
    assert meta_rater._catch_up([3.0, 2.0, 1.0], 2.0) == pytest.approx(1.5)
    assert meta_rater._catch_up([3.0, 2.0, 1.0], 2.5) == pytest.approx(1.5**0.5)
    assert meta_rater._catch_up([3.0, 2.0, 1.0], 0.5) == 2.5
    assert meta_rater._catch_up([3.0, 3.5, 1.0], 3.2) == 1


def test_documents_have_the_sides_that_the_scores_see():
    documents = meta_rater._documents(0, "pool", 1500)
    scores = dict(zip(meta_rater.SCORES, documents.scores.T, strict=True))
    about = np.array([sum(word in text for word in meta_rater._words(True)) for text in documents.texts])
    clean = np.array([1 - sum(text.count(letter) for letter in "xqzjw#@%") / len(text) for text in documents.texts])
    varied = np.array([len(set(text.split(", "))) for text in documents.texts])

    def correlation(a, b):
        return np.corrcoef(a, b)[0, 1]

    assert correlation(scores["subject"], about) > 0.5
    assert correlation(scores["clean"], clean) > 0.5
    legible = clean > 0.97  # two garbled copies of a statement differ
    assert correlation(scores["varied"][legible], varied[legible]) > 0.4
    assert correlation(scores["fluent"][legible], varied[legible]) < -0.4
    assert abs(correlation(scores["noise_a"], about)) < 0.1
    assert correlation(scores["subject"], scores["clean"]) < 0  # the trade-off


def test_good_documents_reason():
    first, *rest = meta_rater._good(0, "test", 1)[0].split(", ")
    for statement in rest:
        assert statement.split(" is ")[0] == first.split(" is ")[1]
        first = statement
