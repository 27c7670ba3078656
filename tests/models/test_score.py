from __future__ import annotations

import numpy as np
import pytest
import torch

from palimpsest.core.errors import InputError
from palimpsest.models.lm import LM
from palimpsest.models.score import by_tokens


def simple_logprobs(lm: LM, ids: np.ndarray, start: int) -> np.ndarray:
    """One row, no padding, log-softmax in float64."""
    with torch.no_grad():
        logits = lm.model(torch.from_numpy(ids)[None]).logits[0].double()
    logprobs = logits.log_softmax(-1)
    return np.array([float(logprobs[place - 1, ids[place]]) for place in range(max(start, 1), len(ids))])


@pytest.fixture(scope="module")
def rows(texts: list[str]) -> list[tuple[str, str]]:
    return [(text[: 7 * (i % 4)], text[7 * (i % 4) : 12 + 2 * i]) for i, text in enumerate(texts[:24])]


def test_equals_a_simple_float64_loop(lm: LM, rows: list[tuple[str, str]]) -> None:
    encoded = lm.encode(rows)
    found = lm.token_logprobs(rows)
    for row, ids, start in zip(found, encoded.ids, encoded.starts, strict=True):
        expected = simple_logprobs(lm, ids, start)
        assert row.dtype == np.float32
        assert np.allclose(row, expected, atol=1e-4, rtol=1e-5)
    assert np.allclose(lm.nll(rows), [-row.astype(np.float64).mean() for row in found], atol=0, rtol=1e-12)
    assert np.allclose(lm.nll(encoded), lm.nll(rows), atol=0, rtol=0)


@pytest.mark.parametrize("batch_size", [1, 5, 24])
def test_independent_of_batch_size_and_order(lm: LM, rows: list[tuple[str, str]], batch_size: int) -> None:
    whole = lm.nll(rows)
    assert np.allclose(lm.nll(rows, batch_size=batch_size), whole, atol=1e-5, rtol=1e-5)
    assert np.allclose(lm.nll(rows[::-1])[::-1], whole, atol=1e-5, rtol=1e-5)


def test_scores_at_the_full_context(lm: LM) -> None:
    encoded = lm.encode(["ab" * 400])
    assert encoded.lengths.tolist() == [min(lm.max_length, encoded.lengths[0])]
    assert np.isfinite(lm.nll(encoded)).all()


def test_mode_and_gradients_are_left_alone(new_lm) -> None:
    lm = new_lm("gpt2")
    lm.model.train()
    before = lm.weights_sha256
    lm.nll(["some text"])
    lm.generate(["some"], max_new_tokens=2)
    assert lm.model.training
    assert lm.weights_sha256 == before
    loss = lm.model(input_ids=torch.tensor([[5, 6, 7]]), labels=torch.tensor([[5, 6, 7]])).loss
    loss.backward()  # nothing that inference left behind is in the way


def test_dropout_is_off(new_lm) -> None:
    lm = new_lm("gpt2")
    for module in lm.model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.5
    lm.model.train()
    assert lm.nll(["some text"]) == lm.nll(["some text"])


def test_embed_averages_the_text_tokens(lm: LM, texts: list[str]) -> None:
    found = lm.embed(texts[:5], layer=1)
    ids = lm.encode(texts[:5]).ids
    for row, vector in zip(ids, found, strict=True):
        with torch.no_grad():
            states = lm.model(torch.from_numpy(row)[None], output_hidden_states=True).hidden_states[1][0]
        assert np.allclose(vector, states[1:-1].double().mean(0).numpy(), atol=1e-5, rtol=1e-4)
    last = lm.embed(texts[:5])
    assert last.shape == (5, lm.model.config.hidden_size)
    assert last.dtype == np.float32
    assert np.allclose(last, lm.embed(texts[:5], layer=2), atol=1e-6)
    with pytest.raises(InputError, match="layer 9 of a model with hidden states 0 to 2"):
        lm.embed(texts[:2], layer=9)
    assert lm.embed([]).shape == (0, lm.model.config.hidden_size)


def test_batches_hold_every_row_once_within_the_budget() -> None:
    lengths = np.array([5, 100, 7, 7, 60, 1, 5])
    batches = by_tokens(lengths, tokens=64)
    assert sorted(np.concatenate(batches).tolist()) == list(range(7))
    for batch in batches:
        assert len(batch) == 1 or len(batch) * lengths[batch].max() <= 64
    assert [len(batch) for batch in by_tokens(lengths, rows=3)] == [3, 3, 1]
    with pytest.raises(InputError, match="batch_size must be at least 1"):
        by_tokens(lengths, rows=0)
