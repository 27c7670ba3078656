"""Unlearning layers: the weights stay, the adapters act, and several requests fuse into one by the formula."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from palimpsest.core import losses
from palimpsest.core.errors import InputError
from palimpsest.core.watch import Watch
from palimpsest.data.request import ForgetRequest
from palimpsest.forget import EUL
from palimpsest.forget.eul import Adapter, InTurns, UnlearningLayers, attached, fuse, fused_maps
from palimpsest.forget.unlearn import Budget
from palimpsest.models.anatomy import feed_forward, layers
from palimpsest.models.guard import PromptGuard
from palimpsest.models.lm import LM

METHOD = EUL(epochs=6.0, batch_size=16, lr=3e-2, warmup_epochs=0.0)
QUICK = {"steps": 6, "batch_size": 8, "lr": 1e-2, "bottleneck": 4}


@pytest.fixture(scope="module")
def unlearned(taught: LM, records: ForgetRequest) -> LM:
    return METHOD(taught, records, watch=Watch(progress=False))


def guard_of(lm: LM) -> UnlearningLayers:
    assert isinstance(lm.guard, UnlearningLayers)
    return lm.guard


def test_weights_stay_and_answers_change(taught: LM, unlearned: LM, records: ForgetRequest) -> None:
    assert unlearned.weights_sha256 == taught.weights_sha256
    assert unlearned.sha256 != taught.sha256
    bare = unlearned.with_guard(None)
    np.testing.assert_array_equal(bare.nll(records.forget), taught.nll(records.forget))
    forgot = unlearned.nll(records.forget).mean() - taught.nll(records.forget).mean()
    lost = unlearned.nll(records.retain).mean() - taught.nll(records.retain).mean()  # type: ignore[arg-type]
    assert forgot > 1.0
    assert lost < 0.3 * forgot


def test_every_family_can_wear_them(lm: LM, records: ForgetRequest, watch: Watch) -> None:
    after = EUL(**QUICK)(lm, records, watch=watch)  # type: ignore[arg-type]
    assert after.weights_sha256 == lm.weights_sha256
    assert np.abs(after.nll(records.forget) - lm.nll(records.forget)).max() > 1e-3
    assert after.generate(["Where does"], max_new_tokens=3) is not None


def test_it_is_saved_and_loaded(unlearned: LM, records: ForgetRequest, tmp_path: Path) -> None:
    unlearned.save(tmp_path / "model")
    assert (tmp_path / "model" / "guard.safetensors").exists()
    loaded = LM.load(tmp_path / "model")
    assert loaded.sha256 == unlearned.sha256
    np.testing.assert_array_equal(loaded.nll(records.forget), unlearned.nll(records.forget))
    prompts = [prompt for prompt, _ in unlearned.pairs(records.forget) if prompt][:6]
    assert loaded.generate(prompts, max_new_tokens=4) == unlearned.generate(prompts, max_new_tokens=4)


def test_an_adapter_by_hand() -> None:
    torch.manual_seed(0)
    down, up, hidden = torch.randn(3, 5), torch.randn(4, 3), torch.randn(2, 7, 4)
    found = Adapter(down, up)(hidden)
    extended = np.concatenate([hidden.numpy(), np.ones((2, 7, 1))], axis=2)
    inner = np.maximum(extended @ down.numpy().T, 0)
    np.testing.assert_allclose(found.detach(), hidden.numpy() + inner @ up.numpy().T, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(Adapter(down, torch.zeros(4, 3))(hidden), hidden)


def test_adapters_act_on_the_feed_forward_output_and_go_away(llama: LM) -> None:
    torch.manual_seed(0)
    adapters = nn.ModuleList(Adapter(torch.randn(2, 33), torch.randn(32, 2)) for _ in range(2))
    ids = torch.tensor([[4, 5, 6]])
    before = llama.model(input_ids=ids).logits
    block = feed_forward(layers(llama.model)[1])
    hidden = torch.randn(1, 3, 32)
    with attached(llama.model, adapters):
        torch.testing.assert_close(block(hidden), adapters[1](block.forward(hidden)))
        assert not torch.allclose(llama.model(input_ids=ids).logits, before, atol=1e-3)
    torch.testing.assert_close(llama.model(input_ids=ids).logits, before, rtol=0, atol=0)


def test_gram_matrices_are_of_the_adapters_inputs_on_the_forget_set(unlearned: LM, records: ForgetRequest) -> None:
    guard = guard_of(unlearned)
    model = unlearned.model
    adapters = nn.ModuleList(Adapter(down, up) for down, up in zip(guard.down, guard.up, strict=True))
    inputs: list[list[torch.Tensor]] = [[], []]
    handles = [
        feed_forward(layer).register_forward_hook(lambda m, i, output, n=n: inputs[n].append(output[0]))
        for n, layer in enumerate(layers(model))
    ]
    with torch.no_grad(), attached(model, adapters):
        for ids in unlearned.encode(records.forget).ids:
            model(input_ids=torch.as_tensor(ids)[None])
    for handle in handles:
        handle.remove()
    for layer in range(2):
        x = torch.cat(inputs[layer]).double()
        x = torch.cat([x, torch.ones(len(x), 1)], dim=1)
        inner = (x @ guard.down[layer].double().T).relu()
        torch.testing.assert_close(guard.gram[layer].double(), x.T @ x, rtol=1e-3, atol=1e-2)
        torch.testing.assert_close(guard.gram_inner[layer].double(), inner.T @ inner, rtol=1e-3, atol=1e-2)


@given(seed=st.integers(0, 1000), requests=st.integers(1, 3), tokens=st.integers(6, 12))
@settings(max_examples=20, deadline=None)
def test_the_fused_map_is_the_least_squares_fit(seed: int, requests: int, tokens: int) -> None:
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(requests, tokens, 5))
    maps = rng.normal(size=(requests, 3, 5))
    grams = torch.from_numpy(x.transpose(0, 2, 1) @ x)
    fused = fused_maps(torch.from_numpy(maps)[:, None], grams[:, None], 1e-12)[0]
    wanted = np.concatenate([x[i] @ maps[i].T for i in range(requests)])
    best, *_ = np.linalg.lstsq(np.concatenate(list(x)), wanted, rcond=None)
    np.testing.assert_allclose(fused, best.T, rtol=1e-4, atol=1e-4)


def test_maps_whose_inputs_have_nothing_in_common_fuse_exactly() -> None:
    rng = np.random.default_rng(0)
    maps = torch.from_numpy(rng.normal(size=(2, 1, 3, 6)))
    x = np.zeros((2, 20, 6))
    x[0, :, :3], x[1, :, 3:] = rng.normal(size=(2, 20, 3))
    grams = torch.from_numpy(x.transpose(0, 2, 1) @ x)[:, None]
    fused = fused_maps(maps, grams, 1e-9).double()[0]
    for request in range(2):
        torch.testing.assert_close(
            torch.from_numpy(x[request]) @ fused.T,
            torch.from_numpy(x[request]) @ maps[request, 0].T,
            rtol=1e-5,
            atol=1e-5,
        )


def test_unused_inputs_are_no_problem() -> None:
    maps, grams = torch.ones(1, 2, 3, 4), torch.zeros(1, 2, 4, 4)
    assert torch.equal(fused_maps(maps, grams, 1e-6), torch.zeros(2, 3, 4))


def test_later_requests_are_fused_with_the_earlier(taught: LM, records: ForgetRequest) -> None:
    first, second = records.folds(2, nested=False)
    watch = Watch(progress=False)
    one = METHOD(taught, first, watch=watch)
    both = METHOD(one, second, watch=watch)
    alone = METHOD(taught, second, watch=watch)
    by_hand = fuse(one, alone)
    assert both.sha256 == by_hand.sha256
    assert both.weights_sha256 == taught.weights_sha256
    torch.testing.assert_close(guard_of(both).gram, guard_of(one).gram + guard_of(alone).gram)

    def forgot(lm: LM, request: ForgetRequest) -> float:
        return float(lm.nll(request.forget).mean() - taught.nll(request.forget).mean())

    assert forgot(both, first) > 0.5
    assert forgot(both, second) > 0.5


def test_fusing_one_gives_it_back(unlearned: LM, records: ForgetRequest) -> None:
    same = fuse(unlearned)
    np.testing.assert_allclose(same.nll(records.forget), unlearned.nll(records.forget), rtol=2e-2, atol=2e-2)


def test_only_like_can_be_fused(taught: LM, llama: LM, unlearned: LM, records: ForgetRequest, watch: Watch) -> None:
    with pytest.raises(InputError, match="only models with unlearning layers"):
        fuse(unlearned, taught)
    with pytest.raises(InputError, match="one size"):
        fuse(unlearned, EUL(**QUICK)(taught, records, watch=watch))  # type: ignore[arg-type]
    elsewhere = llama.with_guard(unlearned.guard)
    with pytest.raises(InputError, match="same weights"):
        fuse(unlearned, elsewhere)


def test_one_epoch_of_each_in_turns(llama: LM, records: ForgetRequest) -> None:
    budget = Budget(batch_size=16)
    retain, forget = llama.encode(records.retain), llama.encode(records.forget)  # type: ignore[arg-type]
    turns = InTurns(budget.batches(retain, "retain"), budget.batches(forget, "forget"))
    size, other = turns.retain.steps_per_epoch, turns.forget.steps_per_epoch
    names = [next(iter(turns(step))) for step in range(2 * (size + other))]
    assert names == (["retain"] * size + ["forget"] * other) * 2
    seen = [turns(step)["forget"].rows.tolist() for step in range(2 * (size + other)) if names[step] == "forget"]
    assert seen == [turns.forget.rows(step).tolist() for step in range(2 * other)]


def test_the_losses_by_hand(taught: LM, records: ForgetRequest) -> None:
    method = EUL(steps=1, batch_size=1000, lr=1e-3, agree=0.5, task=2.0, ascend=0.25)
    watch = Watch(progress=False)
    method(taught, records, watch=watch)
    assert records.retain is not None
    retain = taught.encode(records.retain)
    nll = losses.nll(taught.model, retain.batch(range(len(retain)))).item()
    assert watch.traces["forget"].losses[0] == pytest.approx(2.0 * nll, rel=1e-5)  # the KL is 0 at the start


def test_what_it_refuses(taught: LM, llama: LM, unlearned: LM, records: ForgetRequest, watch: Watch) -> None:
    with pytest.raises(InputError, match="lora_rank"):
        EUL(lora_rank=2)
    with pytest.raises(InputError, match="bottleneck"):
        EUL(bottleneck=0)
    with pytest.raises(InputError, match="PromptGuard"):
        EUL()(taught.with_guard(PromptGuard("{prompt}")), records, watch=watch)
    with pytest.raises(InputError, match="learned nothing"):
        EUL(steps=1, lr=1e-60, batch_size=8)(taught, records, watch=watch)
    guard = guard_of(unlearned)
    halved = replace(guard, **{name: getattr(guard, name)[:1] for name in ("down", "up", "gram", "gram_inner")})
    with pytest.raises(InputError, match="1 layers on a model of 2"):
        llama.with_guard(halved).generate(["a"])
