"""The ConceptVectors benchmark's file as records: passages, halves of paragraphs, places, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from palimpsest.core.errors import InputError
from palimpsest.data.concept_articles import cut_passages, read_articles
from palimpsest.data.records import documents, questions

ROME = {
    "Concept": "Rome",
    "Layer": 24,
    "Dim": 8792,
    "QA": ["Who was the first emperor?"],
    "wikipedia_content": "Rome was a city. " * 60,
    "text_completion": [{"First_half": "The first emperor", "Second_half": "was Augustus."}],
}


def write(folder: Path, *rows: object) -> Path:
    path = folder / "concepts.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def test_an_article_becomes_passages_and_paragraphs_to_complete(tmp_path: Path) -> None:
    table = read_articles(write(tmp_path, ROME, {**ROME, "Concept": "Italy", "text_completion": None, "Layer": None}))
    assert questions(table) == [("The first emperor", " was Augustus.")]
    assert set(table["concept"]) == {"Rome", "Italy"}
    assert {(row["layer"], row["neuron"]) for row in table} == {(24, 8792), (None, 8792)}
    texts = documents(table)
    assert len(texts) == 4
    assert all(400 <= len(text) < 700 for text in texts)
    first = read_articles(write(tmp_path, ROME), passages=1)
    assert documents(first) == texts[:1]


def test_a_list_in_one_file_is_read_as_well(tmp_path: Path) -> None:
    path = tmp_path / "concepts.json"
    path.write_text(json.dumps([ROME]), encoding="utf-8")
    assert len(read_articles(path)) == 3


@given(st.lists(st.text("ab .!?", max_size=40), max_size=30).map(" ".join))
def test_passages_hold_the_whole_text_and_are_long_enough(text: str) -> None:
    pieces = cut_passages(text, 30)
    assert " ".join(pieces).split() == text.split()
    assert all(len(piece) >= 30 for piece in pieces[:-1])
    assert len(pieces) <= 1 or len(pieces[-1]) >= 30


@pytest.mark.parametrize(
    ("row", "named"),
    [
        ({**ROME, "Concept": " "}, "no Concept"),
        ({**ROME, "wikipedia_content": None}, "no wikipedia_content"),
        ({**ROME, "text_completion": [{"First_half": "x"}]}, "no Second_half"),
        ({"text": "x"}, "no Concept"),
    ],
)
def test_what_is_not_a_concept_is_refused_with_its_place(tmp_path: Path, row: object, named: str) -> None:
    with pytest.raises(InputError, match=f"concepts.jsonl:2: {named}"):
        read_articles(write(tmp_path, ROME, row))


def test_an_empty_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError):
        read_articles(write(tmp_path))


def test_the_benchmarks_own_file(dev_data: Path) -> None:
    table = read_articles(dev_data / "conceptvectors" / "llama2_concepts_dev.jsonl.gz")
    assert len(set(table["concept"])) == 10
    assert ("Poland", 23, 743) in {(row["concept"], row["layer"], row["neuron"]) for row in table}
    assert all(len(text) >= 400 for text in documents(table))
    assert len(questions(table)) == 91
