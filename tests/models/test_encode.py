from __future__ import annotations

import copy

import numpy as np
import pytest
from datasets import Dataset

from palimpsest.core.errors import InputError
from palimpsest.models.lm import LM

TEMPLATE = (
    "{% for m in messages %}[{{ m['role'] }}]{{ m['content'] }}{% if m['role'] == 'assistant' %}<eos>{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}[assistant]{% endif %}"
)


def text_of(lm: LM, ids: np.ndarray) -> str:
    return lm.tokenizer.decode(ids)


def test_document_is_scored_whole(llama: LM, texts: list[str]) -> None:
    encoded = llama.encode([texts[0]])
    assert text_of(llama, encoded.ids[0]) == f"<bos>{texts[0]}<eos>"
    assert encoded.starts == (1,)


@pytest.mark.parametrize(
    ("prompt", "completion"), [("lives in", " town 3"), ("café", "é日本"), ("日", "本"), ("a\n", "b")]
)
def test_the_scored_part_is_the_completion(llama: LM, prompt: str, completion: str) -> None:
    encoded = llama.encode([(prompt, completion)])
    assert text_of(llama, encoded.ids[0]) == f"<bos>{prompt}{completion}<eos>"
    assert text_of(llama, encoded.ids[0][encoded.starts[0] :]) == f"{completion}<eos>"


def test_a_token_across_the_boundary_belongs_to_the_completion(llama: LM) -> None:
    whole = llama.tokenizer("person lives in", add_special_tokens=False)["input_ids"]
    tokens = [llama.tokenizer.decode([token]) for token in whole]
    assert " lives" in tokens, "the test needs a merged token to cut"
    encoded = llama.encode([("person li", "ves in")])
    assert encoded.ids[0].tolist() == [llama.tokenizer.bos_token_id, *whole, llama.tokenizer.eos_token_id]
    assert text_of(llama, encoded.ids[0][encoded.starts[0] :]) == " lives in<eos>"


def test_long_documents_lose_their_end(llama: LM, texts: list[str]) -> None:
    whole, cut = llama.encode([texts[0]]).ids[0], llama.encode([texts[0]], max_length=10)
    assert cut.ids[0].tolist() == whole[:10].tolist()
    assert cut.starts == (1,)
    assert len(llama.encode(["x" * 500]).ids[0]) == llama.max_length


def test_long_questions_keep_the_start_of_the_answer(llama: LM) -> None:
    full = llama.encode([("x" * 30, "y" * 30)])
    start = full.starts[0]
    prompt, answer = full.ids[0][1:start], full.ids[0][start:]
    row = llama.encode([("x" * 30, "y" * 30)], max_length=16)
    assert row.ids[0].tolist() == [llama.tokenizer.bos_token_id, *prompt[-7:], *answer[:8]]
    assert row.starts == (8,)
    short_prompt = llama.encode([("x", "y" * 30)], max_length=16)  # what the prompt leaves, the answer gets
    assert short_prompt.ids[0].tolist() == [llama.tokenizer.bos_token_id, prompt[0], *answer[:14]]
    short_answer = llama.encode([("x" * 30, "y")], max_length=16)
    assert short_answer.ids[0].tolist() == [llama.tokenizer.bos_token_id, *prompt[-13:], answer[0], answer[-1]]


def test_tables_mix_documents_and_questions(llama: LM) -> None:
    table = Dataset.from_dict({"text": ["a b", None], "prompt": [None, "who?"], "completion": [None, " me"]})
    encoded = llama.encode(table)
    assert [text_of(llama, ids) for ids in encoded.ids] == ["<bos>a b<eos>", "<bos>who? me<eos>"]
    assert llama.pairs(table) == [("", "a b"), ("who?", " me")]


def test_conversations_go_through_the_chat_template(llama: LM) -> None:
    talk = [{"role": "user", "content": "who?"}, {"role": "assistant", "content": "me"}]
    table = Dataset.from_dict({"messages": [talk, None], "text": [None, "a document"]})
    plain = llama.encode(table)
    assert text_of(llama, plain.ids[0]) == "<bos>who? me<eos>"
    tokenizer = copy.deepcopy(llama.tokenizer)
    tokenizer.chat_template = TEMPLATE
    lm = LM(llama.model, tokenizer)
    encoded = lm.encode(table)
    assert text_of(lm, encoded.ids[0]) == "[user]who?[assistant]me<eos>"  # the template writes the special tokens
    assert text_of(lm, encoded.ids[0][encoded.starts[0] :]) == "me<eos>"
    assert text_of(lm, encoded.ids[1]) == "<bos>a document<eos>"


def test_special_tokens_are_not_doubled(llama: LM) -> None:
    assert llama.encode(["<bos>a<eos>"]).ids[0].tolist() == llama.encode(["a"]).ids[0].tolist()


def test_rows_without_a_scored_token(llama: LM) -> None:
    tokenizer = copy.deepcopy(llama.tokenizer)
    tokenizer.bos_token = None
    lm = LM(llama.model, tokenizer)
    encoded = lm.encode(["", "some text"])
    assert encoded.lengths.tolist()[0] == 1
    values = lm.nll(["", "some text"])
    assert np.isnan(values[0])
    assert values[1] > 0
    with pytest.raises(InputError, match=r"row 0 .* has no token to score"):
        lm.encode(["", ""])


def test_no_rows(llama: LM) -> None:
    assert len(llama.encode([])) == 0
    assert llama.nll([]).shape == (0,)
    assert llama.token_logprobs([]) == []


def test_bad_rows(llama: LM) -> None:
    with pytest.raises(InputError, match="row 1 is int 3"):
        llama.encode(["a", 3])  # type: ignore[list-item]
    with pytest.raises(InputError, match="put it into a list"):
        llama.encode("text")
    with pytest.raises(InputError, match="max_length must be at least 2"):
        llama.encode(["a"], max_length=1)
