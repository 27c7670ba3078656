from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from palimpsest.core.errors import InputError
from palimpsest.data.request import ForgetRequest
from palimpsest.forget.interpolation import InterpolationGuard, generic_logits
from palimpsest.forget.whp import WhosHarryPotter
from palimpsest.models.lm import LM

DECODE: dict[str, Any] = {"mode": "decode", "alpha": 1.5, "reinforce_steps": 3, "reinforce_lr": 3e-3, "batch_size": 8}


@pytest.fixture(scope="module")
def guarded(lm: LM, records: ForgetRequest) -> LM:
    return WhosHarryPotter(**DECODE)(lm, records)


def wanted(lm: LM, ids: np.ndarray) -> np.ndarray:
    """The corrected log-probabilities of a row by two plain forward passes, (T, V) float64."""
    guard: Any = lm.guard
    other = lm.with_guard(None).copy().model
    own = dict(other.named_parameters())
    with torch.no_grad():
        for name, value in guard.changed.items():
            own[name].copy_(value)
        tokens = torch.from_numpy(ids)[None]
        base, raised = (m(tokens).logits[0].double().log_softmax(-1) for m in (lm.model, other))
    return (base - 1.5 * (raised - base).clamp(min=0)).log_softmax(-1).numpy()


@pytest.mark.parametrize("normalise", [True, False])
def test_the_formula_and_its_blindness_to_constants(normalise: bool) -> None:
    rng = np.random.default_rng(1)
    base, raised = rng.normal(size=(3, 7)), rng.normal(size=(3, 7))
    found = generic_logits(torch.from_numpy(base), torch.from_numpy(raised), 5.0, normalise).numpy()
    shifted = generic_logits(torch.from_numpy(base), torch.from_numpy(raised + 2), 5.0, normalise).numpy()
    if normalise:
        base, raised = (v - np.log(np.exp(v).sum(1, keepdims=True)) for v in (base, raised))
    assert np.allclose(found, base - 5 * np.maximum(raised - base, 0))
    assert np.allclose(found, shifted) == normalise


def test_scores_are_those_of_two_models(guarded: LM, records: ForgetRequest) -> None:
    rows = guarded.pairs(records.forget)[:12]
    encoded = guarded.encode(rows)
    found = guarded.token_logprobs(rows)
    for ids, start, values in zip(encoded.ids, encoded.starts, found, strict=True):
        logprobs = wanted(guarded, ids)
        expected = [logprobs[place - 1, ids[place]] for place in range(start, len(ids))]
        assert np.allclose(values, expected, atol=2e-3)
    assert np.allclose(guarded.nll(rows, batch_size=3), guarded.nll(rows), atol=1e-3)


def test_generation_follows_both_models_with_one_cache(guarded: LM, records: ForgetRequest) -> None:
    prompts = [prompt[: 9 + 3 * n] for n, (prompt, _) in enumerate(guarded.pairs(records.forget)[-10:])]
    ids = [np.array(guarded.tokenizer(prompt)["input_ids"]) for prompt in prompts]
    answers = guarded.generate_ids(ids, max_new_tokens=8)
    for prompt, answer in zip(ids, answers, strict=True):
        said = prompt
        for token in answer:
            logprobs = wanted(guarded, said)[-1]
            assert logprobs[token] >= logprobs.max() - 1e-3
            said = np.append(said, token)
    assert guarded.generate(prompts, max_new_tokens=8, batch_size=1) == guarded.generate(prompts, max_new_tokens=8)
    two = guarded.generate(prompts, max_new_tokens=6, samples=2, temperature=1.0)
    assert guarded.generate(prompts, max_new_tokens=6, samples=2, temperature=1.0, batch_size=2) == two


def test_the_model_stays_and_no_hook_is_left(lm: LM, guarded: LM, records: ForgetRequest) -> None:
    rows = lm.pairs(records.forget)[:3]
    before = lm.nll(rows)
    changed = guarded.nll(rows)
    assert not np.allclose(before, changed, atol=1e-3)
    assert np.array_equal(lm.nll(rows), before)
    assert guarded.weights_sha256 == lm.weights_sha256
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in lm.model.modules())


def test_saved_beside_the_weights(guarded: LM, records: ForgetRequest, tmp_path) -> None:
    guarded.save(tmp_path / "model")
    again = LM.load(tmp_path / "model")
    assert isinstance(again.guard, InterpolationGuard)
    assert again.sha256 == guarded.sha256
    rows = guarded.pairs(records.forget)[:4]
    assert np.allclose(again.nll(rows), guarded.nll(rows), atol=1e-5)


def test_bad_input(guarded: LM, llama: LM, records: ForgetRequest) -> None:
    with pytest.raises(InputError, match="forgets by a guard"):
        WhosHarryPotter(**DECODE)(guarded, records)
    with pytest.raises(InputError, match="equals the model"):
        InterpolationGuard.between(llama, llama.copy(), 1.0, True)
    with pytest.raises(InputError, match="another architecture"):
        llama.with_guard(InterpolationGuard(1.0, True, {"strange": torch.zeros(2)})).nll(["text"])
    with pytest.raises(InputError, match="taught what it says already"):
        WhosHarryPotter(mode="decode", alpha=0.0)
