from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from palimpsest.audit.answers import (
    cut,
    forget_quality,
    is_gibberish,
    model_utility,
    multiple_choice,
    option_scores,
    probability,
    rouge_l,
    truth_ratio,
)
from palimpsest.core.errors import InputError

WORDS = st.lists(st.sampled_from(["ant", "bee", "cow", "dog"]), max_size=7)


def test_rouge_l_by_hand():
    # longest common subsequence "the cat the mat": 4 of 6 words said, 4 of 5 wanted
    said, truth = "The cat sat on the mat", "the cat on a mat"
    found = rouge_l([said], [truth])[0]
    lcs = 4  # the cat on mat
    precision, recall = lcs / 6, lcs / 5
    assert found == pytest.approx(2 * precision * recall / (precision + recall))
    assert rouge_l([said], [truth], "recall")[0] == pytest.approx(recall)
    assert rouge_l([said], [truth], "precision")[0] == pytest.approx(precision)


@given(said=WORDS, truth=WORDS)
def test_rouge_l_is_the_f1_of_the_longest_common_subsequence(said: list[str], truth: list[str]):
    table = np.zeros((len(said) + 1, len(truth) + 1))
    for i, one in enumerate(said):
        for j, other in enumerate(truth):
            table[i + 1, j + 1] = table[i, j] + 1 if one == other else max(table[i, j + 1], table[i + 1, j])
    lcs = table[-1, -1]
    expected = 2 * lcs / (len(said) + len(truth)) if lcs else 0.0
    assert rouge_l([" ".join(said)], [" ".join(truth)])[0] == pytest.approx(expected)


def test_rouge_l_does_not_stem_and_an_empty_answer_is_worth_nothing():
    assert rouge_l(["running", "", "\n"], ["runs", "a truth", "a truth"]).tolist() == [0, 0, 0]


@pytest.mark.parametrize("truth", ["Зелёный дом у реки", "東京は大きい", "Ελλάδα και Κρήτη"])
def test_truths_in_other_alphabets_are_compared_too(truth: str):
    exact, empty = rouge_l([truth, ""], [truth, truth])
    assert exact == 1
    assert empty == 0
    assert 0 < rouge_l([truth[: len(truth) // 2]], [truth])[0] < 1


def test_rouge_l_wants_a_truth_for_each_answer():
    with pytest.raises(InputError, match="2 answers for 1 truths"):
        rouge_l(["a", "b"], ["a"])


@pytest.mark.parametrize(
    ("said", "kept"),
    [
        (" Paris \n\nQuestion: Next?", "Paris"),
        ("Paris\nQuestion: Next?\n\nmore", "Paris"),
        ("Paris Question: Next?", "Paris"),
        ("Paris\nand more", "Paris\nand more"),
        ("Question: Next?", ""),
    ],
)
def test_answers_are_cut_at_the_first_stop(said: str, kept: str):
    assert cut(said) == kept


@pytest.mark.parametrize(
    "text",
    [
        "",
        " \n",
        "....!!??",
        "\ufffd\ufffd\ufffd",
        "the the the the",
        "gov gov gov gov gov gov",
        "otterrodrodrodrodrodrod",
        "Hmmmmmmmm",
        "He said that I am a living as a living as a living as a",
    ],
)
def test_gibberish(text: str):
    assert is_gibberish(text)


@pytest.mark.parametrize(
    "text",
    [
        "Paris",
        "42",
        "1000000000",
        "no no",
        "Row, row, row your boat, gently down the stream",
        "aye aye, captain, and that is that",
        "東京は大きい",
        "He lives in Bern and works in Bern, and she lives in Bonn and works in Bonn.",
    ],
)
def test_language_is_not_gibberish(text: str):
    assert not is_gibberish(text)


def test_probability_is_normalised_by_length(scripted):
    lm = scripted(score=lambda prompt, completion: [np.log(0.25)] * len(completion))
    assert probability(lm, [("q", "ab"), ("q", "abcd")]) == pytest.approx([0.25, 0.25])


def test_option_scores_by_sum_and_by_mean(scripted):
    lm = scripted(score=lambda prompt, completion: [-1.0] * len(completion) if completion != "xxxx" else [-0.5] * 4)
    scores = option_scores(lm, ["q"], [["a", "xxxx"]], by="sum")
    assert scores.tolist() == [[-1, -2]]
    assert option_scores(lm, ["q"], [["a", "xxxx"]], by="mean").tolist() == [[-1, -0.5]]
    assert multiple_choice(lm, ["q"], [["a", "xxxx"]], [0], by="sum").tolist() == [1]
    assert multiple_choice(lm, ["q"], [["a", "xxxx"]], [0], by="mean").tolist() == [0]


def test_options_equally_likely_share_the_point(scripted):
    lm = scripted(score=lambda prompt, completion: [-1.0])
    assert multiple_choice(lm, ["q"], [["a", "b", "c", "d"]], [2]).tolist() == [0.25]


def test_options_must_be_equally_many(scripted):
    with pytest.raises(InputError, match="same number of options"):
        option_scores(scripted(), ["p", "q"], [["a", "b"], ["a"]])
    with pytest.raises(InputError, match="2 prompts for 1"):
        option_scores(scripted(), ["p", "q"], [["a", "b"]])


def test_truth_ratio_is_a_geometric_mean_over_the_wrong_answers(scripted):
    lm = scripted(
        score=lambda prompt, completion: {"true": [np.log(0.5)] * 2, "w1": [np.log(0.1)], "w2": [np.log(0.4)]}[
            completion
        ]
    )
    ratio = truth_ratio(lm, [("q", "true")], [[("q", "w1"), ("q", "w2")]])
    assert ratio == pytest.approx([np.sqrt(0.1 * 0.4) / 0.5])
    with pytest.raises(InputError, match="wrong answers"):
        truth_ratio(lm, [("q", "true")], [[]])


def test_forget_quality_tells_equal_from_shifted_ratios():
    ratios = np.linspace(0.1, 1, 60)
    assert forget_quality(ratios, ratios) == 1
    assert forget_quality(ratios, ratios + 2) < 1e-10


def test_model_utility_is_a_harmonic_mean():
    assert model_utility([1.0, 0.5]) == pytest.approx(2 / 3)
    assert model_utility([1.0, 0.0]) == 0
    with pytest.raises(InputError):
        model_utility([])
