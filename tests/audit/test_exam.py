from __future__ import annotations

import copy
from dataclasses import replace

import numpy as np
import pytest
import torch
from datasets import Dataset

from palimpsest.audit.exam import KS, Sitting, Sizes, bare, exam, text_logprobs
from palimpsest.audit.membership import min_k
from palimpsest.core.errors import InputError
from palimpsest.data.records import documents, questions
from palimpsest.data.request import ForgetRequest
from palimpsest.models.guard import PromptGuard
from palimpsest.models.lm import LM

BARE = Sizes(demonstrations=0)


def nobody_is_asked(*args, **kwargs):
    raise AssertionError("the model was asked again")


def test_a_bare_question_is_asked_as_the_model_was_trained_on_it(household):
    asked = exam(BARE, household.before, household.request)
    assert asked.questions["forget"].prompts == tuple(prompt for prompt, _ in questions(household.request.forget))
    assert asked.questions["forget"].truths == tuple(
        answer.strip() for _, answer in questions(household.request.forget)
    )
    assert asked.style.words == "without demonstrations"


def test_demonstrations_have_the_papers_form_and_come_from_the_retain_set(household):
    asked = exam(Sizes(demonstrations=2), household.before, household.request)
    pool = {prompt: answer.strip() for prompt, answer in questions(household.request.retain)}
    (one, first), (two, second) = asked.style.demonstrations
    assert pool[one] == first
    assert pool[two] == second
    name = asked.questions["forget"].shown[0]
    expected = f"Question: {one}\nAnswer: {first}\n\nQuestion: {two}\nAnswer: {second}\n\nQuestion: {name}\nAnswer: "
    assert asked.questions["forget"].prompts[0] == expected
    assert asked.style.words == "after 2 demonstrations from the retain set"


def test_retain_questions_about_demonstrated_persons_are_not_asked(household):
    asked = exam(Sizes(demonstrations=2), household.before, household.request)
    shown = {question for question, _ in asked.style.demonstrations}
    assert not shown & set(asked.questions["retain"].shown)
    assert len(asked.questions["retain"]) == len(questions(household.request.retain)) - 2


def test_as_many_demonstrations_as_fit(household):
    asked = exam(Sizes(demonstrations=10), household.before, household.request)
    count = len(asked.style.demonstrations)
    assert 0 < count < 7  # half of the 14 persons would be seven, which do not fit
    tokenizer = household.before.tokenizer
    longest = max(len(tokenizer(prompt)["input_ids"]) for one in asked.questions.values() for prompt in one.prompts)
    assert longest <= household.before.max_length - BARE.answer_tokens
    more = [*asked.style.demonstrations, asked.style.demonstrations[0]]
    prompts = replace(asked.style, demonstrations=tuple(more)).prompts(
        household.before, household.request.forget.select([8])
    )
    assert len(tokenizer(prompts[0])["input_ids"]) > household.before.max_length - BARE.answer_tokens - 4


def test_the_default_style_is_the_one_in_which_the_model_before_answers_better(household, scripted):
    truth = {prompt: answer for name in ("retain",) for prompt, answer in questions(getattr(household.request, name))}
    taught = scripted(
        say=lambda prompt: (
            truth.get(bare("Question:" + prompt.split("Question:")[-1]), "") if "\n\n" in prompt else "no"
        )
    )
    plain = scripted(say=lambda prompt: truth.get(prompt, "no"))
    assert exam(Sizes(), plain, household.request).style.words == "without demonstrations"
    style = exam(Sizes(), taught, household.request).style
    assert style.words.startswith("after ")
    assert style.why.startswith("the model before answers 100% of the retain set so, 0% without")


def test_no_demonstrations_without_retain_questions(household):
    asked = exam(Sizes(), household.before, replace(household.request, retain=None))
    assert asked.style.demonstrations == ()
    assert "too few" in asked.style.why


def test_no_demonstrations_where_none_fits(household):
    lm = LM.build(["tiny"], "llama-tiny", vocab_size=270, max_length=40)
    asked = exam(Sizes(), lm, household.request)
    assert "none fits" in asked.style.why


