from __future__ import annotations

import json
from pathlib import Path

import datasets
import pytest
from datasets import ClassLabel, Dataset, DatasetDict, Features, Value

from palimpsest.core.errors import InputError
from palimpsest.data import sources
from palimpsest.data.records import pairs


def write_lines(path: Path, rows: list[dict]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def test_columns_are_mapped_and_extra_ones_kept(tmp_path: Path):
    path = write_lines(
        tmp_path / "a.jsonl", [{"question": "q", "answer": "a", "tags": ["x"], "n": 1}, {"text": "t", "m": 2.5}]
    )
    table = sources.read(path)
    assert pairs(table) == [("q", " a"), ("", "t")]
    assert table[0] == {"prompt": "q", "completion": "a", "tags": ["x"], "n": 1, "text": None, "m": None}


def test_extra_columns_of_mixed_type_become_strings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    rows = [
        {"text": "a", "x": 1, "y": 1, "z": 1},
        {"text": "b", "x": "s", "y": 2.5, "z": 2},
        {"text": "c", "x": [1], "y": 3, "z": {"k": 1}},
    ]
    path = write_lines(tmp_path / "a.jsonl", rows)
    whole = sources.read(path)
    assert whole["x"] == ["1", "s", "[1]"]
    assert whole["y"] == [1.0, 2.5, 3.0]
    assert whole["z"] == ["1", "2", '{"k": 1}']
    monkeypatch.setattr(sources, "_CHUNK", 1)  # the types now disagree between parts instead of inside one
    assert sources.read(path).to_list() == whole.to_list()


def test_a_folder_and_a_glob_are_read_in_order_of_name(tmp_path: Path):
    write_lines(tmp_path / "data" / "b.jsonl", [{"text": "b"}])
    write_lines(tmp_path / "data" / "sub" / "c.jsonl", [{"text": "c"}])
    (tmp_path / "data" / "a.txt").write_text("a\n")
    (tmp_path / "data" / "notes.md").write_text("not data")
    write_lines(tmp_path / "data" / ".hidden" / "d.jsonl", [{"text": "d"}])
    assert sources.read(tmp_path / "data")["text"] == ["a", "b", "c"]
    assert sources.read(str(tmp_path / "data" / "*.jsonl"))["text"] == ["b"]
    assert sources.read(str(tmp_path / "data" / "**" / "*.jsonl"))["text"] == ["b", "c"]


def test_a_file_whose_name_looks_like_a_glob_is_a_file(tmp_path: Path):
    assert sources.read(write_lines(tmp_path / "a[1].jsonl", [{"text": "x"}]))["text"] == ["x"]


def test_large_input_is_mapped_from_disk_and_read_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("PALIMPSEST_CACHE", str(tmp_path / "cache"))
    path = write_lines(tmp_path / "a.jsonl", [{"text": f"row {i}", "n": i} for i in range(10)])
    plain = sources.read(path)
    monkeypatch.setattr(sources, "SPILL", 1)
    monkeypatch.setattr(sources, "_CHUNK", 4)
    mapped = sources.read(path)
    assert mapped.to_list() == plain.to_list()
    assert len(list((tmp_path / "cache").rglob("*.arrow"))) == 3
    monkeypatch.setattr(sources, "_from_file", lambda path: pytest.fail("read again"))
    assert sources.read(path).to_list() == plain.to_list()


def test_a_changed_large_file_is_read_again_and_a_broken_one_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("PALIMPSEST_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(sources, "SPILL", 1)
    path = write_lines(tmp_path / "a.jsonl", [{"text": "old"}])
    assert sources.read(path)["text"] == ["old"]
    write_lines(path, [{"text": "newer"}])
    assert sources.read(path)["text"] == ["newer"]
    before = sorted((tmp_path / "cache").rglob("*"))
    path.write_text('{"text": "fine"}\nbroken\n')
    with pytest.raises(InputError, match=r"a\.jsonl:2: not valid JSON"):
        sources.read(path)
    assert sorted((tmp_path / "cache").rglob("*")) == before


def test_rows_stream(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """A broken line is met before later lines are read."""
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "a"}\n{"txt": "b"}\nnever parsed\n')
    with pytest.raises(InputError, match=r"a\.jsonl:2: found the columns 'txt'; wanted 'text'"):
        sources.read(path)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", "", r"a\.jsonl: the file is empty; wanted at least one row"),
        ("a.jsonl", "\n\n", "the file is empty"),
        ("a.txt", " \n\n", "the file is empty; wanted at least one paragraph"),
        ("a.csv", "", "the file is empty"),
        ("a.csv", "text\n", "the file is empty"),
        ("a.json", "[]", "the file is empty"),
        ("a.csv", "question,best\nq,b\n", r"a\.csv:2: found the columns 'question', 'best'; wanted 'text'"),
        ("a.csv", "text\nfine\n  \n", r"a\.csv:3: 'text' is blank"),
        ("a.jsonl", '{"text": ""}\n', r"a\.jsonl:1: 'text' is blank"),
        ("a.docx", "x", r"a\.docx: unknown kind of file '\.docx'; wanted one that ends in \.csv, "),
        ("a", "x", "unknown kind of file 'a'"),
    ],
)
def test_files_that_cannot_be_used_say_why(tmp_path: Path, name: str, content: str, message: str):
    (tmp_path / name).write_text(content)
    with pytest.raises(InputError, match=message):
        sources.read(tmp_path / name)


