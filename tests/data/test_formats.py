from __future__ import annotations

import gzip
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet
import pytest
from hypothesis import given
from hypothesis import strategies as st

from palimpsest.core.errors import InputError
from palimpsest.data import formats


def write(path: Path, content: str | bytes) -> Path:
    data = content.encode() if isinstance(content, str) else content
    path.write_bytes(gzip.compress(data) if path.suffix == ".gz" else data)
    return path


def read(path: Path) -> list[tuple[str, dict]]:
    """Places relative to the folder, for short comparisons."""
    return [(where.removeprefix(f"{path.parent}/"), row) for where, row in formats.rows(path)]


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz", "A.JSONL"])
def test_json_lines_know_their_lines(tmp_path: Path, name: str):
    path = write(tmp_path / name, '{"text": "one"}\n\n{"text": "zwei", "n": 2}\n')
    assert read(path) == [(f"{name}:1", {"text": "one"}), (f"{name}:3", {"text": "zwei", "n": 2})]


@pytest.mark.parametrize("name", ["a.csv", "a.csv.gz"])
def test_csv_cells_may_hold_line_ends_and_are_none_when_empty(tmp_path: Path, name: str):
    path = write(tmp_path / name, '\ufeffprompt,completion,tag\r\n"two\nlines","a, b",\r\n\r\nq,a,x\r\n')
    assert read(path) == [
        (f"{name}:2", {"prompt": "two\nlines", "completion": "a, b", "tag": None}),
        (f"{name}:5", {"prompt": "q", "completion": "a", "tag": "x"}),
    ]


@pytest.mark.parametrize("separator", [",", ";", "\t"])
def test_the_separator_is_the_headers(tmp_path: Path, separator: str):
    path = write(tmp_path / "a.csv", f"prompt{separator}completion\nq{separator}a\n")
    assert read(path)[0][1] == {"prompt": "q", "completion": "a"}


def test_a_csv_cell_may_be_a_long_document(tmp_path: Path):
    path = write(tmp_path / "a.csv", "text\n" + "word " * 100_000 + "\n")
    assert len(read(path)[0][1]["text"]) == 500_000


@pytest.mark.parametrize(
    "content", ['[{"text": "a"}, {"text": "b"}]', '{"version": 1, "data": [{"text": "a"}, {"text": "b"}]}']
)
def test_json_is_a_list_or_an_object_with_one(tmp_path: Path, content: str):
    assert read(write(tmp_path / "a.json", content)) == [
        ("a.json, row 1", {"text": "a"}),
        ("a.json, row 2", {"text": "b"}),
    ]


def test_parquet(tmp_path: Path):
    pyarrow.parquet.write_table(pa.table({"text": ["a", "b"], "n": [1, None]}), tmp_path / "a.parquet")
    assert read(tmp_path / "a.parquet") == [
        ("a.parquet, row 1", {"text": "a", "n": 1}),
        ("a.parquet, row 2", {"text": "b", "n": None}),
    ]


def test_text_is_packed_by_whole_paragraphs(tmp_path: Path):
    paragraphs = [f"Paragraph {i}\n" + "x" * 300 for i in range(5)]
    path = write(tmp_path / "a.txt.gz", "\n\n" + "\n \n\n".join(paragraphs))
    assert read(path) == [
        ("a.txt.gz:3", {"text": "\n\n".join(paragraphs[:2])}),
        ("a.txt.gz:11", {"text": "\n\n".join(paragraphs[2:4])}),
        ("a.txt.gz:19", {"text": paragraphs[4]}),
    ]


def test_a_long_paragraph_is_split_at_sentence_ends(tmp_path: Path):
    sentences = [
        f"Sentence {i} says {'so ' * 40}indeed{end}" for i, end in enumerate((".", "!”", "?", '."', ".", ".", ".", "."))
    ]
    passages = [row["text"] for _, row in read(write(tmp_path / "a.txt", " ".join(sentences)))]
    assert len(passages) == 2
    assert all(passage.endswith(tuple('.!?"”')) and len(passage) <= formats.PASSAGE for passage in passages)
    assert " ".join(passages) == " ".join(sentences)


@given(st.text(alphabet="ab .!\n", max_size=300), st.integers(1, 50))
def test_splitting_loses_nothing_but_spaces(text: str, limit: int):
    pieces = list(formats.split(text, limit))
    assert all(0 < len(piece) <= limit and piece == piece.strip() for piece in pieces)
    assert "".join("".join(pieces).split()) == "".join(text.split())


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", '{"text": "x"}\n{"text": \n', r"a\.jsonl:2: not valid JSON \(Expecting value, column"),
        ("a.jsonl", '{"text": "x"}\n[1]\n', r"a\.jsonl:2: found a list; wanted an object"),
        ("a.jsonl", "3\n", r"a\.jsonl:1: found a number; wanted an object"),
        ("a.jsonl", b'{"text": "x"}\n{"text": "caf\xe9"}\n', r"a\.jsonl:2: not UTF-8 \(byte 0xe9 at offset 27\)"),
        ("a.txt", "\ufeffhello".encode("utf-16-le"), r"a\.txt: found UTF-16 text; wanted UTF-8"),
        ("a.json", '{"text": "x"}\n{"text": "y"}', r"a\.json:2: not valid JSON .*then name it \.jsonl"),
        ("a.json", '[{"text": "x"},\n 7]', r"a\.json, row 2: found a number"),
        ("a.json", '{"text": "x"}', r"a\.json: found an object; wanted a list of objects"),
        (
            "a.csv",
            "prompt,completion\nq,a\nq\n",
            r"a\.csv:3: found 1 cells; wanted 2 as in the header \(prompt, completion\)",
        ),
        ("a.csv", 'text\n"open\n', r"a\.csv:2: not valid CSV"),
        ("a.csv", "text,text\na,b\n", r"a\.csv:1: the column 'text' appears twice"),
        ("a.parquet", b"PAR1 not really", r"a\.parquet: not a readable parquet file"),
    ],
)
def test_broken_files_name_the_place(tmp_path: Path, name: str, content: str | bytes, message: str):
    with pytest.raises(InputError, match=message):
        read(write(tmp_path / name, content))


def test_a_cut_off_gzip_file_is_named(tmp_path: Path):
    whole = gzip.compress(b'{"text": "x"}\n' * 1000)
    for content in (whole[: len(whole) // 2], b"plain text", whole[:15] + b"\xff" * 20 + whole[35:]):
        (tmp_path / "a.jsonl.gz").write_bytes(content)
        with pytest.raises(InputError, match=r"a\.jsonl\.gz: not a whole gzip file"):
            read(tmp_path / "a.jsonl.gz")


def test_a_file_that_may_not_be_read_is_named(tmp_path: Path):
    with pytest.raises(InputError, match=r"gone\.jsonl: cannot be read \(No such file"):
        read(tmp_path / "gone.jsonl")


def test_known_extensions():
    assert formats.extension(Path("x.JSONL.gz")) == ".jsonl.gz"
    assert formats.extension(Path("x.doc")) == ""
