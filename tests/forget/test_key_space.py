"""Key Space Detection: the box, where it is put, and what happens to a prompt inside it."""

from __future__ import annotations

import logging
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from palimpsest.core.errors import InputError
from palimpsest.data.request import ForgetRequest
from palimpsest.forget import KeySpaceDetection
from palimpsest.forget.key_space import Fence, KeySpace, prompts_of, queries
from palimpsest.forget.probing import Box, above_chance, pooled_keys, widths
from palimpsest.models.anatomy import down_projection, feed_forward, hooked, layers
from palimpsest.models.lm import LM

REFUSAL = "No comment."


def everywhere(lm: LM) -> LM:
    """Guarded by a box that holds every prompt."""
    width = widths(lm.model)[1]
    box = Box(torch.zeros(width), torch.ones(width), 1e6)
    return lm.with_guard(KeySpace((Fence(1, "last", box, 1.0),), REFUSAL))


def only(lm: LM, prompts: list[str]) -> LM:
    """Guarded by a tiny box around each of the prompts."""
    keys = pooled_keys(lm, prompts_of(lm, prompts), [(1, "mean")])[1, "mean"]
    fences = [Fence(1, "mean", Box(key, torch.ones_like(key), 1e-4), 1.0) for key in keys]
    return lm.with_guard(KeySpace(tuple(fences), REFUSAL))


def bisected(keys: np.ndarray) -> float:
    """The authors' search for the smallest k that holds every key."""
    mean, deviation = keys.mean(0), keys.std(0, ddof=1)
    low, high = 0.0, 10000.0
    while high - low > 1e-6:
        middle = (low + high) / 2
        if (np.abs(keys - mean) <= middle * deviation).all():
            high = middle
        else:
            low = middle
    return high


@settings(max_examples=30, deadline=None)
@given(st.integers(2, 40), st.integers(1, 8), st.integers(0, 10**6))
def test_the_closed_form_is_what_bisection_finds(rows: int, width: int, seed: int) -> None:
    keys = np.random.default_rng(seed).normal(3, 2, (rows, width))
    box = Box.around(torch.from_numpy(keys))
    assert box.k == pytest.approx(bisected(keys), abs=1e-4)
    assert box.reach(torch.from_numpy(keys)).max().item() == pytest.approx(1.0)


def test_a_dead_neuron_does_not_make_a_box_of_no_width() -> None:
    keys = torch.randn(20, 3, generator=torch.Generator().manual_seed(0))
    keys[:, 1] = 0.5
    box = Box.around(keys)
    assert (box.reach(keys) <= 1.0 + 1e-5).all()
    with pytest.raises(InputError, match="at least 2 keys"):
        Box.around(keys[:1])


def test_keys_are_of_the_last_token_or_the_mean(lm: LM) -> None:
    prompts = ["Who is it?", "And where did they go after that?", "x"]
    places = [(layer, pooling) for layer in range(2) for pooling in ("last", "mean")]
    found = pooled_keys(lm, prompts_of(lm, prompts), places)  # type: ignore[arg-type]
    for number, prompt in enumerate(prompts):
        ids = torch.as_tensor(prompts_of(lm, [prompt]).ids[0])[None]
        for layer in range(2):
            seen: list[torch.Tensor] = []
            module = down_projection(feed_forward(layers(lm.model)[layer]))
            with hooked((module, lambda m, i, o, seen=seen: seen.append(i[0][0, 1:].double()))):
                lm.model(input_ids=ids)
            torch.testing.assert_close(found[layer, "last"][number].double(), seen[0][-1], rtol=1e-4, atol=1e-4)
            torch.testing.assert_close(found[layer, "mean"][number].double(), seen[0].mean(0), rtol=1e-4, atol=1e-4)


def test_a_prompt_inside_is_answered_by_the_refusal_others_as_before(lm: LM) -> None:
    prompts = ["Who is Ann?", "Where is it and why so?", "Say more."]
    guarded = only(lm, prompts[1:2])
    found = guarded.generate(prompts, max_new_tokens=30)
    plain = lm.generate(prompts, max_new_tokens=30)
    assert found == [plain[0], REFUSAL, plain[2]]
    assert [guarded.generate([prompt], max_new_tokens=30)[0] for prompt in prompts] == found
    cut_short = guarded.generate(prompts[1:2], max_new_tokens=2)[0]
    assert cut_short
    assert REFUSAL.startswith(cut_short)
    sampled = guarded.generate(prompts[1:], max_new_tokens=30, samples=3, temperature=1.0)
    assert sampled[0] == [REFUSAL] * 3
    assert sampled[1] == lm.generate(prompts[1:], max_new_tokens=30, samples=3, temperature=1.0)[1]
    assert not lm.model._forward_hooks


