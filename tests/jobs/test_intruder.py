"""``run --attacks``: the battery joins the proof, its certificate and its report; too few facts are refused."""

from __future__ import annotations

import functools
import json

import pytest

from palimpsest.audit import sok_unlearning
from palimpsest.cli import main
from palimpsest.core.records import Evidence
from palimpsest.data.world import World

SMALL = ["--config", "llama-tiny", "--train-epochs", "1", "--steps", "3", "--lr", "0.002", "--attacks"]


@pytest.fixture
def town_files(tmp_path):
    world = World(people=44, facts=0, forget=0.3, seed=1)
    for split in ("forget", "retain", "holdout"):
        rows = world.questions(split, "trained").remove_columns("text")
        (tmp_path / f"{split}.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows), encoding="utf-8")
    return [
        part for split in ("forget", "retain", "holdout") for part in (f"--{split}", str(tmp_path / f"{split}.jsonl"))
    ]


def test_the_proof_carries_the_verdict(town_files, tmp_path, monkeypatch, capsys):
    small = functools.partial(sok_unlearning.RemovalOrSuppression, attacks=("avoided", "lens", "int4"), facts=40)
    monkeypatch.setattr(sok_unlearning, "RemovalOrSuppression", small)
    out = tmp_path / "proof"
    assert main(["run", *town_files, "--out", str(out), *SMALL]) == 0
    evidence = Evidence.read(out)
    told = evidence.extras["attacks"]
    assert {row["attack"] for row in told["table"]} == {"asked", "avoided", "lens", "int4"}
    assert evidence["attack_int4"].reference is not None
    assert evidence["knowledge"].after is not None  # what the six-way audit measured is still there
    assert json.loads((out / "certificate.json").read_text())["removal"]["verdict"] == told["verdict"]
    assert "What an attacker still gets" in (out / "report.html").read_text()
    assert main(["verify", str(out), "--rerun"]) == 0
    assert "rerun of attack_int4" in capsys.readouterr().out


def test_too_few_facts_say_how_many_are_needed(files, tmp_path, capsys):
    arguments = ["--forget", files.forget, "--retain", files.retain, "--out", str(tmp_path / "proof")]
    assert main(["run", *arguments, *SMALL]) == 2
    assert "at least 20 forget facts about at least 8 different subjects" in capsys.readouterr().err
