from __future__ import annotations

import pytest

from palimpsest.core.errors import InputError
from palimpsest.data.columns import ALIASES, canonical, read_columns


@pytest.mark.parametrize(("target", "alias"), [(target, alias) for target, names in ALIASES.items() for alias in names])
def test_every_alias_is_mapped(target: str, alias: str):
    chat = [{"role": "user", "content": "hello"}]
    row = {alias: chat if target == "messages" else "hello", "label": 3}
    if target in ("prompt", "completion"):
        row["completion" if target == "prompt" else "prompt"] = "other"
    clean = canonical(row, "here")
    assert clean[target] == row[alias]
    assert clean["label"] == 3


def test_names_are_read_without_case_and_spaces():
    assert canonical({" Question": "q", "ANSWER ": "a"}, "here") == {"prompt": "q", "completion": "a"}


def test_an_exact_name_beats_an_alias_and_other_case():
    row = {"Text": "other", "text": "mine", "content": "kept"}
    assert canonical(row, "here") == {"Text": "other", "text": "mine", "content": "kept"}
    row = {"question": "kept", "prompt": "p", "completion": "c"}
    assert canonical(row, "here") == row


def test_instruction_and_input_are_joined():
    row = {"instruction": "Translate.", "input": "Haus", "output": "house"}
    assert canonical(row, "here") == {"prompt": "Translate.\nHaus", "completion": "house"}
    assert canonical({**row, "input": ""}, "here") == {"prompt": "Translate.", "completion": "house"}
    assert canonical({"input": "Haus", "output": "house"}, "here") == {"prompt": "Haus", "completion": "house"}
    with pytest.raises(InputError, match="here: 'input' is a number"):
        canonical({**row, "input": 4}, "here")


def test_a_missing_value_counts_as_absent():
    assert canonical({"text": "t", "prompt": None, "completion": None}, "here")["text"] == "t"
    with pytest.raises(InputError, match=r"here: found the columns 'text' \('text' is empty\); wanted 'text', or"):
        canonical({"text": None}, "here")


@pytest.mark.parametrize(
    ("row", "wanted", "message"),
    [
        (
            {"question": "q", "best_answer": "a"},
            "any",
            "here: found the columns 'question', 'best_answer'; wanted 'text'",
        ),
        ({}, "any", "here: found the columns none; wanted"),
        ({f"c{i}": "x" for i in range(20)}, "any", "'c11' and 8 more; wanted"),
        ({"completion": "alone"}, "any", "found the columns 'completion'; wanted"),
        ({"text": "t"}, "questions", "found the columns 'text'; wanted 'prompt' and 'completion'"),
        ({"prompt": "p", "completion": "c"}, "documents", "found the columns 'prompt', 'completion'; wanted 'text'"),
        ({"text": 3}, "any", r"here: 'text' is a number \(3\); wanted a string"),
        ({"text": True}, "any", "'text' is true or false"),
        ({"document": ["a"]}, "any", "'document' is a list"),
        ({"question": "q", "answer": {"a": 1}}, "any", "'answer' is an object"),
        ({"text": " \n"}, "any", "here: 'text' is blank; wanted text"),
        ({"question": "q", "Answer": "  "}, "any", "here: 'Answer' is blank"),
        ({"messages": []}, "any", r"\('messages' is empty\)"),
        ({"messages": "hello"}, "any", "'messages' is 'hello'; wanted a list of"),
        ({"messages": [{"role": "user"}]}, "any", "wanted a list of"),
        ({"messages": [{"role": "user", "content": " "}]}, "any", "the last of 'messages' is blank"),
    ],
)
def test_a_row_that_cannot_be_used_says_why(row: dict, wanted, message: str):
    with pytest.raises(InputError, match=message):
        canonical(row, "here", wanted)


def test_an_empty_prompt_is_a_prompt():
    assert canonical({"prompt": "", "completion": "c"}, "here")["prompt"] == ""


def test_only_the_columns_that_matter_are_read():
    assert read_columns(("id", "question", "answer", "image")) == ("question", "answer")
    assert read_columns(("instruction", "input", "output", "id")) == ("instruction", "input", "output")
    assert read_columns(("id", "image")) == ("id", "image")
