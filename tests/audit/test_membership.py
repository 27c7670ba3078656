from __future__ import annotations

import zlib

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from palimpsest.audit import membership
from palimpsest.core.errors import InputError

LOGPROBS = st.lists(st.floats(-20, 0, width=32), min_size=1, max_size=30)


def test_min_k_is_minus_the_mean_of_the_least_likely_tokens():
    row = np.array([-1.0, -4.0, -2.0, -8.0, -3.0], dtype=np.float32)
    assert membership.min_k([row], 40) == pytest.approx([6.0])  # -8 and -4
    assert membership.min_k([row], 100) == pytest.approx(membership.loss([row]))


def test_min_k_of_a_short_text_looks_at_one_token_at_least():
    assert membership.min_k([np.array([-1.0, -3.0])], 10) == pytest.approx([3.0])


@given(row=LOGPROBS, k=st.floats(1, 100), more=st.floats(0, 99))
def test_min_k_falls_with_k_and_is_never_below_the_loss(row: list[float], k: float, more: float):
    values = [np.array(row, dtype=np.float32)]
    narrow, wide = membership.min_k(values, k)[0], membership.min_k(values, min(k + more, 100))[0]
    assert narrow >= wide - 1e-9
    assert wide >= membership.loss(values)[0] - 1e-9


@pytest.mark.parametrize("k", [0, -5, 101])
def test_k_is_a_percentage(k: float):
    with pytest.raises(InputError, match="percentage"):
        membership.min_k([np.array([-1.0])], k)


def test_a_text_without_tokens_is_named():
    with pytest.raises(InputError, match="text 1 has no token"):
        membership.min_k([np.array([-1.0]), np.array([])])


def test_loss_relative_to_compressed_length_and_to_the_lowercased_text():
    rows = [np.array([-2.0, -4.0])]
    assert membership.zlib_ratio(rows, ["Abc"]) == pytest.approx([3 / len(zlib.compress(b"Abc"))])
    assert membership.lowercase_ratio(rows, [np.array([-6.0])]) == pytest.approx([0.5])


def test_orientation_a_memorised_forget_set_has_auc_0_and_a_scrubbed_one_1():
    low, high = [0.1, 0.2], [3.0, 4.0]
    assert membership.forget_auc(low, high) == 0
    assert membership.forget_auc(high, low) == 1
    assert membership.forget_auc([1.0, 1.0], [1.0]) == 0.5


@pytest.mark.parametrize(("auc", "most"), [(0.4772, 109.6), (0.5393, 85.4)])
def test_feasible_leakage_of_the_released_references(auc: float, most: float):
    """The bounds that follow from MUSE's News and Books constants; News' over-scrubbed methods score exactly 109.6."""
    least, largest = membership.feasible(auc)
    assert least == -100
    assert largest == pytest.approx(most, abs=0.1)
    assert membership.privacy_leakage(auc, auc) == 0


def test_leakage_is_refused_where_the_reference_has_no_auc_to_speak_of():
    with pytest.raises(InputError, match=r"below 0\.05"):
        membership.privacy_leakage(0.5, 0.049)
    assert membership.privacy_leakage(0.5, 0.05) == pytest.approx(900)


@given(
    forget=st.lists(st.integers(0, 5), min_size=1, max_size=9),
    holdout=st.lists(st.integers(0, 5), min_size=1, max_size=9),
)
def test_placements_average_to_the_auc(forget: list[int], holdout: list[int]):
    one, other = np.array(forget, float), np.array(holdout, float)
    assert membership.placements(one, other).mean() == pytest.approx(membership.forget_auc(one, other))


def test_leakage_interval_agrees_with_resampling_one_by_one():
    rng = np.random.default_rng(0)
    forget, holdout = rng.normal(0.3, 1, 40), rng.normal(0, 1, 50)
    reference = forget + rng.normal(0, 0.5, 40), holdout + rng.normal(0, 0.5, 50)
    draws = []
    for _ in range(1500):
        f, h = rng.integers(40, size=40), rng.integers(50, size=50)
        after, fixed = (
            membership.forget_auc(forget[f], holdout[h]),
            membership.forget_auc(reference[0][f], reference[1][h]),
        )
        draws.append(100 * (after - fixed) / fixed)
    low, high = membership.leakage_interval((forget, holdout), reference)
    spread = np.quantile(draws, 0.975) - np.quantile(draws, 0.025)
    assert low == pytest.approx(np.quantile(draws, 0.025), abs=spread / 8)
    assert high == pytest.approx(np.quantile(draws, 0.975), abs=spread / 8)


def test_leakage_interval_of_the_reference_itself_is_zero():
    rng = np.random.default_rng(1)
    scores = rng.normal(size=20), rng.normal(size=20)
    assert membership.leakage_interval(scores, scores) == (0, 0)


def test_leakage_interval_does_not_collapse_under_perfect_separation():
    rng = np.random.default_rng(2)
    after = rng.normal(-50, 1, 10), rng.normal(50, 1, 10)
    low, high = membership.leakage_interval(after, (rng.normal(size=10), rng.normal(size=10)))
    assert low == pytest.approx(-100)
    assert -99 < high < 0


def test_one_text_has_no_interval():
    one = np.array([1.0]), np.array([1.0, 2.0])
    assert membership.leakage_interval(one, one) == (None, None)
