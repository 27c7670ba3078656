from __future__ import annotations

import numpy as np
import pytest
import torch

from palimpsest.audit.memorisation import (
    decode,
    exact_memorisation,
    extraction_strength,
    greedy_hits,
    recitals,
    recite,
)
from palimpsest.core.errors import InputError
from palimpsest.data.records import documents
from palimpsest.models.guard import PromptGuard
from palimpsest.models.lm import LM

TEXT = " ".join(f"w{i}" for i in range(200))


@pytest.fixture(scope="module")
def small() -> LM:
    return LM.build([TEXT], "llama-tiny", vocab_size=300, max_length=2000)


def body(lm: LM, text: str) -> np.ndarray:
    return lm.encode([text]).ids[0][1:-1]  # without <bos> and <eos>


def test_a_long_text_is_cut_at_the_prompt_and_after_the_continuation(small: LM):
    found = recitals(small, [TEXT], prompt_tokens=30, continuation_tokens=12)[0]
    ids = body(small, TEXT)
    assert found.prompt[0] == small.tokenizer.bos_token_id
    assert found.prompt[1:].tolist() == ids[:30].tolist()
    assert found.truth.tolist() == ids[30:42].tolist()


def test_a_shorter_text_gives_all_but_its_continuation(small: LM):
    text = TEXT[:300]
    ids = body(small, text)
    found = recitals(small, [text], prompt_tokens=896, continuation_tokens=20)[0]
    assert found.prompt[1:].tolist() == ids[:-20].tolist()
    assert found.truth.tolist() == ids[-20:].tolist()


def test_a_short_text_gives_its_first_half(small: LM):
    text = TEXT[:60]
    ids = body(small, text)
    found = recitals(small, [text], prompt_tokens=896, continuation_tokens=128)[0]
    assert found.prompt[1:].tolist() == ids[: len(ids) // 2].tolist()
    assert found.truth.tolist() == ids[len(ids) // 2 :].tolist()


def test_texts_too_short_to_cut_are_left_out(small: LM):
    assert [found.row for found in recitals(small, ["w1", TEXT], 10, 10)] == [1]
    assert recitals(small, [], 10, 10) == []


def test_a_small_context_halves_what_fits():
    lm = LM.build([TEXT], "llama-tiny", vocab_size=300, max_length=64)
    found = recitals(lm, [TEXT], prompt_tokens=896, continuation_tokens=128)[0]
    assert len(found.prompt) + len(found.truth) == 64
    assert len(recite(lm, [found])[0]) <= len(found.truth)


def test_recite_is_plain_greedy_decoding_cut_to_the_truth(household):
    lm = household.before
    asked = recitals(lm, documents(household.request.forget), 896, 128)
    said = recite(lm, asked)
    for recital, ids in zip(asked, said, strict=True):
        prompt = torch.as_tensor(recital.prompt[None])
        plain = lm.model.generate(
            input_ids=prompt, attention_mask=torch.ones_like(prompt), do_sample=False, max_new_tokens=len(recital.truth)
        )
        text = lm.tokenizer.decode(plain[0, prompt.shape[1] :], skip_special_tokens=True)
        assert decode(lm, [ids]) == [text]
        assert len(ids) <= len(recital.truth)
    assert recite(lm, []) == []


def test_greedy_hits_are_those_of_a_plain_forward_pass(household):
    lm = household.before
    rows = [("Which stone has", " ruby"), ("", "Diary of Danab: and more"), ("Which", " stone")]
    for row, hits in zip(rows, greedy_hits(lm, rows), strict=True):
        encoded = lm.encode([row])
        ids = torch.as_tensor(encoded.ids[0])
        with torch.no_grad():
            best = lm.model(input_ids=ids[None]).logits[0].argmax(-1)
        start = encoded.starts[0]
        expected = best[start - 1 : len(ids) - 2] == ids[start:-1]  # up to the last own token: <eos> does not count
        assert hits.tolist() == expected.tolist()


def test_a_memorised_text_is_extracted_and_an_unknown_one_is_not(household):
    known = greedy_hits(household.before, documents(household.request.forget))
    unknown = greedy_hits(household.reference, documents(household.request.forget))
    assert exact_memorisation(known).mean() > exact_memorisation(unknown).mean() + 0.3
    assert extraction_strength(known).mean() > extraction_strength(unknown).mean() + 0.3


def test_extraction_strength_and_exact_memorisation_by_hand():
    rows = [np.array(row, dtype=bool) for row in ([1, 1, 1, 1], [1, 0, 1, 1], [1, 1, 1, 0], [0, 0, 0, 0], [])]
    assert extraction_strength(rows).tolist() == [1, 0.5, 0, 0, 0]
    assert exact_memorisation(rows).tolist() == [1, 0.75, 0.75, 0, 0]


def test_a_guarded_model_has_no_teacher_forced_hits(household):
    with pytest.raises(InputError, match="without its guard"):
        greedy_hits(household.before.with_guard(PromptGuard("Forget: {prompt}")), ["a text"])
