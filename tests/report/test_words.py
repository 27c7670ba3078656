import pytest

from palimpsest.core.records import Measurement
from palimpsest.report import words


@pytest.mark.parametrize(
    ("value", "places", "told"),
    [
        (None, 1, "—"),
        (float("nan"), 1, "—"),
        (float("inf"), 1, "—"),
        (-7.25, 1, "−7.2"),
        (-0.01, 1, "0.0"),
        (19.96, 1, "20.0"),
        (1.5e9, 1, "1.50e+09"),
    ],
)
def test_numbers(value, places, told):
    assert words.number(value, places) == told


def test_a_sign_is_shown_when_asked_for_but_not_on_zero():
    assert words.number(4.0, sign=True) == "+4.0"
    assert words.number(0.0, sign=True) == "0.0"


def test_numbers_of_one_measurement_share_their_decimals():
    assert words.decimals((96.3, 0.4)) == 1
    assert words.decimals((0.081, 3.42, None)) == 2
    assert words.decimals((0.164, float("nan"))) == 3
    assert words.decimals((1.2e-5,)) == 7
    assert words.decimals((0.0, None)) == 1


def test_durations():
    assert words.duration(8.24) == "8.2 s"
    assert words.duration(200) == "3 min 20 s"
    assert words.duration(7500) == "2 h 5 min"


def test_scores_behind_an_auc_are_not_taken_for_scores_of_records():
    assert words.is_mean((0.0, 50.0, 100.0), 50.0)
    assert not words.is_mean((2.1, 3.4), -7.2)
    assert not words.is_mean((), 0.0)
    assert not words.is_mean((float("nan"), 1.0), 0.5)
    own = Measurement("privacy_leakage", "privacy", None, -7.2, 0.0, reference_values=(2.0, 3.0), better="zero")
    assert words.reference_interval(own) is None


def test_a_missing_number_says_what_it_needs():
    noted = Measurement("utility", "utility", None, None, note="Needs 2 records, found 1.")
    assert words.missing(noted) == "Needs 2 records, found 1."
    assert "reference model trained without the forget set" in words.missing(None, "privacy_leakage")
    assert words.missing(Measurement("novel", "x", None, None)).startswith("Needs data")
