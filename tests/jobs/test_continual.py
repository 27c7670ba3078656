from __future__ import annotations

import csv
import json

import numpy as np
import pytest

from palimpsest import cli
from palimpsest.core.errors import InputError
from palimpsest.core.records import Evidence
from palimpsest.learn import load
from palimpsest.report import continual as page


@pytest.fixture
def data(tmp_path, monkeypatch):
    """Features of six classes, pictures of four, and what cannot be used."""
    monkeypatch.chdir(tmp_path)
    rng = np.random.default_rng(0)
    y = np.repeat(np.arange(6), 12)
    x = 2 * rng.normal(size=(6, 5))[y] + rng.normal(size=(72, 5))
    np.savez("features.npz", x=x, y=np.array([f"kind {label}" for label in y]))
    np.savez(
        "pictures.npz", images=rng.integers(0, 255, (40, 8, 8)).astype(np.uint8), labels=np.repeat(np.arange(4), 10)
    )
    np.savez("alone.npz", x=x[:12], y=y[:12])
    np.savez("nan.npz", x=np.where(x > 2, np.nan, x), y=y)
    (tmp_path / "empty.jsonl").write_text("")
    return tmp_path


def test_a_learner_on_the_users_features(data, capsys):
    words = [
        "learn",
        "continual",
        "replay",
        "--data",
        "features.npz",
        "--tasks",
        "3",
        "--epochs",
        "3",
        "--exemplars",
        "2",
    ]
    assert cli.main(words) == 0
    said = capsys.readouterr()
    assert "features: 6 classes in 3 tasks, 54 examples to learn from, 18 to test on" in said.err
    assert "after task 3 of 3:" in said.err
    assert [line.split()[0] for line in said.out.splitlines()] == ["replay", "nmc"]
    assert "(12 examples)" in said.out
    out = data / "palimpsest-learn"
    found = Evidence.read(out)
    last = found["last_accuracy"]
    assert last.low <= last.after <= last.high
    assert last.n == len(last.values) == 18
    assert found["last_accuracy"].reference == found.extras["learners"]["nmc"]["last_accuracy"]
    with (out / "accuracy_matrix.csv").open(newline="") as handle:
        rows = list(csv.reader(handle))
    assert [[float(cell) for cell in row[1:]] for row in rows[1:]] == found.extras["accuracy_matrix"]
    html = (out / "report.html").read_text(encoding="utf-8")
    assert f"{last.after:.1f}% right among all classes" in html
    assert html.count("<svg") >= 2
    assert "The nearest class mean, which learns nothing, reaches" in html
    assert load(out / "learner").learner.exemplars == 2


def test_every_method_on_a_stream_without_borders(data, capsys):
    words = [
        "learn",
        "continual",
        "nmc",
        "--data",
        "pictures.npz",
        "--tasks",
        "2",
        "--stream-batch",
        "6",
        "--blur",
        "0.5",
    ]
    assert cli.main([*words, "--beside", "all", "--out", "o"]) == 0
    names = [line.split()[0] for line in capsys.readouterr().out.splitlines()]
    assert names == ["nmc", "ewc", "fine-tuning", "knn", "linear-probe", "lwf", "replay"]
    assert "no border was told" in (data / "o" / "report.html").read_text(encoding="utf-8")
    assert json.loads((data / "o" / "evidence.json").read_text())["extras"]["continual"]["batch_size"] == 6


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["nmc", "--data", "none.npz"], "no such file"),
        (["nmc", "--data", "empty.jsonl"], "empty"),
        (["nmc", "--data", "alone.npz"], "one class: there is nothing to tell apart"),
        (["nmc", "--data", "features.npz", "--tasks", "1"], "at least 2 tasks, not 1"),
        (["nmc", "--data", "features.npz", "--tasks", "7"], "7 tasks need at least 7 classes; there are 6"),
        (["nmc", "--data", "nan.npz"], "NaN or infinite"),
        (["nmc", "--data", "features.npz", "--test", "1.5"], "above 0 and below 1"),
        (["nmc", "--data", "features.npz", "--beside", "protonet"], "protonet is no continual learner"),
        (["nmc", "--data", "features.npz", "--backbone", "nothing"], "no learner.json"),
        (["protonet", "--data", "features.npz"], "protonet"),
    ],
)
def test_bad_input_is_one_line(data, words, message, capsys):
    assert cli.main(["learn", "continual", *words]) == 2
    said = capsys.readouterr().err.strip().splitlines()[-1]
    assert said.startswith("palimpsest: error:")
    assert message in said
    assert not (data / "palimpsest-learn").exists()


def test_the_page_is_of_this_evidence_alone(tmp_path):
    with pytest.raises(InputError, match="not of a continual learner"):
        page.write(Evidence("learn", (), {}, {}, {}), tmp_path)
