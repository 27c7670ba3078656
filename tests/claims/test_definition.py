import math

import pytest

from palimpsest.claims.definition import ClaimError, Expect, NotFinite, claim, overall
from palimpsest.core.statistics import Interval


def example(measure, **changes):
    settings = {
        "paper": "muse",
        "statement": "a is above b.",
        "paper_says": {"a": 1.0},
        "expectations": (Expect("a", minus="b", at_least=0.2),),
        "minutes": 1,
        "data": "generated: two numbers",
    }
    return claim(**settings | changes)(measure)


def two_numbers(seed, mechanism=True, scale=1.0):
    return {"a": 1 + seed * scale, "b": 0.0 if mechanism else 1.0, "extra": 5}


def test_a_claim_is_called_like_its_function_and_returns_floats():
    assert example(two_numbers)(2, mechanism=False, scale=0.5) == {"a": 2.0, "b": 1.0, "extra": 5.0}


@pytest.mark.parametrize(
    ("expect", "low", "high", "verdict"),
    [
        (Expect("a", at_least=0.2), 0.2, 0.4, "holds"),
        (Expect("a", at_least=0.2), 0.1, 0.4, "unclear"),
        (Expect("a", at_least=0.2), 0.0, 0.1, "fails"),
        (Expect("a", at_most=0.2), 0.1, 0.2, "holds"),
        (Expect("a", at_most=0.2), 0.1, 0.3, "unclear"),
        (Expect("a", at_most=0.2), 0.21, 0.3, "fails"),
        (Expect("a", within=(0.2, 0.5)), 0.3, 0.4, "holds"),
        (Expect("a", within=(0.2, 0.5)), 0.1, 0.6, "unclear"),
        (Expect("a", within=(0.2, 0.5)), 0.6, 0.7, "fails"),
        (Expect("a", within=(0.2, 0.5)), 0.0, 0.1, "fails"),
        (Expect("a", at_least=0.2), None, None, "unclear"),
        (Expect("a", at_least=0.2), 0.3 - 0.1, 0.3 - 0.1, "holds"),  # 0.19999999999999998
    ],
)
def test_an_interval_decides_an_expectation(expect, low, high, verdict):
    assert expect.verdict(Interval(0.0, low, high, "")) == verdict


def test_a_difference_is_taken_seed_by_seed():
    values = {"a": [1.0, 11.0, 21.0], "b": [0.5, 10.5, 20.5]}  # wide apart, yet always half a unit
    interval = Expect("a", minus="b", at_least=0.4).interval(values)
    assert (interval.value, interval.low, interval.high) == (0.5, 0.5, 0.5)


@pytest.mark.parametrize(
    ("verdicts", "whole"),
    [
        (["holds", "holds"], "holds"),
        (["holds", "unclear"], "unclear"),
        (["unclear", "fails", "holds"], "fails"),
    ],
)
def test_one_failed_expectation_decides_the_claim(verdicts, whole):
    assert overall(verdicts) == whole


@pytest.mark.parametrize(
    ("expect", "words"),
    [
        (Expect("a", minus="b", at_least=0.2), "a - b >= 0.2"),
        (Expect("a", at_most=3), "a <= 3"),
        (Expect("a", within=(0, 1)), "a within 0 to 1"),
    ],
)
def test_an_expectation_reads_as_words(expect, words):
    assert str(expect) == words


@pytest.mark.parametrize(
    "bounds", [{}, {"at_least": 1, "at_most": 2}, {"within": (2, 1)}, {"at_least": math.nan}, {"within": (1, 1)}]
)
def test_an_expectation_needs_exactly_one_possible_bound(bounds):
    with pytest.raises(ValueError, match=r"^a - b: "):
        Expect("a", minus="b", **bounds)


def test_a_missing_value_is_named():
    with pytest.raises(ClaimError, match=r"^muse, seed 3, control: measure returned no b \(it returned a\)$"):
        example(lambda seed, mechanism=True, scale=1.0: {"a": 1.0})(3, mechanism=False)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_value_that_is_not_finite_is_named_even_if_nothing_is_expected_of_it(value):
    with pytest.raises(NotFinite, match=rf"^muse, seed 0: extra is {value}$"):
        example(lambda seed, mechanism=True, scale=1.0: {"a": 1.0, "b": 0.0, "extra": value})(0)


def test_a_value_that_is_no_number_is_named():
    with pytest.raises(ClaimError, match="b must be a number, not str"):
        example(lambda seed, mechanism=True, scale=1.0: {"a": 1.0, "b": "0.0"})(0)


@pytest.mark.parametrize(
    ("changes", "error"),
    [
        ({"expectations": ()}, "expects nothing"),
        ({"data": "digits"}, "data begins with"),
        ({"minutes": 0}, "minutes must be positive"),
    ],
)
def test_an_incomplete_claim_is_refused(changes, error):
    with pytest.raises(ValueError, match=error):
        example(two_numbers, **changes)


def test_a_measure_without_a_control_is_refused():
    with pytest.raises(TypeError, match=r"not \(seed\)"):
        example(lambda seed: {"a": 1.0, "b": 0.0})