def test_one_empty_file_of_a_folder_is_named(tmp_path: Path):
    write_lines(tmp_path / "a.jsonl", [{"text": "x"}])
    (tmp_path / "b.jsonl").touch()
    with pytest.raises(InputError, match=r"b\.jsonl: the file is empty"):
        sources.read(tmp_path)


def test_a_missing_file_suggests_near_names(tmp_path: Path):
    write_lines(tmp_path / "forget.jsonl", [{"text": "x"}])
    with pytest.raises(InputError, match=r"forgot\.jsonl: no such file; did you mean forget\.jsonl\?"):
        sources.read(tmp_path / "forgot.jsonl")
    with pytest.raises(InputError, match=r"forget\.csv: no such file; did you mean forget\.jsonl\?"):
        sources.read(tmp_path / "forget.csv")
    with pytest.raises(InputError, match=r"no such file$"):
        sources.read(tmp_path / "zzz.csv")
    with pytest.raises(InputError, match=r"no such file, and no folder .*nowhere"):
        sources.read(tmp_path / "nowhere" / "a.jsonl")


def test_empty_folders_and_globs_are_named(tmp_path: Path):
    with pytest.raises(InputError, match="the folder holds nothing; wanted a file that ends in"):
        sources.read(tmp_path)
    (tmp_path / "a.md").write_text("x")
    with pytest.raises(InputError, match=r"the folder holds a\.md; wanted"):
        sources.read(tmp_path)
    with pytest.raises(InputError, match=r"\*\.jsonl: no file matches"):
        sources.read(tmp_path / "*.jsonl")
    with pytest.raises(InputError, match=r"a\.md: unknown kind of file"):
        sources.read(tmp_path / "*.md")


def test_wanted_is_checked(tmp_path: Path):
    path = write_lines(tmp_path / "a.jsonl", [{"text": "x"}])
    assert len(sources.read(path, wanted="documents")) == 1
    with pytest.raises(InputError, match=r"a\.jsonl:1: found the columns 'text'; wanted 'prompt' and 'completion'"):
        sources.read(path, wanted="questions")
    with pytest.raises(InputError, match="wanted must be one of"):
        sources.read(path, wanted="everything")  # type: ignore[arg-type]


def test_a_table_is_checked_and_keeps_its_features():
    features = Features(
        {"Question": Value("string"), "answer": Value("string"), "label": ClassLabel(names=["no", "yes"])}
    )
    table = sources.read(Dataset.from_dict({"Question": ["q"], "answer": ["a"], "label": [1]}, features=features))
    assert pairs(table) == [("q", " a")]
    assert table.features["label"] == ClassLabel(names=["no", "yes"])
    with pytest.raises(InputError, match="the table, row 2: found the columns 'text'"):
        sources.read(Dataset.from_dict({"text": ["a", None]}))
    with pytest.raises(InputError, match="the table: it has no rows"):
        sources.read(Dataset.from_dict({"text": []}))


def test_a_table_of_instructions_is_joined():
    table = sources.read(
        Dataset.from_dict({"instruction": ["Add.", "Say hi."], "input": ["1 1", ""], "output": ["2", "hi"]})
    )
    assert pairs(table) == [("Add.\n1 1", " 2"), ("Say hi.", " hi")]
    assert set(table.column_names) == {"prompt", "completion"}


@pytest.mark.parametrize(
    ("source", "called"),
    [
        ("hf:org/name", ("org/name", None, "train")),
        ("hf:org/name/config", ("org/name", "config", "train")),
        ("hf:org/name:test[:10%]", ("org/name", None, "test[:10%]")),
        ("hf:org/name/config:validation", ("org/name", "config", "validation")),
        ("hf:squad", ("squad", None, "train")),
    ],
)
def test_the_hub_is_asked_for_one_split(monkeypatch: pytest.MonkeyPatch, source: str, called: tuple):
    calls = []

    def load_dataset(path, name=None, *, split=None, streaming=None):
        calls.append((path, name, split))
        assert streaming is False
        return Dataset.from_dict({"question": ["q"], "answer": ["a"]})

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    assert pairs(sources.read(source)) == [("q", " a")]
    assert calls == [called]


def test_hub_errors_are_one_line(monkeypatch: pytest.MonkeyPatch):
    def fail(*args, **kwargs):
        raise ConnectionError("Couldn't reach the hub\nlong story")

    monkeypatch.setattr(datasets, "load_dataset", fail)
    with pytest.raises(InputError, match=r"^hf:org/name: cannot be loaded \(Couldn't reach the hub\)$"):
        sources.read("hf:org/name")
    monkeypatch.setattr(datasets, "load_dataset", lambda *args, **kwargs: DatasetDict({}))
    with pytest.raises(InputError, match="found a DatasetDict; wanted one split"):
        sources.read("hf:org/name")
    for source in ("hf:", "hf:org//name", "hf:a/b/c/d"):
        with pytest.raises(InputError, match="wanted hf:org/name"):
            sources.read(source)


def test_hub_rows_are_checked(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(datasets, "load_dataset", lambda *args, **kwargs: Dataset.from_dict({"sql": ["x"]}))
    with pytest.raises(InputError, match="hf:org/name, row 1: found the columns 'sql'; wanted 'text'"):
        sources.read("hf:org/name")


def test_real_files(dev_data: Path):
    book = sources.read(dev_data / "books" / "forget_time_machine.txt.gz")
    assert max(map(len, book["text"])) <= 800
    assert 150_000 < sum(map(len, book["text"])) < 250_000
    authors = sources.read(dev_data / "tofu" / "tofu_authors.jsonl.gz", wanted="questions")
    assert len(authors) == 2400
    assert {"author", "perturbed_answer"} <= set(authors.column_names)
