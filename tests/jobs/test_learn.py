from __future__ import annotations

import csv
import json
import re

import numpy as np
import pytest

from palimpsest import cli
from palimpsest.core.records import Evidence
from palimpsest.learn import load

SMALL = ["--test-episodes", "40", "--steps", "4", "--queries", "3"]


@pytest.fixture
def data(tmp_path, monkeypatch):
    """Features of twenty classes, and pictures of ten."""
    monkeypatch.chdir(tmp_path)
    rng = np.random.default_rng(0)
    y = np.repeat(np.arange(20), 10)
    x = 1.5 * rng.normal(size=(20, 6))[y] + rng.normal(size=(200, 6))
    np.savez(tmp_path / "features.npz", x=x, y=np.array([f"kind {label}" for label in y]))
    pictures = rng.integers(0, 255, (100, 12, 12)).astype(np.uint8)
    lists = {"train_classes": np.arange(6), "test_classes": np.arange(6, 10)}
    np.savez(tmp_path / "pictures.npz", images=pictures, labels=np.repeat(np.arange(10), 10), **lists)
    return tmp_path


def test_a_learner_on_the_users_features(data, capsys):
    words = ["learn", "few-shot", "protonet", "--data", "features.npz", "--way", "3", "--shot", "2", *SMALL]
    assert cli.main(words) == 0
    said = capsys.readouterr()
    assert "3-way 2-shot accuracy:" in said.out
    assert "on the classes for tuning:" in said.out
    assert "features: 13 classes (130) to train on, 3 classes (30) to tune on, 4 classes (40) to test on" in said.err
    found = Evidence.read(data / "palimpsest-learn")
    accuracy = found["few_shot_accuracy"]
    assert 33 < accuracy.after <= 100
    assert accuracy.low < accuracy.after < accuracy.high
    assert accuracy.n == 40
    page = (data / "palimpsest-learn" / "report.html").read_text(encoding="utf-8")
    assert f"{accuracy.after:.1f}% of the queries answered right" in page
    assert "<svg" in page
    assert not (data / "palimpsest-learn" / ".unfinished").exists()
    learner = load(data / "palimpsest-learn" / "learner")
    assert learner.learner.steps == 4
    json.loads((data / "palimpsest-learn" / "evidence.json").read_text())


def test_pictures_are_turned_and_classes_are_as_given(data, capsys):
    words = ["learn", "few-shot", "anil", "--data", "pictures.npz", "--way", "3", "--out", "o", "--width", "4", *SMALL]
    assert cli.main(words) == 0
    assert "images: 24 classes (240) to train on, 4 classes (40) to test on\n" in capsys.readouterr().err
    evidence = json.loads((data / "o" / "evidence.json").read_text())
    assert evidence["extras"]["training"]["way"] == 3  # a learner bound to the ways of the test


def test_none_of_the_above(data, capsys):
    words = ["learn", "few-shot", "gpam", "--data", "features.npz", "--way", "3", "--nota", "0.5", *SMALL]
    assert cli.main(words) == 0
    said = capsys.readouterr().out
    assert "50% of the queries of no class" in said
    assert "told to be none" in said
    assert "crosses belong to none" in (data / "palimpsest-learn" / "report.html").read_text(encoding="utf-8")


def test_several_learners_side_by_side(data, capsys):
    words = ["compare", "learn", "--data", "features.npz", "--way", "3", "--methods", "protonet,matching-net,maml"]
    assert cli.main([*words, *SMALL]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == ["protonet", "matching-net", "maml"]
    page = (data / "palimpsest-compare" / "compare.html").read_text(encoding="utf-8")
    assert "Few-shot accuracy" in page
    assert re.search(r"<h1>(protonet|matching-net|maml) answers most: \d+\.\d%\.</h1>", page)
    with (data / "palimpsest-compare" / "compare.csv").open(newline="") as handle:
        findings = list(csv.DictReader(handle))
    assert len(findings) == 3  # every pair, on the same episodes
    assert all(int(finding["n"]) == 40 for finding in findings)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["protonet", "--data", "none.npz"], "no such file"),
        (["protonet", "--data", "features.npz", "--way", "9", *SMALL], "9 ways need 9 classes; the pool has 4"),
        (["protonet", "--data", "features.npz", "--shot", "20"], "have the 35 examples"),
        (["protonet", "--data", "features.npz", "--way", "3", "--nota", "0.5", *SMALL], "no answer 'none of them'"),
        (["gpam", "--data", "features.npz", "--views", "--queries", "3"], "--views are of relations"),
        (["proto-net", "--data", "features.npz"], "did you mean protonet"),
        (["protonet"], "--data"),
    ],
)
def test_bad_input_is_one_line(data, words, message, capsys):
    assert cli.main(["learn", "few-shot", *words]) == 2
    said = capsys.readouterr().err.strip().splitlines()[-1]
    assert said.startswith("palimpsest: error:")
    assert message in said


def test_a_comparison_needs_two(data, capsys):
    assert cli.main(["compare", "learn", "--data", "features.npz", "--methods", "protonet", "--way", "3", *SMALL]) == 2
    assert "at least two methods" in capsys.readouterr().err
