import numpy as np
import pytest

from palimpsest.claims import gpam
from palimpsest.core.errors import InputError
from palimpsest.data.tasks import Examples

CLASSES, EACH = 64, 12


@pytest.fixture
def embedded(monkeypatch):
    """Random features in the place of embedded sentences: the claim's own arithmetic is what is tried here."""
    rng = np.random.default_rng(0)
    y = np.repeat(np.arange(CLASSES), EACH)
    x = rng.normal(size=(CLASSES, 1, 16))[y] + 0.5 * rng.normal(size=(len(y), 4, 16))
    pool = Examples(x.astype(np.float32), y, tuple(f"P{n}" for n in range(CLASSES)))
    monkeypatch.setattr(gpam, "_embedded", lambda each: pool)


def test_one_seed_at_a_small_scale(embedded):
    measured = gpam.measure(0, scale=0.05)
    control = gpam.measure(0, mechanism=False, scale=0.05)
    assert set(measured) == set(control)
    for name in measured:
        if not name.startswith("gpam_"):
            assert control[name] == measured[name]  # the baselines know nothing of the mechanism
    assert control["gpam_half"] != measured["gpam_half"]
    assert all(np.isfinite(value) for value in measured.values())
    assert measured["baseline_half"] in [measured[f"{name}_half"] for name in ("protobias", "oproto", "mnav")]


def test_the_relations_are_apart(embedded):
    parts = [set(pool.names) for pool in gpam._pools(1, EACH)]
    assert [len(part) for part in parts] == [40, 10, 14]
    assert len(set.union(*parts)) == CLASSES


def test_it_says_what_it_needs(monkeypatch, tmp_path):
    monkeypatch.setenv("PALIMPSEST_DEV_DATA", str(tmp_path))
    with pytest.raises(InputError, match="PALIMPSEST_DEV_DATA"):
        gpam._embedded.__wrapped__(12)


def test_real_sentences_are_embedded(dev_data, monkeypatch):
    monkeypatch.setenv("PALIMPSEST_DEV_DATA", str(dev_data))
    monkeypatch.setattr(gpam, "relation_features", lambda relations, encoder, views: np.zeros((len(relations), 4, 2)))
    monkeypatch.setattr(gpam.Encoder, "load", staticmethod(lambda: None))
    pool = gpam._embedded.__wrapped__(3)
    assert len(pool) == 64 * 3
    assert "P1001" in pool.names
