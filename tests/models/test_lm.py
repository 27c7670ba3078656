from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest
import torch
from datasets import Dataset

from palimpsest.core.errors import InputError
from palimpsest.models.lm import LM


@pytest.mark.parametrize("name", ["llama-tiny", "gpt2-tiny", "qwen-tiny"])
def test_build_is_deterministic_and_leaves_the_random_state(texts: list[str], name: str) -> None:
    torch.manual_seed(5)
    state = torch.get_rng_state()
    first = LM.build(texts, name, vocab_size=300, max_length=64, seed=1)
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(6)
    assert LM.build(texts, name, vocab_size=300, max_length=64, seed=1).sha256 == first.sha256
    assert LM.build(texts, name, vocab_size=300, max_length=64, seed=2).sha256 != first.sha256
    assert first.model.dtype == torch.float32
    assert first.model.config._attn_implementation == "sdpa"
    assert first.max_length == 64
    assert first.model.config.vocab_size == len(first.tokenizer) == 300
    assert not first.model.training
    assert first.source == f"built:{name}"


def test_an_untrained_model_knows_nothing(texts: list[str]) -> None:
    lm = LM.build(texts, vocab_size=300)
    assert lm.nll(texts).mean() == pytest.approx(np.log(300), abs=0.2)


def test_build_from_a_table(texts: list[str]) -> None:
    half = len(texts) // 2
    nothing = [None] * half
    table = Dataset.from_dict(
        {
            "text": texts[:half] + nothing,
            "prompt": nothing + [text[:9] for text in texts[half:]],
            "completion": nothing + [text[9:] for text in texts[half:]],
        }
    )
    lm = LM.build(table, vocab_size=300)
    assert lm.nll(table).shape == (len(texts),)


def test_build_bad_input(texts: list[str]) -> None:
    with pytest.raises(InputError, match="did you mean gpt2-tiny"):
        LM.build(texts, "gpt-tiny")
    with pytest.raises(InputError, match="no text"):
        LM.build([])
    with pytest.raises(InputError, match="vocab_size must be at least"):
        LM.build(texts, vocab_size=10)


def test_copy_is_independent(lm: LM) -> None:
    before = lm.sha256
    parameter = next(lm.model.parameters())
    parameter.grad = torch.ones_like(parameter)
    copied = lm.copy()
    parameter.grad = None
    assert all(weight.grad is None for weight in copied.model.parameters())
    assert copied.sha256 == before
    with torch.no_grad():
        for weight in copied.model.parameters():
            weight.add_(1)
    assert lm.sha256 == before
    assert copied.sha256 != before
    assert copied.tokenizer is lm.tokenizer
    tied = lm.model.get_input_embeddings().weight is lm.model.get_output_embeddings().weight
    assert tied == (copied.model.get_input_embeddings().weight is copied.model.get_output_embeddings().weight)


def test_is_frozen_and_prints_short(llama: LM) -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        llama.source = "elsewhere"  # type: ignore[misc]
    assert repr(llama) == "LM(source='built:llama-tiny', guard=None)"
    assert llama.num_parameters == sum(weight.numel() for weight in llama.model.parameters())


def test_training_is_seen(new_lm: Any, texts: list[str]) -> None:
    """A few steps of plain gradient descent on `encode`'s labels lower `nll`, and the hash follows."""
    from palimpsest.core import losses

    lm = LM.build(texts, vocab_size=300)
    before, start = lm.sha256, lm.nll(texts[:8]).mean()
    batch = lm.encode(texts[:8]).batch(range(8))
    optimiser = torch.optim.AdamW(lm.model.parameters(), lr=1e-2)
    for _ in range(5):
        optimiser.zero_grad()
        losses.nll(lm.model, batch).backward()
        optimiser.step()
    assert lm.nll(texts[:8]).mean() < start - 0.5
    assert lm.sha256 != before


def test_equal_weights_that_answer_otherwise_are_another_model(texts: list[str]) -> None:
    lm = LM.build(texts, "llama-tiny", vocab_size=300, max_length=64, seed=1)
    longer = lm.copy()
    longer.model.config.max_position_embeddings = 128
    assert longer.weights_sha256 == lm.weights_sha256
    assert longer.sha256 != lm.sha256
    renamed = lm.copy()
    renamed.model.config._name_or_path = "elsewhere"
    assert renamed.sha256 == lm.sha256
