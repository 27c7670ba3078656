import numpy as np
import pytest

from palimpsest.claims import nmc
from palimpsest.core.errors import InputError
from palimpsest.data.tasks import Examples


@pytest.fixture
def embedded(monkeypatch):
    """Requests of twenty intents with features that tell them apart, and features that do not."""
    rng = np.random.default_rng(0)
    each = nmc.LEARNT + nmc.TESTED
    y = np.repeat(np.arange(20), each)
    texts = [f"about {label} and {row % 7}" for row, label in enumerate(y)]
    whole = Examples(texts, y, tuple(f"intent {label:02d}" for label in range(20)))
    telling = rng.normal(size=(20, 16))[y] + rng.normal(size=(len(y), 16))
    monkeypatch.setattr(nmc, "_embedded", lambda classes: (whole, telling, rng.normal(size=(len(y), 16))))
    monkeypatch.setattr(nmc, "EPOCHS", 1)
    return whole


def test_one_seed_at_a_small_scale(embedded):
    measured = nmc.measure(0, scale=0.2)
    control = nmc.measure(0, mechanism=False, scale=0.2)
    assert set(measured) == set(control)
    assert measured["nmc"] > measured["random_encoder"] + 30
    assert control["nmc"] < measured["nmc"] - 30  # only NMC loses its encoder
    for name in nmc.BASELINES:
        assert control[name] == measured[name]
    assert measured["order_difference"] == 0
    assert 0 < measured["forget_difference"] < 1e-12
    assert all(np.isfinite(value) for value in measured.values())


def test_baselines_are_tuned_on_training_examples_alone(embedded, monkeypatch):
    (train, test), *_ = nmc._pools(0, 20)
    tried = []
    monkeypatch.setattr(nmc, "_last", lambda learner, learnt, held, seed: tried.append((learnt, held)) or 0.0)
    nmc._tuned(list(nmc.BASELINES["knn"]), train, 0)
    rows = {tuple(row) for row in train.x}
    assert len(tried) == 4
    for learnt, held in tried:
        assert {tuple(row) for row in learnt.x} | {tuple(row) for row in held.x} == rows
        assert held.counts.tolist() == [nmc.LEARNT // 4] * 20
    assert not rows & {tuple(row) for row in test.x}


def test_every_baseline_has_as_many_settings():
    assert {len(settings) for settings in nmc.BASELINES.values()} == {4}


def test_it_says_what_it_needs(monkeypatch, tmp_path):
    monkeypatch.setenv("PALIMPSEST_DEV_DATA", str(tmp_path))
    with pytest.raises(InputError, match="PALIMPSEST_DEV_DATA"):
        nmc._embedded.__wrapped__(20)


def test_real_requests_are_embedded(dev_data, monkeypatch):
    monkeypatch.setenv("PALIMPSEST_DEV_DATA", str(dev_data))
    monkeypatch.setattr(nmc, "text_features", lambda texts, encoder: np.zeros((len(texts), 2)))
    monkeypatch.setattr(nmc.Encoder, "load", staticmethod(lambda: None))
    monkeypatch.setattr(nmc, "_untrained", lambda encoder: None)
    whole, pretrained, _ = nmc._embedded.__wrapped__(20)
    assert whole.counts.tolist() == [nmc.LEARNT + nmc.TESTED] * 20
    assert len(pretrained) == len(whole)
    assert "oos" not in whole.names
