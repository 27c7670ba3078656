import numpy as np
import pytest

from palimpsest.curate import agreement
from palimpsest.curate.labels import Schema
from palimpsest.curate.recipes import Recipe

SCHEMA = Schema.from_json(
    {"fields": {"kind": {"classes": {"a": "", "b": "", "c": ""}}, "worth": {"scale": {"1": "", "2": "", "3": ""}}}}
)


def held(given, student, worth, guess):
    return {"kind": {"given": given, "student": student}, "worth": {"given": worth, "student": guess}}


def test_measures_by_hand():
    found = agreement.agreement(held(list("aabb"), list("aaba"), [1, 2, 3, 2], [1.5, 2.0, 2.5, 2.0]), SCHEMA)
    kind, worth = found
    assert kind["accuracy"] == 0.75
    assert kind["f1"] == pytest.approx((0.8 + 2 / 3) / 2)
    assert kind["kappa"] == pytest.approx((0.75 - 0.5) / 0.5)
    assert worth["r"] == pytest.approx(1.0)
    assert worth["error"] == pytest.approx(0.25)
    alone = agreement.agreement(held(list("aa"), list("aa"), [1, 1], [1.0, 1.2]), SCHEMA)
    assert alone[0]["kappa"] is None
    assert alone[1]["r"] is None
    assert agreement.agreement_table(alone)["rows"][0][-1] == "\N{EM DASH}"


def test_held_out_takes_the_likeliest_class():
    outputs = {"kind": np.array([[0.2, 0.5, 0.3], [0.6, 0.1, 0.3]]), "worth": np.array([1.2, 2.8])}
    rows = [{"kind": "b", "worth": 1}, {"kind": "c", "worth": 3}]
    assert agreement.held_out(outputs, rows, SCHEMA) == held(["b", "c"], ["b", "a"], [1, 3], [1.2, 2.8])


@pytest.mark.parametrize(("sign", "passing"), [(">=", 3), ("<", 7)])
def test_a_moved_line_lets_the_labels_share_pass(sign, passing):
    given = [1] * 4 + [2] * 3 + [3] * 3
    student = np.random.default_rng(0).permutation(np.linspace(1.4, 2.3, 10))  # nobody reaches 3
    recipe = Recipe.parse(f"worth {sign} 3", "", SCHEMA)
    sides = held(["a"] * 10, ["a"] * 10, given, student.tolist())
    at = agreement.lines(recipe, sides)
    assert recipe.keep[0]({"worth": student}, at).sum() == passing
    row = agreement.line_table(recipe, sides)["rows"][0]
    assert row[1] == row[4] == f"{passing / 10:.1%}"
    assert row[2] in ("0.0%", "100.0%")


def test_a_line_that_all_or_none_pass_stays():
    recipe = Recipe.parse("worth >= 1; worth >= 9", "", SCHEMA)
    assert agreement.lines(recipe, held(["a"] * 3, ["a"] * 3, [1, 2, 3], [1.0, 2.0, 3.0])) == {}
    assert agreement.line_table(Recipe.parse("kind = a", "", SCHEMA), {}) is None


def test_the_pool_by_label():
    rows = [
        {"label_kind": "a", "rows": 3, "keep": 1},
        {"label_kind": None, "rows": 1, "keep": 0},
        {"label_kind": "a", "rows": 2, "keep": None},
        {"label_kind": "b", "rows": 4, "keep": 4},
    ]
    assert agreement.label_table("kind", rows)["rows"] == [
        ["a", "5", "50.0%", "1"],
        ["b", "4", "40.0%", "4"],
        ["(no text)", "1", "10.0%", "0"],
    ]
