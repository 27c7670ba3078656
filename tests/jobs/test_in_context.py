"""Learners in context on the user's data: what is written, the page, resuming, and bad input."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from palimpsest import cli
from palimpsest.core import fit as loop
from palimpsest.core.records import Evidence
from palimpsest.learn import load
from palimpsest.models.lm import LM

SHORT = ["--width", "8", "--layers", "1", "--heads", "2", "--steps", "3"]
GPICL = ["learn", "in-context", "gpicl", *SHORT, "--features", "4", "--length", "8", "--batch-size", "8"]
MEND = ["learn", "in-context", "mend", "--vectors", "3", "--demonstrations", "4", "--steps", "3", "--batch-size", "2"]
MEND += ["--pretraining-steps", "3"]


@pytest.fixture
def data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Features of eight classes, five tasks of texts, and a small model."""
    monkeypatch.chdir(tmp_path)
    rng = np.random.default_rng(0)
    y = np.repeat(np.arange(8), 12)
    np.savez(tmp_path / "base.npz", x=2 * rng.normal(size=(8, 6))[y] + rng.normal(size=(96, 6)), y=y)
    words = ["red", "blue", "pink", "grey", "cat", "dog", "wolf", "hen", "oak", "elm"]
    rows = [
        {"prompt": word, "completion": ("yes", "no")[(place + task) % 2], "task": f"task {task}"}
        for task in range(5)
        for place, word in enumerate(words)
    ]
    (tmp_path / "tasks.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    config = {"model_type": "gpt2", "n_embd": 16, "n_layer": 1, "n_head": 2, "n_positions": 64}
    LM.build([" ".join([*words, "yes", "no"])], config, vocab_size=280).save(tmp_path / "model")
    return tmp_path


def checked(out: Path, name: str) -> Evidence:
    found = Evidence.read(out)
    page = (out / "report.html").read_text(encoding="utf-8")
    assert "No description is on record" not in page
    assert "<svg" in page
    assert "&lt;svg" not in page
    assert name in {m.name for m in found.measurements}
    assert not (out / ".unfinished").exists()
    load(out / "learner")
    return found


def test_a_base_set(data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main([*GPICL, "--data", "base.npz", "--tasks", "64"]) == 0
    assert "chance" in capsys.readouterr().out
    found = checked(data / "palimpsest-learn", "unseen_task_accuracy")
    assert {m.name for m in found.measurements} >= {"seen_task_accuracy", "other_class_accuracy"}
    assert (found["unseen_task_accuracy"].reference or 0) > 0
    assert len(found.extras["course"]["unseen_task_accuracy"]) == 8


@pytest.mark.parametrize("functions", ["linear", "trees"])
def test_functions(data: Path, functions: str) -> None:
    words = ["learn", "in-context", "bayesian-prism", *SHORT, "--functions", functions, "--points", "5"]
    assert cli.main([*words, "--test-prompts", "16", "--dim", "2"]) == 0
    found = checked(data / "palimpsest-learn", "distance_to_truth")
    assert ("distance_to_bayes" in {m.name for m in found.measurements}) == (functions == "linear")


def test_tasks_of_texts_with_a_model(data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = LM.load("model").sha256
    assert cli.main([*MEND, "--data", "tasks.jsonl", "--model", "model"]) == 0
    assert "on 1 held-out tasks behind 3 vectors" in capsys.readouterr().out
    measured = checked(data / "palimpsest-learn", "prompt_accuracy")["prompt_accuracy"]
    found = (measured.before, measured.after, measured.reference)
    assert all(value is not None and 0 <= value <= 100 for value in found)
    assert LM.load("model").sha256 == before


def test_an_interrupted_run_goes_on(
    data: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    words = [*GPICL, "--data", "base.npz", "--tasks", "64"]
    assert cli.main([*words, "--out", "whole"]) == 0

    class Asked(loop.Interrupt):
        asked = True

        def __enter__(self):
            super().__enter__()
            self.asked = True
            return self

    with monkeypatch.context() as patch:
        patch.setattr(loop, "Interrupt", Asked)
        assert cli.main([*words, "--out", "parts"]) == 130
    assert not (data / "parts" / "evidence.json").exists()
    assert cli.main([*words, "--out", "parts"]) == 0
    weights = [(data / out / "learner" / "model.safetensors").read_bytes() for out in ("whole", "parts")]
    assert weights[0] == weights[1]
    capsys.readouterr()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([*GPICL, "--data", "none.npz"], "no such file"),
        ([*GPICL, "--data", "tasks.jsonl"], "found the columns"),
        ([*GPICL, "--data", "base.npz", "--test-share", "1.5"], "test_share must lie between 0 and 1"),
        ([*GPICL], "--data"),
        ([*MEND, "--data", "base.npz", "--model", "model"], ".npz"),
        ([*MEND, "--data", "tasks.jsonl", "--model", "nowhere"], "no such folder"),
        ([*MEND, "--data", "bad.jsonl", "--model", "model"], "bad.jsonl"),
        ([*MEND, "--data", "empty.jsonl", "--model", "model"], "empty"),
        ([*MEND, "--data", "tasks.jsonl", "--model", "model", "--vectors", "64"], "vectors do not fit"),
        (["learn", "in-context", "bayesian-prism", "--points", "1"], "at least 3 points"),
        (["learn", "in-context", "gpcl"], "did you mean gpicl"),
    ],
)
def test_bad_input_is_one_line(data: Path, words: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    (data / "bad.jsonl").write_text('{"prompt": "a", "completion": "b"}\n', encoding="utf-8")
    (data / "empty.jsonl").write_text("", encoding="utf-8")
    assert cli.main(words) == 2
    said = capsys.readouterr().err.strip().splitlines()[-1]
    assert said.startswith("palimpsest: error:")
    assert message in said
    assert not (data / "palimpsest-learn").exists()
