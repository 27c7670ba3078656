import itertools
import json

import pytest
from tests.curate.conftest import write_lines

from palimpsest.core.errors import InputError
from palimpsest.curate import labels
from palimpsest.curate.labels import BIOMEDICAL, Schema, annotate, annotated
from palimpsest.data.teacher import Teacher

GOOD = {"type": "study", "domain": "clinical", "educational": 4}


class Said:
    """A model in this process that answers by a function of the prompt, and keeps what it was asked."""

    made = itertools.count()

    def __init__(self, answer):
        self.answer, self.prompts, self.sha256 = answer, [], f"said {next(self.made)}"

    def generate(self, prompts, **how):
        self.prompts += prompts
        return [self.answer(prompt) for prompt in prompts]


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("PALIMPSEST_CACHE", str(tmp_path / "cache"))


@pytest.mark.parametrize(
    ("answer", "why"),
    [
        (json.dumps(GOOD), ""),
        (f"It tells of a {{trial}}.\n```json\n{json.dumps(GOOD)}\n```", ""),
        ('{"type": "Clinical_Case", "domain": " clinical ", "educational": "4"}', ""),
        ('{"type": "study", "domain": "clinical", "educational": 4.0}', ""),
        ('{"type": "study", "domain": "clinical", "educational": 4.5}', "unknown educational '4.5'"),
        ('{"type": "study", "domain": "clinical", "educational": 7}', "unknown educational '7'"),
        ('{"type": "study", "domain": "clinical", "educational": true}', "unknown educational 'True'"),
        ('{"type": "editorial", "domain": "clinical", "educational": 4}', "unknown type 'editorial'"),
        ('{"type": ["study"], "domain": "clinical", "educational": 4}', "unknown type \"['study']\""),
        ('{"type": "study", "domain": "clinical"}', "educational is missing"),
        ("I would say it is a study {of sorts}.", "no JSON object"),
        ("", "no JSON object"),
    ],
)
def test_answers(answer, why):
    found, reason = BIOMEDICAL.read(answer)
    assert reason == why
    if not why:
        assert set(found) == set(GOOD)
        assert found["educational"] == 4
        assert found["type"] in ("study", "clinical case")


def test_the_teacher_is_told_everything_and_asked_again_once():
    bad = {"b": "no idea", "c": json.dumps({**GOOD, "type": "poem"})}

    def answer(prompt):
        text = prompt.split("The text:\n")[1].split("\n\n")[0]
        if "could not be used" in prompt and text == "b":
            return json.dumps(GOOD)
        return bad.get(text, json.dumps(GOOD))

    model = Said(answer)
    rows = [{"text": text, "context": "Methods" if text == "a" else ""} for text in "abc"]
    found = annotate(Teacher.local(model, "tester"), BIOMEDICAL, rows)
    assert [row["text"] for row in found.rows] == ["a", "b"]
    assert found.rows[0] == {**rows[0], **GOOD}
    assert [row["why"] for row in found.aside] == ["unknown type 'poem'"]
    assert found.reasons() == {"unknown type 'poem'": 1}
    assert found.by == "tester"
    assert len(model.prompts) == 5
    assert "It stands under: Methods" in model.prompts[0]
    for field in BIOMEDICAL.fields:
        assert all(f"- {point}: {meaning}" in model.prompts[0] for point, meaning in field.points.items())
    annotate(Teacher.local(model, "tester"), BIOMEDICAL, rows)
    assert len(model.prompts) == 5  # what was answered is not asked again


def test_a_long_text_is_cut_for_the_teacher():
    assert len(labels.prompt("x" * 50_000)) < 6_100


def test_a_schema_of_ones_own(tmp_path):
    told = {"role": "You know birds.", "fields": {"kind": {"classes": {"owl": "at night", "lark": "by day"}}}}
    (tmp_path / "schema.json").write_text(json.dumps(told))
    schema = Schema.load(tmp_path / "schema.json")
    assert schema.to_json() == told
    assert "- owl: at night" in schema.instructions()
    assert Schema.from_json(BIOMEDICAL.to_json()) == BIOMEDICAL


@pytest.mark.parametrize(
    ("told", "why"),
    [
        ([], "wanted"),
        ({"fields": {}}, "no fields"),
        ({"fields": {"kind": {"classes": {"owl": "x"}}}}, "'kind' has 1 labels; wanted at least two"),
        ({"fields": {"kind": {"labels": {"owl": "x"}}}}, "'kind' has 'labels'"),
        ({"fields": {"kind": {"scale": {"low": "x", "high": "y"}}}}, "points low, high; wanted numbers"),
        ({"fields": {"kind": {"classes": ["owl", "lark"]}}}, "wanted"),
    ],
)
def test_a_schema_that_is_none(tmp_path, told, why):
    (tmp_path / "schema.json").write_text(json.dumps(told))
    with pytest.raises(InputError, match=why):
        Schema.load(tmp_path / "schema.json")


def test_a_schema_that_cannot_be_read(tmp_path):
    with pytest.raises(InputError, match="not a schema"):
        Schema.load(tmp_path / "none.json")
    (tmp_path / "broken.json").write_text("{")
    with pytest.raises(InputError, match="not a schema"):
        Schema.load(tmp_path / "broken.json")


def test_annotated_files(tmp_path):
    rows = [
        {"body": "a text", "id": 7, "title": "Cases", **GOOD},
        {"body": "another", "id": 8, "title": None, **GOOD, "domain": "law"},
        {"body": " ", "id": 9, "title": None, **GOOD},
    ]
    write_lines(tmp_path / "labelled.jsonl", rows)
    found = annotated(tmp_path / "labelled.jsonl", BIOMEDICAL, text="body", context="title", article="id")
    assert found.rows == [{"text": "a text", "context": "Cases", "article": "7", **GOOD}]
    assert found.reasons() == {"unknown domain 'law'": 1, "no text": 1}
    assert found.by == "labelled.jsonl"
    (tmp_path / "labelled.csv").write_text("body,type,domain,educational\nx y,study,clinical,4\n")
    assert annotated(tmp_path / "labelled.csv", BIOMEDICAL, text="body").rows[0]["educational"] == 4
    with pytest.raises(InputError, match=r"no column 'text'; found 'body'.*wanted text, type, domain, educational"):
        annotated(tmp_path / "labelled.csv", BIOMEDICAL, text="text")
