import numpy as np
import pytest

from palimpsest.claims import raml
from palimpsest.core.seeds import numpy_rng
from palimpsest.models.retrieval import DenseIndex


@pytest.fixture
def embedded(monkeypatch):
    """Sums of word vectors in the place of the encoder's: the claim's own arithmetic is what is tried here."""

    def vectors_of(texts, encoder):
        words = [text.lower().replace(".", "").split() for text in texts]
        return np.stack([sum(numpy_rng(0, word).normal(size=24) for word in one) for one in words]).astype(np.float32)

    monkeypatch.setattr(raml, "vectors_of", vectors_of)
    monkeypatch.setattr("palimpsest.learn.fewshot.raml.vectors_of", vectors_of)
    monkeypatch.setattr(raml, "_world", raml._world.__wrapped__)


def test_one_seed_at_a_small_scale(embedded):
    measured = raml.measure(0, scale=0.04)
    control = raml.measure(0, mechanism=False, scale=0.04)
    assert set(control) <= set(measured)
    for name in control:
        if name.split("_")[0] in ("none", "mean"):
            assert control[name] == measured[name]  # the baselines know nothing of the mechanism
    assert control["raml_invented"] == control["random_invented"] == measured["random_invented"]
    assert all(np.isfinite(value) for value in measured.values())


def test_kinds_to_train_on_are_never_tested_on():
    train, test = raml._parted(raml.kinds(seed=0).texts, 4)
    assert not set(train.names) & set(test.names)
    assert not set(train.x) & set(test.x)
    assert (train.way, test.way) == (12, 8)


def test_passages_by_words_name_the_word():
    world = raml.kinds(invented=True, seed=1)
    rows = raml._by_words(world)
    assert np.mean([world.about[row] == number for number, row in enumerate(rows[:, 0])]) > 0.95


def test_nothing_found_is_no_passage():
    rng = np.random.default_rng(0)
    passages = rng.normal(size=(5, 3)).astype(np.float32)
    rows = DenseIndex(passages).search(passages[:2], 2).rows
    rows[1, 1] = -1
    x = raml._beside(passages[:2], passages, rows)
    assert x.shape == (2, 3, 3)
    assert not x[1, 2].any()
    np.testing.assert_array_equal(x[0, 1], passages[rows[0, 0]])
