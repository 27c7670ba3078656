from __future__ import annotations

import unicodedata

import pytest
from datasets import Dataset, Features, List, Value
from hypothesis import given
from hypothesis import strategies as st

from palimpsest.core.errors import InputError
from palimpsest.data.records import (
    concat,
    content_hashes,
    documents,
    pairs,
    questions,
    select_documents,
    select_questions,
    sha256,
    stringify,
)


def mixed() -> Dataset:
    chat = [
        {"role": "system", "content": "Be kind."},
        {"role": "user", "content": "Who?"},
        {"role": "assistant", "content": "Nobody."},
    ]
    return Dataset.from_list(
        [
            {"text": "A tale.", "prompt": None, "completion": None, "messages": None, "label": 1},
            {"text": None, "prompt": "Where?", "completion": "Here.", "messages": None, "label": 2},
            {"text": None, "prompt": None, "completion": None, "messages": chat, "label": 3},
            {"text": "ignored", "prompt": "When?\n", "completion": "Now.", "messages": None, "label": 4},
        ]
    )


def test_every_row_becomes_a_pair_in_order():
    assert pairs(mixed()) == [
        ("", "A tale."),
        ("Where?", " Here."),
        ("Be kind.\nWho?", " Nobody."),
        ("When?\n", "Now."),
    ]


def test_documents_and_questions_part_the_rows():
    assert documents(mixed()) == ["A tale."]
    assert questions(mixed()) == pairs(mixed())[1:]
    assert select_documents(mixed())["label"] == [1]
    assert select_questions(mixed())["label"] == [2, 3, 4]


def test_an_answer_before_the_last_turn_belongs_to_the_prompt():
    chat = [{"role": role, "content": role[0]} for role in ("user", "assistant", "user", "assistant")]
    assert pairs(Dataset.from_list([{"messages": chat}])) == [("u\na\nu", " a")]


def test_a_conversation_without_answer_is_a_document():
    assert pairs(Dataset.from_list([{"messages": [{"role": "user", "content": "Hm."}]}])) == [("", "Hm.")]


@given(st.text(), st.text(min_size=1))
def test_one_space_joins_only_where_none_is(prompt: str, completion: str):
    [(left, right)] = pairs(Dataset.from_dict({"prompt": [prompt], "completion": [completion]}))
    assert left == prompt
    if not prompt or prompt[-1].isspace() or completion[0].isspace():
        assert right == completion
    else:
        assert right == " " + completion


def test_a_row_without_content_is_named():
    with pytest.raises(InputError, match="row 1 of the table has neither"):
        pairs(Dataset.from_dict({"text": ["a", None]}))


def test_a_table_without_content_columns_is_named():
    with pytest.raises(InputError, match="columns label; wanted 'text'"):
        pairs(Dataset.from_dict({"label": [1]}))


def test_the_hash_sees_content_and_order_only():
    plain = Dataset.from_dict({"text": ["one", "two"]})
    same = Dataset.from_list([{"label": 1, "text": "one", "prompt": None, "completion": None}, {"text": "two"}])
    assert sha256(plain) == sha256(same)
    assert sha256(plain) != sha256(plain.select([1, 0]))
    assert sha256(plain) != sha256(Dataset.from_dict({"text": ["onetwo"]}))
    assert sha256(plain.select([1, 0]).select([1, 0])) == sha256(plain)


def test_rows_match_up_to_white_space_and_unicode_form():
    first, second, third = content_hashes(
        Dataset.from_dict(
            {"text": ["caf\u00e9  au\nlait ", unicodedata.normalize("NFD", "caf\u00e9 au lait"), "Caf\u00e9 au lait"]}
        )
    )
    assert first == second != third


def test_a_question_is_not_its_own_text():
    question = Dataset.from_dict({"prompt": ["a"], "completion": ["b"]})
    assert content_hashes(question) != content_hashes(Dataset.from_dict({"text": ["a b"]}))


def test_concat_unites_columns():
    joined = concat(Dataset.from_dict({"text": ["a"]}), None, Dataset.from_dict({"prompt": ["b"], "completion": ["c"]}))
    assert pairs(joined) == [("", "a"), ("b", " c")]
    assert set(joined.column_names) == {"text", "prompt", "completion"}


def test_concat_makes_strings_of_columns_that_disagree():
    left = Dataset.from_dict({"label": [1, None], "text": ["a", "b"]})
    right = Dataset.from_dict({"text": ["c"], "label": ["x"]})
    tags = Dataset.from_dict({"text": ["d"], "label": [["y", "z"]]})
    joined = concat(left, right, tags)
    assert joined["label"] == ["1", None, "x", '["y", "z"]']
    assert joined["text"] == ["a", "b", "c", "d"]


def test_concat_of_nothing_is_refused():
    with pytest.raises(InputError, match="no table"):
        concat(None)


def test_concat_takes_a_column_of_nothing_for_any_type():
    empty = Dataset.from_dict(
        {"text": ["a"], "options": [None]}, features=Features({"text": Value("string"), "options": Value("null")})
    )
    full = Dataset.from_dict({"text": ["b"], "options": [["x"]]})
    joined = concat(empty, full)
    assert joined["options"] == [None, ["x"]]
    assert joined.features["options"] == List(Value("string"))


def test_stringify_keeps_the_order_of_columns():
    table = stringify(Dataset.from_dict({"a": [1], "b": [2.5], "text": ["t"]}), {"b"})
    assert table.column_names == ["a", "b", "text"]
    assert table["b"] == ["2.5"]
