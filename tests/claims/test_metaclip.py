import numpy as np
import pytest

from palimpsest.claims import metaclip

pytest.importorskip("daft")


def test_one_seed_at_a_small_scale():
    measured = metaclip.measure(0, scale=0.08)
    control = metaclip.measure(0, mechanism=False, scale=0.08)
    assert set(control) < set(measured)
    assert {"quarter_t", "four_t"} <= set(measured) - set(control)
    for name in ("raw", "matched", "random"):
        assert control[name] == measured[name]  # the control changes one arm only
    assert 0 < measured["share_kept"] == control["share_kept"] < 1
    assert metaclip.measure(0, scale=0.08) == measured


def test_the_pool_is_what_the_claim_says():
    pool = metaclip._pool(0, 6_000)
    frequency = np.sort(np.bincount(pool.concepts, minlength=128))[::-1] / 6_000
    assert frequency[0] / frequency[9] == pytest.approx(10**1.3, rel=0.3)
    words = {*metaclip.SHAPES, *metaclip.COLOURS, *metaclip.SYNONYMS.values()}
    plain = np.array([not words & set(text.split()) for text in pool.texts])
    assert plain.mean() == pytest.approx(0.4 * 0.8, abs=0.03)
    matched, probabilities = metaclip._curated(pool, 0)
    assert set(matched) == set(np.flatnonzero(~plain))
    assert (probabilities["quarter_t"] <= probabilities["balanced"] + 1e-12).all()
    assert (probabilities["balanced"] <= probabilities["four_t"] + 1e-12).all()


def test_a_picture_shows_its_concept():
    concepts = np.arange(128)
    pictures = metaclip._pictures(concepts, np.random.default_rng(0)).astype(int)
    for concept, picture in zip(concepts, pictures, strict=True):
        _, colour, _ = metaclip.CONCEPTS[concept]
        lit = picture[:, picture.max(0) > 120]
        wanted = metaclip.RGB[colour] / metaclip.RGB[colour].max()
        assert lit.shape[1] > 10
        assert np.abs(lit.mean(1) / lit.mean(1).max() - wanted).max() < 0.1
