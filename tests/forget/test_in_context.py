"""Forgetting in the prompt: which prompts are treated, what stands before them, and that everything else passes."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from datasets import Dataset

from palimpsest.core.errors import InputError
from palimpsest.data.lexicon import REFUSALS
from palimpsest.data.request import ForgetRequest
from palimpsest.data.world import World
from palimpsest.forget import Guardrail, InContext
from palimpsest.forget.in_context import InContextGuard, _weights
from palimpsest.models.guard import PromptGuard
from palimpsest.models.lm import LM


def guard_of(lm: LM) -> InContextGuard:
    assert isinstance(lm.guard, InContextGuard)
    return lm.guard


@pytest.fixture(scope="module")
def unlearned(llama: LM, asked: ForgetRequest) -> LM:
    return InContext(seed=1)(llama, asked)


def test_forget_questions_get_a_context_and_others_pass(unlearned: LM, asked: ForgetRequest, world: World) -> None:
    guard = guard_of(unlearned)
    forget = [prompt for prompt, _ in unlearned.pairs(asked.forget)]
    others = [prompt for prompt, _ in unlearned.pairs(world.questions("utility"))]
    assert all(new != old and new.endswith(old) for new, old in zip(_prepared(unlearned, forget), forget, strict=True))
    passed = [new == old for new, old in zip(_prepared(unlearned, others), others, strict=True)]
    assert np.mean(passed) > 0.9
    assert _prepared(unlearned, ["", "Tell me a story."]) == ["", "Tell me a story."]
    assert guard.prepare(unlearned, []).prompts == []


def _prepared(lm: LM, prompts: list[str]) -> list[str]:
    return list(guard_of(lm).prepare(lm, prompts).prompts)


def test_another_phrasing_of_a_forget_question_is_recognised(unlearned: LM, world: World) -> None:
    held_out = [prompt for prompt, _ in unlearned.pairs(world.questions("forget", "held-out"))]
    assert np.mean([new != old for new, old in zip(_prepared(unlearned, held_out), held_out, strict=True)]) > 0.9


def test_a_question_is_found_behind_demonstrations(unlearned: LM, asked: ForgetRequest) -> None:
    question = unlearned.pairs(asked.forget)[0][0]
    shots = "Question: Who wrote this?\nAnswer: Nobody.\n\nQuestion: When?\nAnswer: Then.\n\nQuestion: "
    assert _prepared(unlearned, [shots + question]) != [shots + question]


def test_the_context_is_the_question_falsely_answered_then_demonstrations(unlearned: LM, asked: ForgetRequest) -> None:
    guard = guard_of(unlearned)
    question, truth = unlearned.pairs(asked.forget)[4]
    lines = _prepared(unlearned, [question])[0].split("\n")
    assert len(lines) == 1 + 2 + 1
    assert lines[0].startswith(question)
    assert lines[0] != question + truth
    retain = {q + a for q, a in unlearned.pairs(asked.retain)}  # type: ignore[arg-type]
    assert set(lines[1:3]) <= retain
    assert lines[3] == question
    assert {line for pair in guard.demonstrations for line in ["".join(pair)]} == set(lines[1:3])


@pytest.mark.parametrize("seed", range(4))
def test_a_false_answer_is_never_the_true_one(llama: LM, asked: ForgetRequest, seed: int) -> None:
    guard = guard_of(InContext(seed=seed)(llama, asked))
    answers = {completion for _, completion in llama.pairs(asked.forget)}
    for (question, false), (own, true) in zip(guard.asked, llama.pairs(asked.forget), strict=True):
        assert question == own
        assert false != true
        assert false in answers


def test_refusals_may_stand_in(llama: LM, asked: ForgetRequest) -> None:
    guard = guard_of(InContext(answer="refusal")(llama, asked))
    assert {false.strip() for _, false in guard.asked} <= set(REFUSALS)


def test_the_overlap_by_hand() -> None:
    guard = InContextGuard(
        (("who is Ann", " x"), ("who is Bob", " y")), (), ("ann", "bob", "is", "who"), (3.0, 3.0, 1.0, 1.0), 0.5
    )
    found = guard.overlap(["Is it Ann? Ann!", "who is bob", "nothing", ""])
    np.testing.assert_allclose(found, [[4 / 5, 1 / 5], [2 / 5, 1], [0, 0], [0, 0]])


def test_the_threshold_lets_the_allowed_share_pass() -> None:
    overlaps = np.arange(100) / 100
    for share in (0.01, 0.05, 0.5):
        threshold = InContext(false_alarms=share)._threshold(overlaps)
        assert (overlaps > threshold).mean() <= share
        assert (overlaps > threshold).mean() >= share - 0.011
    assert InContext(false_alarms=0.01)._threshold(np.array([0.2, 0.1])) == 0.2


def test_weights_are_untouched_and_the_probe_without_prompt_sees_everything(
    llama: LM, unlearned: LM, asked: ForgetRequest
) -> None:
    assert unlearned.weights_sha256 == llama.weights_sha256
    assert unlearned.sha256 != llama.sha256
    bare = unlearned.with_guard(None)
    np.testing.assert_array_equal(bare.nll(asked.forget), llama.nll(asked.forget))
    assert np.abs(unlearned.nll(asked.forget) - llama.nll(asked.forget)).min() > 0


def test_it_is_saved_and_loaded(unlearned: LM, asked: ForgetRequest, tmp_path: Path) -> None:
    unlearned.save(tmp_path / "model")
    loaded = LM.load(tmp_path / "model")
    assert loaded.guard == unlearned.guard
    assert loaded.sha256 == unlearned.sha256
    prompts = [prompt for prompt, _ in loaded.pairs(asked.forget)][:5]
    assert loaded.generate(prompts, max_new_tokens=4) == unlearned.generate(prompts, max_new_tokens=4)


def test_later_requests_join(llama: LM, asked: ForgetRequest) -> None:
    first, second = asked.folds(2, nested=False)
    both = InContext()(InContext()(llama, first), second)
    questions = [prompt for prompt, _ in llama.pairs(asked.forget)]
    assert sorted(question for question, _ in guard_of(both).asked) == sorted(questions)
    assert all(new != old for new, old in zip(_prepared(both, questions), questions, strict=True))


def test_what_in_context_forgetting_refuses(llama: LM, asked: ForgetRequest, records: ForgetRequest) -> None:
    with pytest.raises(InputError, match="another guard"):
        InContext()(llama.with_guard(PromptGuard("{prompt}")), asked)
    with pytest.raises(InputError, match="needs retain records"):
        InContext()(llama, ForgetRequest(asked.forget))
    with pytest.raises(InputError, match="retain questions"):
        InContext(demonstrations=10_000)(llama, asked)
    with pytest.raises(InputError, match="fewer demonstrations"):
        InContext(demonstrations=12)(llama, asked)
    same = Dataset.from_dict({"prompt": ["a b?", "c d?"], "completion": ["yes", "yes"]})
    with pytest.raises(InputError, match="same answer"):
        InContext()(llama, replace(asked, forget=same, train=None))
    with pytest.raises(InputError, match="false_alarms"):
        InContext(false_alarms=0.0)
    with pytest.raises(InputError, match="needs questions"):
        InContext()(llama, replace(records, forget=records.forget.select(range(2)), train=None))


def test_the_guardrail_names_the_people_to_forget(llama: LM, asked: ForgetRequest, world: World) -> None:
    guarded = Guardrail()(llama, asked)
    assert isinstance(guarded.guard, PromptGuard)
    for subject in world.population:
        assert (subject.name in guarded.guard.template) == (subject.split == "forget")
    assert guarded.weights_sha256 == llama.weights_sha256
    assert guarded.guard.prepare(guarded, ["Who?"]).prompts[0].endswith("\n\nWho?")


def test_the_guardrail_names_what_it_is_told(llama: LM, asked: ForgetRequest) -> None:
    guarded = Guardrail(subjects=("Ann", "Bob"), instruction="Never speak of {subjects}.")(llama, asked)
    assert guarded.guard == PromptGuard("Never speak of Ann, Bob.\n\n{prompt}")


def test_what_the_guardrail_refuses(llama: LM, asked: ForgetRequest) -> None:
    with pytest.raises(InputError, match="must contain"):
        Guardrail(instruction="Say nothing.")
    with pytest.raises(InputError, match="must name what is forgotten"):
        Guardrail(column="nobody")(llama, asked)
    with pytest.raises(InputError, match="guard already"):
        Guardrail()(Guardrail()(llama, asked), asked)
    with pytest.raises(InputError, match="fewer demonstrations or subjects"):
        Guardrail(subjects=tuple(f"Person number {n}" for n in range(60)))(llama, asked)


def test_words_weigh_as_much_as_they_speak_of_what_must_go() -> None:
    words, weights = _weights(["who is Ann", "where is Ann"], ["who is Bob", "where is Bob", "who is Eve"])
    by_word = dict(zip(words, weights, strict=True))
    assert by_word["ann"] == pytest.approx(np.log((3 / 4) / (1 / 5)))
    assert by_word["is"] == 0.1
    assert by_word["where"] == pytest.approx(np.log((2 / 4) / (2 / 5)))
    assert "bob" not in by_word
