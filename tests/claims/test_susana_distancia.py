import numpy as np

from palimpsest.claims import susana_distancia


def test_one_seed_at_a_small_scale():
    measured = susana_distancia.measure(0, scale=0.05)
    control = susana_distancia.measure(0, mechanism=False, scale=0.05)
    assert set(measured) == set(control)
    for shot in (1, 5):
        assert measured[f"cross_entropy_{shot}_shot"] == control[f"cross_entropy_{shot}_shot"]
        assert control[f"triplet_{shot}_shot"] == control[f"cross_entropy_{shot}_shot"]  # nothing is added
    assert measured["triplet_5_shot"] != measured["cross_entropy_5_shot"]
    assert all(np.isfinite(value) for value in measured.values())


def test_nothing_that_is_tested_was_trained_on():
    train, valid, test = susana_distancia._pools(3)
    names = [set(part.names) for part in (train, valid, test)]
    assert [len(part) for part in names] == list(susana_distancia.PARTS)
    assert len(set.union(*names)) == 100
    # the cleanest look at a digit: the mean over both sides of its tiles hardly depends on the noise
    assert train.x.shape == (60 * susana_distancia.EACH, 1, 8, 16)
    again = susana_distancia._pools.__wrapped__(3)
    np.testing.assert_array_equal(again[2].x, test.x)