@pytest.mark.parametrize(
    ("prompt", "question"),
    [
        ("Question: Who?\nAnswer:", "Who?"),
        ("Q: Who? A: ", "Who?"),
        (" Who is Q? ", "Who is Q?"),
        ("Question: Who?", "Question: Who?"),
    ],
)
def test_a_frame_around_a_question_is_not_doubled(prompt: str, question: str):
    assert bare(prompt) == question


def test_at_most_samples_rows_are_asked_and_the_seed_says_which(household):
    few = [
        exam(Sizes(samples=5, demonstrations=0, seed=seed), household.before, household.request) for seed in (0, 0, 1)
    ]
    assert [len(one.questions["forget"]) for one in few] == [5, 5, 5]
    assert [len(one.scored["utility"]) for one in few] == [5, 5, 5]
    assert few[0].questions == few[1].questions
    assert few[0].questions["forget"] != few[2].questions["forget"]


def test_sets_that_are_missing_are_missing_in_the_exam(household):
    texts = Dataset.from_dict({"text": documents(household.request.forget)})
    asked = exam(Sizes(), household.before, ForgetRequest(forget=texts))
    assert set(asked.recitals) == {"forget"}
    assert asked.questions == {}
    assert asked.members == {}
    assert set(asked.scored) == {"forget"}


def test_the_attack_compares_documents_or_else_answers(household):
    whole = exam(BARE, household.before, household.request)
    assert documents(whole.members["forget"]) == documents(household.request.forget)
    assert documents(whole.members["holdout"]) == documents(household.request.holdout)
    asked = household.request.holdout.filter(lambda row: row["prompt"] is not None)
    answers = exam(BARE, household.before, replace(household.request, holdout=asked))
    assert documents(answers.members["forget"]) == []
    assert len(answers.members["forget"]) == len(answers.members["holdout"]) == 8


def test_the_attack_scores_each_text_as_a_plain_forward_pass_would(household):
    """One text at a time, as MUSE's release does it: the tokens after the first, no padding, no <eos>."""
    lm = household.before
    found = Sitting(exam(BARE, lm, household.request), lm).attack("forget")
    assert set(found) == {*(f"min-{k}%" for k in KS), "loss", "zlib"}
    for row, text in enumerate(documents(household.request.forget)):
        ids = torch.tensor([lm.tokenizer(text)["input_ids"]])
        with torch.no_grad():
            logprobs = lm.model(input_ids=ids).logits.double().log_softmax(-1)[0, :-1]
        own = logprobs.gather(1, ids[0, 1:, None])[:, 0].numpy()
        lowest = np.sort(own)[: max(1, int(0.4 * len(own)))]
        assert found["min-40%"][row] == pytest.approx(-lowest.mean(), rel=1e-4)
        assert found["loss"][row] == pytest.approx(-own.mean(), rel=1e-4)


def test_lowercase_is_scored_only_when_it_is_the_statistic(household):
    lm = household.before
    sizes = Sizes(demonstrations=0, statistic="lowercase")
    found = Sitting(exam(sizes, lm, household.request), lm).attack("forget")[sizes.statistic_name]
    texts = documents(household.request.forget)
    expected = [
        -one.mean() / -other.mean()
        for one, other in zip(
            text_logprobs(lm, texts), text_logprobs(lm, [text.lower() for text in texts]), strict=True
        )
    ]
    assert found == pytest.approx(expected, rel=1e-6)


def test_a_model_that_sat_an_exam_is_not_asked_again(household, monkeypatch, tmp_path):
    monkeypatch.setenv("PALIMPSEST_CACHE", str(tmp_path))
    asked = exam(BARE, household.before, household.request)
    first = Sitting(asked, household.before)
    said = first.answers("forget"), first.recital("forget"), first.surprise("forget").tolist(), first.attack("holdout")
    for call in ("generate", "generate_ids", "token_logprobs"):
        monkeypatch.setattr(LM, call, nobody_is_asked)
    again = Sitting(exam(BARE, household.before, household.request), household.before.copy())
    assert again.answers("forget") == said[0]
    assert again.recital("forget") == said[1]
    assert again.surprise("forget").tolist() == said[2]
    assert all((again.attack("holdout")[name] == said[3][name]).all() for name in said[3])
    with pytest.raises(AssertionError, match="asked again"):
        Sitting(asked, household.reference).answers("forget")


