import numpy as np
import pytest

from palimpsest.core.errors import InputError
from palimpsest.curate.labels import BIOMEDICAL
from palimpsest.curate.recipes import Recipe

LABELS = {
    "type": np.array(["clinical case", "study", "study", "other", "review"], object),
    "domain": np.array(["clinical", "clinical", "biomedical", "other", "clinical"], object),
    "educational": np.array([3.2, 2.9, 4.5, 1.0, 3.0]),
}
ARTICLES = np.array([0, 0, 0, 1, 1])


def recipe(keep="", upsample=""):
    return Recipe.parse(keep, upsample, BIOMEDICAL)


def test_filters():
    keep, weight, why = recipe("educational >= 3; domain != other")(LABELS, ARTICLES)
    assert keep.tolist() == [True, False, True, False, True]
    assert weight.tolist() == [1, 0, 1, 0, 1]
    assert why.tolist() == ["kept", "not educational >= 3", "kept", "not educational >= 3", "kept"]
    keep, *_ = recipe("educational < 3")(LABELS, ARTICLES)
    assert keep.tolist() == [False, True, False, True, False]
    keep, *_ = recipe()(LABELS, ARTICLES)
    assert keep.all()


def test_a_line_can_be_moved():
    keep, *_ = recipe("educational >= 3")(LABELS, ARTICLES, {"educational >= 3": 2.5})
    assert keep.tolist() == [True, True, True, False, True]


def test_repeats_go_by_article_or_by_row():
    found = recipe("educational >= 3", "most domain = clinical: 10; any type = clinical case: 4; type = review: 2")
    keep, weight, why = found(LABELS, ARTICLES)
    assert weight.tolist() == [10, 0, 10, 0, 2]  # of article 1 half is clinical: not most
    assert why.tolist()[0] == "most domain = clinical"
    assert why.tolist()[4] == "type = review"
    assert keep.tolist() == [weight > 0 for weight in weight]
    _, weight, _ = recipe("", "any domain = other: 3")(LABELS, ARTICLES)
    assert weight.tolist() == [1, 1, 1, 3, 3]


def test_class_names_may_be_written_in_any_case():
    assert str(recipe("type = Clinical_Case").keep[0]) == "type = clinical case"


@pytest.mark.parametrize(
    ("keep", "upsample", "why"),
    [
        ("educational", "", "'educational' is no condition"),
        ("quality >= 3", "", "no field 'quality'; it has type, domain, educational"),
        ("educational >= good", "", "wanted a number, not 'good'"),
        ("educational = 3", "", "is a scale, which knows"),
        ("type >= study", "", "wanted type = or != one of"),
        ("type = poem", "", "wanted type = or != one of clinical case, study"),
        ("", "type = study", "says not how often"),
        ("", "type = study: 0", "says not how often"),
        ("", "type = study: often", "says not how often"),
    ],
)
def test_bad_recipes(keep, upsample, why):
    with pytest.raises(InputError, match=why):
        recipe(keep, upsample)
