from __future__ import annotations

import json

import numpy as np
import pytest

from palimpsest.audit import choices
from palimpsest.audit.choices import Item, answered, distinct, letter_of, read_items
from palimpsest.core.errors import InputError
from palimpsest.data.world import World


def lines(path, *rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


@pytest.mark.parametrize(
    ("row", "right"),
    [
        ({"question": "q?", "choices": ["x", "y", "z"], "answer": 1}, "y"),
        ({"question": "q?", "choices": ["x", "y", "z"], "answer": "C"}, "z"),
        ({"question": "q?", "choices": ["x", "y", "z"], "answer": "x"}, "x"),
        ({"question": "q?", "choices": ["1", "0"], "answer": "0"}, "0"),  # an option's text goes before its place
        ({"prompt": "q?", "options": ["x", "y"], "completion": "y"}, "y"),
        ({"Question": "q?", "A": "x", "B": "y", "C": "z", "D": "w", "Answer": "D"}, "w"),
        ({"question": "q?", "choices": {"text": ["x", "y"], "label": ["A", "B"]}, "answer": "B"}, "y"),
        ({"question": "q?", "best_answer": "x", "incorrect": ["y", "z"], "category": "k"}, "x"),
    ],
)
def test_the_forms_that_benchmarks_come_in(tmp_path, row, right):
    (item,) = read_items(lines(tmp_path / "b.jsonl", row))
    assert item.question == "q?"
    assert item.options[item.right] == right


def test_mmlu_s_files_without_a_header(tmp_path):
    path = tmp_path / "anatomy_test.csv"
    path.write_text("What is 1?,1,2,3,4,A\nWhat is 2?,5,2,6,7,B\n", encoding="utf-8")
    items = read_items(path)
    assert [(item.question, item.options[item.right]) for item in items] == [("What is 1?", "1"), ("What is 2?", "2")]


def test_our_own_records_with_options():
    table = World(people=6, facts=0, seed=0).questions("retain")
    items = read_items(table)
    assert len(items) == len(table)
    assert [item.options[item.right] for item in items] == [text.strip() for text in table["completion"]]
    assert items[0].group == table["attribute"][0]


def test_real_sets_are_read_whole(dev_data):
    for name, rows in (("mmlu/test.jsonl.gz", 3897), ("truthfulqa/truthfulqa.jsonl.gz", 817)):
        items = read_items(dev_data / name)
        assert len(items) == rows
        assert all(item.group for item in items)
        left, copies = distinct(items)
        assert len(left) + len(copies) == rows
    assert (
        0.2 < np.mean([item.right == 0 for item in items if len(item.options) == 4]) < 0.3
    )  # best is not always first


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"question": "q?", "choices": ["x", "y"], "answer": 2}, r"b.jsonl:1: the answer is 2; wanted the place"),
        ({"question": "q?", "choices": ["x", "y"], "answer": -1}, "the answer is -1"),
        ({"question": "q?", "answer": "x"}, r"found the columns 'question', 'answer'; wanted 'choices'"),
        ({"question": "q?", "choices": ["x"], "answer": 0}, "at least two"),
        ({"choices": ["x", "y"], "answer": 0}, "wanted a 'question'"),
    ],
)
def test_a_row_that_is_no_item_is_named(tmp_path, row, message):
    with pytest.raises(InputError, match=message):
        read_items(lines(tmp_path / "b.jsonl", row))


def test_copies_go_and_contradictions_are_refused():
    one, other = Item("q", ("a", "b"), 0, number=1), Item("r", ("a", "b"), 0, number=2)
    copy = Item(" q ", ("b", "a"), 1, number=3)
    assert distinct([one, other, copy]) == ([one, other], [3])
    with pytest.raises(InputError, match="different right answers: row 1 and row 4"):
        distinct([one, Item("q", ("a", "b"), 1, number=4)])


def test_answers_by_likelihood_do_not_depend_on_company(scripted):
    likes = {" red": -1.0, " green": -2.0, " blue": -3.0}
    lm = scripted(score=lambda prompt, option: [likes[option]] if "colour" in prompt else [-1.0])
    items = [
        Item("colour 1", ("red", "green"), 0),
        Item("colour 2", ("blue", "green", "red"), 0),
        Item("thing", ("red", "green"), 1),  # equally likely: half
    ]
    questions = [item.question for item in items]
    assert answered(lm, items, questions, "likelihood").tolist() == [1.0, 0.0, 0.5]
    assert answered(lm, items[::-1], questions[::-1], "likelihood").tolist() == [0.5, 0.0, 1.0]
    with pytest.raises(InputError, match="each item needs one"):
        answered(lm, items, questions[:1], "likelihood")


def test_answers_by_letter_come_from_the_model_s_own_words(scripted):
    items = [Item("one", ("x", "y"), 1), Item("two", ("x", "y"), 1)]
    lm = scripted(say=lambda prompt: "B." if "one" in prompt else "no idea")
    assert answered(lm, items, ["one", "two"], "letter").tolist() == [1.0, 0.0]
    assert "A. x\nB. y\nAnswer:" in items[0].lettered("one")


@pytest.mark.parametrize(
    ("text", "place"),
    [(" B", 1), ("Answer: (C)", 2), ("A or B? I say B", 1), ("E", None), ("Because", None), ("", None)],
)
def test_the_letter_of_an_answer(text, place):
    assert letter_of(text, 4) == place


def test_a_task_of_the_harness_writes_its_own_prompts(tmp_path):
    pytest.importorskip("lm_eval")
    lines(
        tmp_path / "items.jsonl", *({"question": f"What is {n}?", "choices": ["x", "y"], "answer": 1} for n in (1, 2))
    )
    task = tmp_path / "two_things.yaml"
    task.write_text(
        f"""task: two_things
dataset_path: json
dataset_kwargs: {{data_files: {{test: "{tmp_path / "items.jsonl"}"}}}}
test_split: test
output_type: multiple_choice
doc_to_text: "Think. {{{{question}}}} So:"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: answer
""",
        encoding="utf-8",
    )
    items = read_items(f"lm-eval:{task}")
    assert [item.prompt("Say 2?") for item in items] == ["Think. Say 2? So:"] * 2
    assert [(item.question, item.options[item.right]) for item in items] == [("What is 1?", "y"), ("What is 2?", "y")]
    with pytest.raises(InputError, match="unknown lm-eval task"):
        read_items(f"lm-eval:{tmp_path / 'no_such.yaml'}")


def test_without_the_harness_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "lm_eval.tasks", None)
    with pytest.raises(InputError, match=r"palimpsest\[harness\]"):
        choices.read_items("lm-eval:arc_easy")
