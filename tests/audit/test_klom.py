"""KLOM against histograms written out, its range, its floor, and its guard against too few models."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from palimpsest.audit.klom import LEAST, divergence, klom
from palimpsest.core.errors import InputError


def written_out(first: np.ndarray, second: np.ndarray, bins: int) -> list[float]:
    """With NumPy's own histogram, point by point."""
    found = []
    for point in range(first.shape[1]):
        a, b = np.clip(first[:, point], -100, 100), np.clip(second[:, point], -100, 100)
        edges = (min(a.min(), b.min()), max(a.max(), b.max()))
        p, q = (np.histogram(values, bins, edges)[0] / len(values) for values in (a, b))
        found.append(sum(x * np.log(x / max(y, 1e-5)) for x, y in zip(p, q, strict=True) if x > 0))
    return found


@pytest.mark.parametrize("bins", [5, 20])
def test_it_is_the_divergence_of_histograms(bins: int) -> None:
    random = np.random.default_rng(0)
    unlearned = random.normal(size=(40, 6)) * 3
    oracle = random.normal(1, 2, size=(40, 6))
    unlearned[0, 0], oracle[3, 1] = 1e9, -np.inf  # clipped
    found = klom(unlearned, oracle, oracle[::-1], bins=bins)
    np.testing.assert_allclose(found.values, written_out(unlearned, oracle, bins), atol=1e-12)
    np.testing.assert_allclose(found.floor, 0, atol=1e-12)  # the same models in another order
    other = klom(unlearned, oracle, bins=bins, direction="oracle")
    np.testing.assert_allclose(other.values, written_out(oracle, unlearned, bins), atol=1e-12)
    np.testing.assert_allclose(other.floor, written_out(oracle[:20], oracle[20:], bins), atol=1e-12)
    assert other.split
    assert not found.split


def test_it_runs_from_nothing_to_the_logarithm_of_the_least_share() -> None:
    low, high = np.zeros((30, 1)), np.full((30, 1), 5.0)
    assert klom(low, low).mean == 0
    assert klom(low, high).mean == pytest.approx(np.log(1 / LEAST))


def test_a_margin_moved_by_its_own_spread_is_seen_above_the_floor() -> None:
    random = np.random.default_rng(1)
    pools = [random.normal(size=(100, 50)) for _ in range(3)]
    same, moved = (klom(pools[0] + shift, pools[1], pools[2]) for shift in (0.0, 2.0))
    assert abs(same.excess) < 0.1
    assert moved.excess > 1
    assert same.p95 >= same.mean
    assert "null floor" in str(same)


def test_the_floor_falls_with_models_and_with_fewer_bins() -> None:
    random = np.random.default_rng(2)
    floors = {
        (models, bins): klom(*(random.normal(size=(models, 100)) for _ in range(3)), bins=bins).floor_mean
        for models in (50, 200)
        for bins in (5, 20)
    }
    assert floors[50, 20] == pytest.approx(0.88, abs=0.15)  # what the sheet measured
    assert floors[200, 20] < floors[50, 20]
    assert floors[50, 5] < floors[50, 20] / 3


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 10_000), st.integers(2, 25))
def test_it_is_never_below_zero_by_more_than_the_least_shares(seed: int, bins: int) -> None:
    random = np.random.default_rng(seed)
    first, second = random.standard_t(2, size=(2, 31, 3))
    assert (divergence(first, second, bins=bins) >= -bins * LEAST).all()


def test_too_few_models_and_unlike_pools_are_refused() -> None:
    margins = np.zeros((40, 3))
    with pytest.raises(InputError, match=r"KLOM of 29 models is mostly chance: wanted at least 30"):
        klom(margins[:29], margins[:29])
    with pytest.raises(InputError, match=r"of one shape, not unlearned \(40, 2\), oracle \(40, 3\)"):
        klom(margins[:, :2], margins)
    with pytest.raises(InputError, match="null"):
        klom(margins, margins, margins[:39])
    broken = margins.copy()
    broken[7, 2] = np.nan
    with pytest.raises(InputError, match="margin of unlearned model 7 at point 2 is not a number"):
        klom(broken, margins)
    with pytest.raises(InputError, match="bins must be at least 2"):
        klom(margins, margins, bins=1)
    with pytest.raises(InputError, match="direction"):
        klom(margins, margins, direction="both")  # type: ignore[arg-type]