def test_other_weights_other_guards_and_other_questions_are_asked_anew(household, monkeypatch, tmp_path):
    monkeypatch.setenv("PALIMPSEST_CACHE", str(tmp_path))
    before, asked = household.before, exam(BARE, household.before, household.request)
    few = exam(Sizes(samples=3, demonstrations=0), before, household.request)
    guarded = [before.with_guard(PromptGuard(f"{word} {{prompt}}")) for word in ("Now", "Then")]
    calls: list[str] = []
    plain = LM.generate

    def counted(self, *args, **kwargs):
        calls.append(self.source)
        return plain(self, *args, **kwargs)

    monkeypatch.setattr(LM, "generate", counted)
    sittings = [Sitting(asked, lm) for lm in (before, *guarded, household.reference)] + [Sitting(few, before)]
    for count, sitting in enumerate(sittings, 1):
        assert sitting.answers("forget") == sitting.answers("forget")
        assert len(calls) == count


def test_a_model_in_training_leaves_nothing_in_the_cache(household, monkeypatch, tmp_path):
    monkeypatch.setenv("PALIMPSEST_CACHE", str(tmp_path))
    asked = exam(BARE, household.before, household.request)
    assert Sitting(asked, household.before, keep=False).answers("forget")
    assert list(tmp_path.iterdir()) == []


def test_about_asks_the_same_of_another_forget_set(household):
    whole = exam(BARE, household.before, household.request)
    fold = household.request.folds(4, nested=False)[0]
    part = whole.about(household.before, fold)
    assert len(part.questions["forget"]) == 2
    assert len(part.recitals["forget"]) == 2
    assert part.questions["utility"] == whole.questions["utility"]


@pytest.mark.parametrize(
    ("wrong", "line"),
    [
        ({"samples": 0}, "samples must be at least 1"),
        ({"continuation_tokens": 3}, "continuation_tokens must be at least 4"),
        ({"demonstrations": -1}, "demonstrations must be 0 or more"),
        ({"statistic": "perplexity"}, "statistic must be"),
        ({"k": 0}, "k is a percentage"),
    ],
)
def test_sizes_that_make_no_sense_are_refused(wrong, line):
    with pytest.raises(InputError, match=line):
        Sizes(**wrong)


def test_min_k_of_the_exam_is_that_of_the_chosen_k(household):
    sizes = Sizes(demonstrations=0, k=25)
    asked = exam(sizes, household.before, household.request)
    found = Sitting(asked, household.before).attack("holdout")[sizes.statistic_name]
    assert found == pytest.approx(min_k(text_logprobs(household.before, asked.members["holdout"]), 25))


def test_conversations_are_asked_by_the_models_own_chat_template(household):
    tokenizer = copy.deepcopy(household.before.tokenizer)
    tokenizer.chat_template = (
        "{% for m in messages %}[{{ m['role'] }}] {{ m['content'] }}\n{% endfor %}"
        "{% if add_generation_prompt %}[assistant] {% endif %}"
    )
    talk = [{"role": "user", "content": "Which stone?"}, {"role": "assistant", "content": "ruby"}]
    request = ForgetRequest(forget=Dataset.from_dict({"messages": [talk]}))
    asked = exam(Sizes(), replace(household.before, tokenizer=tokenizer), request).questions["forget"]
    assert asked.prompts == ("[user] Which stone?\n[assistant] ",)
    assert asked.truths == ("ruby",)
    plain = exam(Sizes(), household.before, request).questions["forget"]
    assert plain.prompts == ("Which stone?",)
