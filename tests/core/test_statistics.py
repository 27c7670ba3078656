import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from palimpsest.core.statistics import (
    auc,
    auc_interval,
    bootstrap,
    bootstrap_interval,
    holm,
    paired_difference,
    paired_p,
)


def test_the_mean_of_normal_values_gets_the_classical_interval():
    values = np.random.default_rng(0).normal(3, 2, 400)
    interval = bootstrap(values)
    half = 1.96 * values.std(ddof=1) / math.sqrt(400)
    assert interval.method == "BCa"
    assert interval.value == pytest.approx(values.mean())
    assert interval.low == pytest.approx(values.mean() - half, abs=0.1 * half)
    assert interval.high == pytest.approx(values.mean() + half, abs=0.1 * half)


def test_the_interval_depends_on_the_seed_alone():
    values = [0.1, 0.4, 0.2, 0.9, 0.5]
    first = bootstrap(values)
    np.random.seed(5)
    assert bootstrap(values) == first
    assert bootstrap(values, seed=1) != first
    assert bootstrap(values, confidence=0.5).high < first.high


def test_few_values_have_too_narrow_intervals_as_documented():
    """Five values: about 84% of the 95% intervals hold the true mean (binomial noise of 300 draws: 2.1 points)."""
    samples = np.random.default_rng(0).normal(size=(300, 5))
    intervals = [bootstrap(sample, resamples=1000) for sample in samples]
    assert np.mean([i.low <= 0 <= i.high for i in intervals]) == pytest.approx(0.84, abs=0.06)


def test_the_median_and_a_statistic_of_ones_own():
    values = np.random.default_rng(1).exponential(size=101)
    assert bootstrap(values, "median").value == np.median(values)
    largest = bootstrap(values, np.max)
    assert largest.value == values.max()
    assert largest.low <= values.max()


def test_equal_values_are_a_point_and_say_so():
    interval = bootstrap([0.3] * 4)
    assert (interval.value, interval.low, interval.high) == (0.3, 0.3, 0.3)
    assert interval.method == "point: all 4 values are equal"


def test_where_bca_is_undefined_the_percentile_interval_says_so():
    interval = bootstrap([1, 1, 1, 1, 2.0], "median")  # no resample has a median below 1
    assert (interval.low, interval.high) == (1, 2)
    assert interval.method.startswith("percentile: ")


def test_one_value_has_no_interval():
    interval = bootstrap([2.0])
    assert (interval.value, interval.low, interval.high) == (2.0, None, None)
    assert bootstrap_interval([2.0]) == (None, None)
    assert bootstrap_interval([]) == (None, None)


def test_the_short_form_is_the_interval():
    values = [1.0, 2.0, 4.0, 8.0]
    value, low, high = bootstrap(values)
    assert bootstrap_interval(values) == (low, high)
    assert value == 3.75


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_values_that_are_not_finite_are_refused(bad):
    for function in (bootstrap, bootstrap_interval, holm):
        with pytest.raises(ValueError, match="must be finite, but number 1 of 3 is"):
            function([0.0, bad, 1.0])
    with pytest.raises(ValueError, match="no values"):
        bootstrap([])


def test_pairing_removes_what_the_pairs_share():
    rng = np.random.default_rng(0)
    shared, noise = rng.normal(0, 10, 30), rng.normal(0, 0.1, 30)
    paired = paired_difference(shared + 0.5 + noise, shared)
    assert paired.low > 0.4
    assert paired.high < 0.6
    with pytest.raises(ValueError, match="equally many, not 2 and 3"):
        paired_difference([1, 2], [1, 2, 3])


def test_the_paired_test_is_exact_for_few_pairs():
    assert paired_p([1, 2, 3, 4, 5], [0, 0, 0, 0, 0]) == pytest.approx(2 / 2**5)
    assert paired_p([1, -1, 2, -2], [0, 0, 0, 0]) == pytest.approx(1.0)
    assert paired_p([1, 2, 3], [1, 2, 3]) == 1.0


def test_the_paired_test_agrees_with_the_t_test_for_many_pairs():
    rng = np.random.default_rng(3)
    a, b = rng.normal(0.2, 1, 200), rng.normal(0, 1, 200)
    assert paired_p(a, b) == pytest.approx(stats.ttest_rel(a, b).pvalue, abs=0.01)


def test_holm_by_hand():
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.6, 0.7]) == pytest.approx([1.0, 1.0])
    assert holm([]).size == 0


scores = st.lists(st.integers(-3, 3), min_size=1, max_size=12)


@given(scores, scores)
def test_the_auc_counts_pairs_and_halves_ties(positive, negative):
    pairs = [(p > n) + 0.5 * (p == n) for p in positive for n in negative]
    assert auc(positive, negative) == pytest.approx(np.mean(pairs), abs=1e-12)


@given(scores, scores)
def test_the_auc_lies_in_its_interval(positive, negative):
    value, low, high = auc_interval(positive, negative)
    assert 0 <= low <= value <= high <= 1
    assert low < high
    mirrored = auc_interval(negative, positive)
    assert mirrored.low == pytest.approx(1 - high, abs=1e-6)


def test_delong_variance_against_the_double_sum():
    rng = np.random.default_rng(0)
    p, n = rng.normal(1, 1, 23), rng.normal(0, 1, 31)
    psi = (p[:, None] > n[None, :]).astype(float)
    variance = np.var(psi.mean(1), ddof=1) / 23 + np.var(psi.mean(0), ddof=1) / 31
    value = psi.mean()
    half = 1.959964 * math.sqrt(variance) / (value * (1 - value))
    logit = math.log(value / (1 - value))
    interval = auc_interval(p, n)
    assert interval.method == "DeLong"
    assert interval.low == pytest.approx(1 / (1 + math.exp(half - logit)))
    assert interval.high == pytest.approx(1 / (1 + math.exp(-half - logit)))


def test_perfect_separation_does_not_claim_certainty():
    few, many = auc_interval([3, 4, 5], [0, 1, 2]), auc_interval(range(100, 200), range(100))
    assert (few.value, few.high) == (1, 1)
    assert few.low < 0.7
    assert 0.9 < many.low < 1
    assert few.method.startswith("Newcombe")


def test_an_auc_needs_both_kinds():
    with pytest.raises(ValueError, match="not 0 positive and 2 negative"):
        auc([], [1, 2])
