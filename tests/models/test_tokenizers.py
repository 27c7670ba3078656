from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer

from palimpsest.core.errors import InputError
from palimpsest.models.tokenizers import SMALLEST, train_bpe

TEXTS = ["the cat sat on the mat", "the dog sat on the log", "café déjà vu 日本"] * 5
TOKENIZER = train_bpe(TEXTS, vocab_size=280)


def test_same_texts_same_tokenizer() -> None:
    again = train_bpe(TEXTS, vocab_size=280)
    assert again.backend_tokenizer.to_str() == TOKENIZER.backend_tokenizer.to_str()
    assert train_bpe(TEXTS[::-1], vocab_size=280).get_vocab() == TOKENIZER.get_vocab()


def test_merges_what_is_frequent_up_to_the_wanted_size() -> None:
    assert len(TOKENIZER) == 280
    assert len(train_bpe(TEXTS, vocab_size=SMALLEST)) == SMALLEST
    assert len(TOKENIZER.tokenize("the sat")) < len("the sat") / 2
    assert len(train_bpe(["ab"], vocab_size=5000)) == SMALLEST + 1  # there is one pair to merge


@settings(max_examples=50, deadline=None)
@given(st.text(alphabet=st.characters(blacklist_categories=["Cs"])).filter(lambda text: "<" not in text))
def test_writes_any_text(text: str) -> None:
    ids = TOKENIZER(text, add_special_tokens=False)["input_ids"]
    assert TOKENIZER.unk_token_id not in ids
    assert TOKENIZER.decode(ids) == text


def test_specials_and_reload(tmp_path) -> None:
    TOKENIZER.save_pretrained(tmp_path)
    again = AutoTokenizer.from_pretrained(tmp_path)
    assert (again.pad_token_id, again.bos_token_id, again.eos_token_id, again.unk_token_id) == (0, 1, 2, 3)
    assert again("the cat")["input_ids"] == TOKENIZER("the cat")["input_ids"]
    assert again("the cat")["input_ids"][0] == again.bos_token_id
    assert again.padding_side == "left"
    assert again.model_max_length == 256


def test_bad_input() -> None:
    with pytest.raises(InputError, match="at least 260"):
        train_bpe(TEXTS, vocab_size=259)
    with pytest.raises(InputError, match="no text"):
        train_bpe(["", ""])
