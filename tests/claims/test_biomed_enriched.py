import json

import numpy as np
import pytest

from palimpsest.claims import biomed_enriched as claim
from palimpsest.curate.labels import BIOMEDICAL, prompt

pytest.importorskip("daft")


def test_one_seed_at_a_small_scale():
    measured = claim.measure(0, scale=0.1)
    control = claim.measure(0, mechanism=False, scale=0.1)
    assert set(measured) == set(control)
    for name in ("base", "base_cases", "random", "oracle", "kept"):
        assert control[name] == measured[name]  # the control changes what the labels decide, at equal volumes
    assert measured["f1_type"] > control["f1_type"] + 0.3
    assert all(np.isfinite(value) for value in measured.values())


def test_the_teacher_reads_the_text_and_errs_as_often_as_it_says():
    hospital = claim._hospital(0, 400)
    answers = claim.Reader(0).generate([prompt(text) for text in hospital.texts])
    found = [BIOMEDICAL.read(answer) for answer in answers]
    assert not any(why for _, why in found)
    for name in ("type", "domain", "educational"):
        wrong = np.mean(
            [labels[name] != truth for (labels, _), truth in zip(found, getattr(hospital, name), strict=True)]
        )
        assert 0.03 < wrong < 0.09  # of a class drawn at random one in four is right by chance


def test_the_hospital_is_what_the_claim_says():
    hospital = claim._hospital(0, 400)
    assert np.mean(hospital.educational < 3) == pytest.approx(0.57, abs=0.06)
    cases = hospital.type == "clinical case"
    assert np.mean(np.bincount(hospital.articles[cases], minlength=400) == 2) == pytest.approx(0.1, abs=0.04)
    rare = hospital.diseases[claim.COMMON :]
    named = np.array([any(name in text.split() for name in rare) for text in hospital.texts])
    assert (named == cases).all()
    for text, worth in zip(hospital.texts, hospital.educational, strict=True):
        pairs = [
            (disease, drug)
            for disease, name in enumerate(hospital.diseases)
            for drug, other in enumerate(hospital.drugs)
            if worth in (3, 4) and name in text.split() and other in text.split()
        ]
        assert all(hospital.cure[disease] == drug for disease, drug in pairs)


def test_questions_hold_the_right_answer_first():
    hospital = claim._hospital(0, 60)
    texts, case = claim._asked(hospital)
    assert len(texts) == 4 * len(case) == 4 * 2 * (claim.COMMON + claim.RARE)
    assert case.sum() == 2 * claim.RARE
    place = {name: number for number, name in enumerate(hospital.drugs)}
    for start in range(0, len(texts), 4):
        stems = {text.rsplit(" ", 1)[0] for text in texts[start : start + 4]}
        assert len(stems) == 1
        disease = next(number for number, name in enumerate(hospital.diseases) if name in texts[start].split())
        assert place[texts[start].rsplit(" ", 1)[1]] == hospital.cure[disease]


def test_articles_keep_their_order_and_count_as_often_as_their_weight():
    encoded = [[1], [2], [3], [4]]
    found = claim._windows(encoded, np.array([0, 0, 1, 1]), np.array([3, 3, 0, 1]), 9, seed=0)
    text = " ".join(map(str, found.ravel()[:14]))  # what follows fills the window from the start again
    assert text.count("1 9 2 9") == 3
    assert text.count("4 9") == 1
    assert "3" not in text


def test_the_best_articles_are_chosen_whole():
    worth, articles = np.array([5.0] * 5 + [1.0] + [3.0] * 6), np.repeat([0, 1], 6)
    assert claim._best_articles(worth, articles, 5).tolist() == [1] * 6 + [0] * 6


def test_answers_are_json_after_a_reason():
    (answer,) = claim.Reader(0).generate([prompt("a patient with x came to us ; we gave y .")])
    assert set(json.loads(answer.splitlines()[-1])) == {"type", "domain", "educational"}
