"""The main job on a user's files: records alone, a model, a stream of requests; its proof, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer

from palimpsest.cli import main
from palimpsest.core.records import Evidence

SMALL = ["--config", "llama-tiny", "--train-epochs", "1", "--steps", "3", "--lr", "0.002"]


def test_records_alone_train_a_model_forget_and_prove_it(files, tmp_path, capsys):
    out = tmp_path / "proof"
    assert main(["run", "--forget", files.forget, "--retain", files.retain, "--out", str(out), *SMALL]) == 0
    said = capsys.readouterr().err
    assert "training target and reference" in said  # the plan comes before the work
    evidence = Evidence.read(out)
    assert evidence.method["name"] == "npo"
    assert evidence["knowledge"].reference is not None
    assert evidence.extras["cost"]["changed"] == "weights"
    assert evidence.extras["cost"]["steps"] == 3
    assert evidence["privacy_leakage"].after is not None  # a holdout was set aside before training
    assert {path.name for path in out.iterdir()} == {
        "certificate.json",
        "evidence.json",
        "job.json",
        "measurements.csv",
        "model",
        "records.csv",
        "report.html",
    }
    model = AutoModelForCausalLM.from_pretrained(out / "model")
    tokenizer = AutoTokenizer.from_pretrained(out / "model")
    assert model(**tokenizer("Where", return_tensors="pt", return_token_type_ids=False)).logits.isfinite().all()
    assert main(["verify", str(out)]) == 0
    assert main(["verify", str(out), "--rerun"]) == 0
    assert "rerun of knowledge" in capsys.readouterr().out


def test_one_changed_byte_is_found(files, tmp_path, capsys):
    out = tmp_path / "proof"
    assert main(["run", "--forget", files.forget, "--retain", files.retain, "--out", str(out), *SMALL]) == 0
    report = out / "report.html"
    report.write_bytes(report.read_bytes().replace(b"palimpsest", b"palimpsesT", 1))
    assert main(["verify", str(out)]) == 1
    assert "report.html" in capsys.readouterr().out


def test_plain_text_is_recited_and_audited(tmp_path):
    letters = "abcdefghijklmnop"
    for name, words in (("forget", "river stone"), ("retain", "copper window")):
        text = "\n\n".join(
            f"The {words} of {a}{b} goes on to {b}{a} and never ends. " * 6 for a in letters for b in letters[:3]
        )
        (tmp_path / f"{name}.txt").write_text(text)
    out = tmp_path / "proof"
    arguments = ["--forget", str(tmp_path / "forget.txt"), "--retain", str(tmp_path / "retain.txt"), "--rows", "12"]
    assert main(["run", *arguments, "--out", str(out), *SMALL]) == 0
    evidence = Evidence.read(out)
    assert evidence["verbatim"].after is not None
    assert evidence["knowledge"].after is None
    assert "question" in evidence["knowledge"].note


def test_the_users_model_and_what_it_is_to_be_tuned_on_make_the_reference(files, tmp_path):
    out = tmp_path / "proof"
    arguments = ["--model", files.model, "--train", files.train, "--forget", files.forget, "--retain", files.retain]
    tuned = ["--train-epochs", "1", "--steps", "2", "--method", "grad-diff", "--lora-rank", "2"]
    assert main(["run", *arguments, *tuned, "--out", str(out)]) == 0
    evidence = Evidence.read(out)
    assert evidence["forget_nll"].reference is not None
    assert evidence.method["config"]["lora_rank"] == 2


def test_the_users_model_without_a_reference_says_what_is_missing(files, tmp_path):
    out = tmp_path / "proof"
    arguments = [
        "--model",
        files.model,
        "--forget",
        files.forget,
        "--retain",
        files.retain,
        "--steps",
        "2",
        "--lr",
        "0.01",
    ]
    assert main(["run", *arguments, "--out", str(out)]) == 0
    evidence = Evidence.read(out)
    assert evidence["privacy_leakage"].after is None
    assert "holdout" in evidence["privacy_leakage"].note
    assert evidence["knowledge"].reference is None


def test_a_second_run_takes_finished_work_from_the_cache(files, tmp_path, monkeypatch):
    arguments = ["run", "--forget", files.forget, "--retain", files.retain, *SMALL]
    assert main([*arguments, "--out", str(tmp_path / "one")]) == 0
    monkeypatch.setattr("palimpsest.core.watch.fit", lambda *_, **__: pytest.fail("trained again"))
    assert main([*arguments, "--out", str(tmp_path / "two")]) == 0
    one, two = (Evidence.read(tmp_path / name) for name in ("one", "two"))
    assert one.measurements == two.measurements


def test_folds_run_the_method_on_growing_and_successive_requests(files, tmp_path):
    out = tmp_path / "proof"
    arguments = ["--forget", files.forget, "--retain", files.retain, "--folds", "2", "--out", str(out), *SMALL]
    assert main(["run", *arguments]) == 0
    evidence = Evidence.read(out)
    assert evidence["scalability"].after is not None
    assert len(evidence.extras["requests"]["sustainability"]["utility"]) == 3  # before, and after each request
    assert main(["verify", str(out), "--rerun"]) == 0


def test_compare_ranks_methods_with_tests_in_one_page(files, tmp_path, capsys):
    out = tmp_path / "compare"
    arguments = ["--forget", files.forget, "--retain", files.retain, "--methods", "npo,grad-diff", "--out", str(out)]
    assert main(["compare", "forget", *arguments, *SMALL]) == 0
    assert "nearest to the reference" in capsys.readouterr().err
    assert (out / "compare.html").exists()
    assert "grad-diff" in (out / "compare.csv").read_text()
    assert {"npo", "grad-diff"} <= {path.name for path in out.iterdir()}


def test_requests_are_served_one_after_the_other(files, tmp_path, capsys):
    lines = Path(files.forget).read_text().splitlines(keepends=True)
    parts = [lines[: len(lines) // 2], lines[len(lines) // 2 :]]
    for number, part in enumerate(parts):
        (tmp_path / f"part{number}.jsonl").write_text("".join(part))
    out = tmp_path / "stream"
    requests = [word for n in range(2) for word in ("--request", str(tmp_path / f"part{n}.jsonl"))]
    arguments = ["--model", files.model, *requests, "--retain", files.retain, "--steps", "2", "--lr", "0.001"]
    assert main(["forget", "npo", *arguments, "--out", str(out)]) == 0
    record = json.loads((out / "forget.json").read_text())
    assert [row["request"] for row in record["stream"]] == ["before", "part0", "part1"]
    assert all("utility_nll" in row for row in record["stream"])
    assert record["model"]["before"]["sha256"] != record["model"]["after"]["sha256"]
    assert not (out / ".unfinished").exists()
    proof = tmp_path / "proof"
    audit = ["--before", files.model, "--after", str(out / "model"), "--forget", files.forget, "--retain", files.retain]
    assert main(["audit", "muse", *audit, "--samples", "8", "--out", str(proof)]) == 0
    assert Evidence.read(proof)["knowledge"].n == 8
    assert main(["verify", str(proof), "--rerun"]) == 0
