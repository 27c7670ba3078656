from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from palimpsest.core.errors import InputError
from palimpsest.data import answers


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("We get 3 * 4 = 12.\n#### 12", "12"),
        ("so it is \\boxed{\\frac{1}{2}} as claimed, not 7", "\\frac{1}{2}"),
        ("first \\boxed{1}, then \\boxed{2} and \\boxed{3", "2"),
        ("The answer is: $1,234.50.", "$1,234.50"),
        ("The answer is Paris.", "Paris"),
        ("it costs 3 dollars and -4.5 cents", "-4.5"),
        ("add 1, 2, 3", "3"),
        ("12 people bought 3/4 of it", "3/4"),
        ("v2 has b12", None),
        ("I do not know", None),
        ("", None),
        ("#### ", None),
    ],
)
def test_what_a_solution_ends_in(text, found):
    assert answers.final(text) == found


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1,234.50", Fraction(2469, 2)),
        ("$12", Fraction(12)),
        ("50\\%", Fraction(50)),
        ("\\frac{3}{4}", Fraction(3, 4)),
        ("\\dfrac{10}{4}", Fraction(5, 2)),
        ("\u22127", Fraction(-7)),
        (".5", Fraction(1, 2)),
        ("7.", Fraction(7)),
        ("1/0", None),
        ("1,23", None),
        ("twelve", None),
        ("3 apples", None),
        ("", None),
    ],
)
def test_numbers(text, value):
    assert answers.number(text) == value


@given(st.integers(-(10**9), 10**9), st.integers(0, 3))
def test_the_last_number_of_a_text_is_read_as_it_was_written(value, places):
    written = f"{value:,}" + (f".{'0' * places}" if places else "")
    found = answers.last_number(f"we tried 17 and {written} in the end")
    assert found == written
    assert answers.number(found) == value


def test_equality():
    assert answers.same("1,000", "1000.0")
    assert answers.same("0.5", "\\frac{1}{2}")
    assert answers.same(" Paris. ", "paris")
    assert not answers.same("0.33", "1/3")
    assert answers.same("0.333", "1/3", tolerance=0.01)
    assert not answers.same("12", "twelve")
    assert not answers.same("-3", "3")


def test_options():
    assert answers.option("(B)") == "B"
    assert answers.option("B. because") == "B"
    assert answers.option("A or B? The answer is b") == "B"
    assert answers.option("A or B") is None
    assert answers.option("Both") is None
    assert answers.option("I think Z", "XYZ") == "Z"


def test_digits_keep_their_places():
    assert answers.digits(" 0150\n") == "0150"
    assert answers.digits("0150 or so") is None
    assert answers.digits("\u0661") is None
    exact = answers.outcome("0150", "150", answers.digits, str.__eq__)
    assert exact == "wrong"


def test_no_answer_is_an_outcome_of_its_own():
    found = answers.marks(["#### 4", "it is 5", "who knows", ""], ["4"] * 4)
    assert found == ["right", "wrong", "unparseable", "unparseable"]
    told = answers.Marks.of(found)
    assert told == answers.Marks(1, 1, 2)
    assert told.accuracy == 0.25
    assert told.answered == 0.5
    assert answers.Marks.of([]).accuracy == 0
    assert answers.outcome("The answer is Rome", "rome") == "right"


def test_bad_input_is_one_line():
    with pytest.raises(InputError, match="a truth is blank"):
        answers.outcome("4", "  ")
    with pytest.raises(InputError, match="1 responses for 2 truths"):
        answers.marks(["4"], ["4", "5"])
