from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from palimpsest.core.errors import InputError
from palimpsest.models.gate import Gate, conformal_threshold

INSIDE = [
    f"{verb} the {thing} of the dragon" for verb in ("Describe", "Draw") for thing in ("wings", "fire", "cave", "egg")
]
OUTSIDE = [
    f"{verb} the {thing} bill" for verb in ("Pay", "Send") for thing in ("water", "phone", "heating", "hotel", "bar")
]

probabilities = st.lists(st.floats(0, 1), min_size=8, max_size=40)


@pytest.fixture(scope="module")
def gate() -> Gate:
    return Gate.fit(INSIDE, OUTSIDE)


def test_it_tells_unseen_texts_apart_by_meaning(gate: Gate) -> None:
    assert gate(["Describe the wings and the fire of the dragon", "Draw the cave of the dragon with its egg"]).all()
    assert (gate.probability(["What does a dragon breathe?", "Where does the dragon sleep?"]) > 0.5).all()
    assert not gate(["How much is the electricity invoice?", "What is a good restaurant?"]).any()
    found = gate.probability(["dragon", "invoice", ""])
    assert found[0] > 0.5 > found[1]
    assert found[2] == 0.0, "an empty text is in no scope"
    assert not gate([""])[0]
    assert gate([]).shape == (0,)


def test_probability_is_the_logistic_of_the_embedding(gate: Gate) -> None:
    from palimpsest.models.encoder import Encoder

    vector = Encoder.load().embed(["an old dragon"]).astype(np.float64)[0]
    expected = 1 / (1 + math.exp(-(sum(float(w) * v for w, v in zip(gate.weights, vector, strict=True)) + gate.bias)))
    assert gate.probability(["an old dragon"])[0] == pytest.approx(expected, abs=1e-9)


def test_the_two_sides_weigh_the_same() -> None:
    many = Gate.fit(INSIDE, [*OUTSIDE, *(f"{word} invoice number {n}" for n in range(30) for word in ("Old", "New"))])
    assert many(["the wings of the dragon"])[0]


@pytest.mark.parametrize("rule", ["strict", "cautious"])
def test_threshold_by_hand(rule: str) -> None:
    inside = np.array([0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3, 0.2, 0.15])
    outside = np.array([0.01, 0.02, 0.03, 0.04, 0.05, 0.1, 0.25, 0.45, 0.55])
    # n = 9, error 0.2: the ceil(10 * 0.8) = 8th smallest nonconformity: inside 1 - 0.2, outside 0.45
    threshold = conformal_threshold(inside, outside, error=0.2, rule=rule)  # type: ignore[arg-type]
    assert threshold == pytest.approx(0.45 if rule == "strict" else 0.2)
    assert (threshold < 0.2) == (rule == "cautious"), "at the quantile itself a class is still in the set"


@given(probabilities, probabilities, st.sampled_from([0.05, 0.1, 0.3]))
def test_errors_on_the_calibration_texts_are_bounded(inside: list[float], outside: list[float], error: float) -> None:
    inside_, outside_ = np.array(inside), np.array(outside)
    strict = conformal_threshold(inside_, outside_, error=error, rule="strict")
    cautious = conformal_threshold(inside_, outside_, error=error, rule="cautious")
    assert (outside_ > strict).mean() <= error
    assert (inside_ <= cautious).mean() <= error
    assert cautious <= strict


def test_state_and_restore(gate: Gate) -> None:
    again = Gate.restore(*gate.state())
    texts = ["a dragon", "an invoice", "something else"]
    assert np.array_equal(again.probability(texts), gate.probability(texts))
    assert again.threshold == gate.threshold


def test_a_given_threshold_is_kept() -> None:
    assert Gate.fit(INSIDE, OUTSIDE, threshold=0.99).threshold == 0.99


def test_bad_input() -> None:
    with pytest.raises(InputError, match="at least 5 different texts inside its scope, not 1"):
        Gate.fit(["a"] * 9, OUTSIDE)
    with pytest.raises(InputError, match="outside its scope, not 0"):
        Gate.fit(INSIDE, [])
    with pytest.raises(InputError, match="1 texts are both inside and outside"):
        Gate.fit(INSIDE, [*OUTSIDE, INSIDE[3]])
    with pytest.raises(InputError, match="threshold must lie between 0 and 1"):
        Gate.fit(INSIDE, OUTSIDE, threshold=1.0)
    with pytest.raises(InputError, match="error must lie between 0 and 1"):
        Gate.fit(INSIDE, OUTSIDE, error=0.0)
