"""The paired test against independent computation: exact sums, brute force, simulation."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import optimize

from palimpsest.audit.mcnemar import Paired, fewest, needed, power, wilson
from palimpsest.core.errors import InputError


def paired(both: int, b: int, c: int, neither: int) -> Paired:
    first = np.repeat([1.0, 1.0, 0.0, 0.0], [both, b, c, neither])
    return Paired(first, np.repeat([1.0, 0.0, 1.0, 0.0], [both, b, c, neither]))


def test_the_paper_s_statistic_by_hand():
    found = paired(500, 60, 30, 410)
    assert (found.n, found.b, found.c) == (1000, 60, 30)
    assert found.drop == pytest.approx(0.03)
    assert found.chi2 == pytest.approx(900 / 90)
    assert found.p == found.p_chi2 == pytest.approx(math.erfc(math.sqrt(10 / 2)))  # P(chi2_1 >= x) = erfc(sqrt(x/2))
    assert found.relative().value == pytest.approx(30 / 560)
    assert found.beyond_chance() == pytest.approx(60 / 560 - 30 / 440)


@given(st.integers(0, 12), st.integers(0, 12))
def test_few_changes_are_tested_exactly(b, c):
    found = paired(3, b, c, 3)
    assert found.exact
    tail = sum(math.comb(b + c, k) for k in range(min(b, c) + 1)) / 2 ** (b + c)
    assert found.p == pytest.approx(min(1.0, 2 * tail))


def test_nothing_changed_is_no_evidence():
    found = paired(5, 0, 0, 5)
    assert (found.chi2, found.p, found.drop) == (0.0, 1.0, 0.0)
    low, high = found.drop_interval().low, found.drop_interval().high
    assert low < 0 < high  # ten items without a change do not show that none ever changes
    assert found.g().low == -0.5


def test_newcombe_s_interval_by_another_way():
    """36, 12, 2, 0: the Wilson bounds as roots of the score equation; no correlation can be corrected for (ad < bc)."""
    z, n = 1.959964, 50

    def bounds(p):
        def excess(t):
            return (p - t) ** 2 - z**2 * t * (1 - t) / n

        return optimize.brentq(excess, 1e-9, p), optimize.brentq(excess, p, 1 - 1e-9)

    (low1, high1), (low2, high2) = bounds(48 / n), bounds(38 / n)
    phi = (36 * 0 - 12 * 2) / math.sqrt(48 * 2 * 38 * 12)
    below = (0.96 - low1) ** 2 - 2 * phi * (0.96 - low1) * (high2 - 0.76) + (high2 - 0.76) ** 2
    above = (high1 - 0.96) ** 2 - 2 * phi * (high1 - 0.96) * (0.76 - low2) + (0.76 - low2) ** 2
    found = paired(36, 12, 2, 0).drop_interval()
    assert (found.low, found.high) == pytest.approx((0.2 - math.sqrt(below), 0.2 + math.sqrt(above)), abs=1e-6)


def test_the_interval_covers_as_often_as_it_says():
    shares = np.array([0.5, 0.15, 0.08, 0.27])
    draws = np.random.default_rng(0).multinomial(120, shares, size=400)
    intervals = [paired(*counts).drop_interval() for counts in draws]
    covered = np.mean([one.low <= shares[1] - shares[2] <= one.high for one in intervals])
    assert 0.92 <= covered <= 0.985


def test_power_is_the_share_of_simulated_tests_that_reject():
    n, drop, changing = 400, 0.05, 0.15
    shares = [0.5, (changing + drop) / 2, (changing - drop) / 2, 0.5 - changing]
    counts = np.random.default_rng(0).multinomial(n, shares, size=4000)
    b, c = counts[:, 1], counts[:, 2]
    rejected = np.mean(((b - c) ** 2 / (b + c) > 3.841459) & (b > c))
    assert power(n, drop, changing) == pytest.approx(rejected, abs=0.03)


def test_items_needed_reach_the_power_and_one_fewer_does_not():
    for drop, changing in ((0.05, 0.2), (0.01, 0.1), (0.3, 0.3)):
        n = needed(drop, changing)
        assert power(n, drop, changing) >= 0.8 - 1e-9
        assert n == fewest() or power(n - 1, drop, changing) < 0.8
    assert needed(0.05, 0.2) == 626


def test_the_fewest_items_that_any_test_can_decide_on():
    assert fewest(0.05) == 6
    assert paired(0, 6, 0, 0).p < 0.05 < paired(0, 5, 0, 0).p
    assert paired(0, fewest(0.01), 0, 0).p < 0.01 < paired(0, fewest(0.01) - 1, 0, 0).p


def test_wilson_by_its_formula():
    z, p, n = 1.959964, 0.3, 50
    centre, half = p + z**2 / (2 * n), z * math.sqrt(p * (1 - p) / n + z**2 / (4 * n**2))
    assert wilson(15, 50) == pytest.approx(((centre - half) / (1 + z**2 / n), (centre + half) / (1 + z**2 / n)))


def test_scores_between_right_and_wrong_count_by_direction():
    found = Paired(np.array([1, 0.5, 0, 1.0]), np.array([0.5, 0.5, 1, 1.0]))
    assert (found.b, found.c) == (1, 1)
    assert found.drop_interval().method.startswith(("BCa", "percentile"))


def test_bad_input():
    with pytest.raises(InputError, match="as many scores on each side, not 2 and 1"):
        Paired(np.ones(2), np.ones(1))
    with pytest.raises(InputError, match="impossible"):
        power(100, 0.3, 0.1)