def test_a_refused_prompt_is_scored_as_if_unseen(lm: LM) -> None:
    pairs = [("Who is Ann?", " She is here."), ("Where is it?", " There it is.")]
    guarded = only(lm, [pairs[0][0]])
    wanted = lm.nll([(REFUSAL, pairs[0][1]), pairs[1]])
    np.testing.assert_allclose(guarded.nll(pairs), wanted, rtol=1e-5)
    documents = ["Who is Ann? She is here."]
    np.testing.assert_allclose(everywhere(lm).nll(documents), lm.nll(documents), rtol=1e-6)


def test_the_place_and_size_are_those_with_fewest_false_alarms(lm: LM, asked: ForgetRequest) -> None:
    assert asked.retain is not None
    guarded = KeySpaceDetection()(lm, asked)
    assert isinstance(guarded.guard, KeySpace)
    chosen = guarded.guard.fences[0]
    outside = guarded.guard.refused(lm, queries(lm, asked.retain))
    assert outside.mean() == pytest.approx(chosen.false_alarms)
    assert guarded.guard.refused(lm, queries(lm, asked.forget)).mean() >= 0.7
    for layer in range(2):
        for pooling in ("last", "mean"):
            other = KeySpaceDetection(layer=layer, pooling=pooling)(lm, asked).guard
            assert isinstance(other, KeySpace)
            fence = other.fences[0]
            assert (fence.layer, fence.pooling) == (layer, pooling)
            assert fence.recall >= 0.9
            assert (chosen.false_alarms, -chosen.auroc) <= (fence.false_alarms, -fence.auroc)
            assert fence.half_width == pytest.approx(fence.alpha * fence.box.k)


def test_as_released_no_retain_records_are_needed(llama: LM, asked: ForgetRequest) -> None:
    released = KeySpaceDetection(layer=-1, pooling="last", alpha=2.0)(llama, ForgetRequest(asked.forget))
    assert isinstance(released.guard, KeySpace)
    assert (released.guard.fences[0].layer, released.guard.fences[0].alpha) == (1, 2.0)
    assert released.guard.refused(llama, queries(llama, asked.forget)).all()


def test_boxes_join_and_survive_the_disk(lm: LM, asked: ForgetRequest, tmp_path: Path) -> None:
    sha256 = lm.sha256
    first = KeySpaceDetection(layer=0, pooling="mean", refusal=REFUSAL)(lm, asked)
    both = KeySpaceDetection(seed=1, refusal=REFUSAL)(first, asked)
    assert lm.sha256 == sha256
    assert isinstance(both.guard, KeySpace)
    assert len(both.guard.fences) == 2
    both.save(tmp_path / "model")
    loaded = LM.load(tmp_path / "model")
    assert loaded.sha256 == both.sha256
    asked_now = queries(lm, asked.forget)[:4]
    assert loaded.generate(asked_now, max_new_tokens=12) == both.generate(asked_now, max_new_tokens=12)


def test_the_models_own_answer_is_tested_as_well(lm: LM) -> None:
    prompt = "Who is Ann?"
    ids = prompts_of(lm, [prompt]).ids[0]
    said = lm.generate_ids([ids], max_new_tokens=3)[0]
    assert len(said) == 3
    longer = replace(prompts_of(lm, [prompt]), ids=(np.concatenate([ids, said[:2]]),))
    key = pooled_keys(lm, longer, [(1, "last")])[1, "last"][0]
    fence = Fence(1, "last", Box(key, torch.ones_like(key), 1e-3), 1.0)
    assert not KeySpace((fence,), REFUSAL).refused(lm, [prompt]).any()
    assert not KeySpace((fence,), REFUSAL, ahead=1).refused(lm, [prompt]).any()
    assert KeySpace((fence,), REFUSAL, ahead=2).refused(lm, [prompt]).all()


def test_false_alarms_are_said(llama: LM, asked: ForgetRequest, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        KeySpaceDetection(layer=-1, pooling="last", alpha=50.0)(llama, asked)
    assert "100.0% of the retain prompts lie in the box" in caplog.text


def test_auroc_by_hand() -> None:
    assert above_chance(torch.tensor([0.1, 0.3]), torch.tensor([0.2, 0.5])) == 0.75


@pytest.mark.parametrize("wrong", [{"alpha": -1.0}, {"ahead": -1}, {"recall": 0.0}, {"recall": 1.5}, {"refusal": " "}])
def test_what_cannot_be_is_refused(wrong: dict) -> None:
    with pytest.raises(InputError, match=next(iter(wrong))):
        KeySpaceDetection(**wrong)


def test_a_layer_that_is_not_there(llama: LM, asked: ForgetRequest) -> None:
    with pytest.raises(InputError, match=r"layer must lie in -2\.\.1"):
        KeySpaceDetection(layer=2)(llama, asked)
    fence = Fence(5, "last", Box(torch.zeros(4), torch.ones(4), 1.0), 1.0)
    with pytest.raises(InputError, match="looks at layer 5"):
        llama.with_guard(KeySpace((fence,), REFUSAL)).generate(["a"], max_new_tokens=2)
