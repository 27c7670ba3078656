"""Momentum attention: the sum it stands for, its gradient, and as a drop-in for Hugging Face decoders."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from palimpsest.core.errors import InputError
from palimpsest.models.attention import attention_modules, momentum, momentum_attention, with_momentum

FAMILIES = {
    "llama": {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 4},
    "qwen3": {
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "head_dim": 4,
    },
    "gpt2": {"n_embd": 16, "n_layer": 2, "n_head": 4, "n_positions": 32},
}


def built(family: str):
    from transformers import AutoConfig, AutoModelForCausalLM

    settings = dict(FAMILIES[family], vocab_size=20, bos_token_id=0, eos_token_id=1, pad_token_id=2)
    if family != "gpt2":
        settings |= {"max_position_embeddings": 32, "num_key_value_heads": 2}
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **settings)).eval()


def test_momentum_is_the_decayed_sum_of_strictly_past_values() -> None:
    values = torch.randn(2, 3, 6, 4, generator=torch.Generator().manual_seed(0)).double()
    found = momentum(values, torch.tensor(0.7).double(), 6)
    state = torch.zeros_like(values[:, :, 0])
    for t in range(6):
        torch.testing.assert_close(found[:, :, t], state)
        state = 0.7 * (state + values[:, :, t])  # the recurrence for decoding
    torch.testing.assert_close(momentum(values, torch.tensor(0.7).double(), 1), found[:, :, -1:])
    near = momentum(values, torch.tensor(0.7).double(), 6, reach=2)
    torch.testing.assert_close(near[:, :, 4], 0.7 * values[:, :, 3] + 0.49 * values[:, :, 2])


def test_its_gradient_is_right_in_every_argument() -> None:
    generator = torch.Generator().manual_seed(1)
    parts = [torch.randn(2, 2, 5, 3, generator=generator, dtype=torch.float64, requires_grad=True) for _ in range(3)]
    eta = torch.tensor([[[0.3]], [[0.8]]], dtype=torch.float64, requires_grad=True)  # one a head
    assert torch.autograd.gradcheck(momentum_attention, (*parts, eta))


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_in_a_decoder_it_adds_momentum_and_nothing_else(family: str) -> None:
    model = built(family)
    ids = torch.randint(3, 20, (2, 7), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        plain = model(input_ids=ids).logits
        changed = with_momentum(model, 0.5)
        assert torch.equal(model(input_ids=ids).logits, plain)  # a copy
        moved = changed(input_ids=ids).logits
        torch.testing.assert_close(moved[:, 0], plain[:, 0])  # nothing is past at the first token
        assert not torch.allclose(moved[:, 1:], plain[:, 1:], atol=1e-4)
        almost = with_momentum(model, 1e-7)(input_ids=ids).logits
        torch.testing.assert_close(almost, plain, atol=1e-5, rtol=0)


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_padding_and_the_cache_change_no_answer(family: str) -> None:
    model = with_momentum(built(family), 0.6)
    ids = torch.randint(3, 20, (1, 6), generator=torch.Generator().manual_seed(2))
    padded = F.pad(ids, (3, 0), value=2)
    mask = torch.tensor([[0, 0, 0, 1, 1, 1, 1, 1, 1]])
    with torch.no_grad():
        alone = model(input_ids=ids).logits
        positions = (mask.cumsum(1) - 1).clamp(min=0)
        beside = model(input_ids=padded, attention_mask=mask, position_ids=positions).logits[:, 3:]
    torch.testing.assert_close(beside, alone, atol=1e-5, rtol=1e-5)
    settings = {"max_new_tokens": 5, "do_sample": False, "pad_token_id": 2, "eos_token_id": None}
    cached = model.generate(ids, use_cache=True, **settings)
    assert torch.equal(cached, model.generate(ids, use_cache=False, **settings))


def test_a_learned_decay_trains_for_each_head() -> None:
    model = with_momentum(built("llama"), 0.5, learned=True)
    modules = attention_modules(model)
    assert [module.momentum_logit.shape for module in modules] == [(4, 1, 1)] * 2
    model(input_ids=torch.tensor([[3, 4, 5, 6]])).logits.square().sum().backward()
    assert all(module.momentum_logit.grad.ne(0).all() for module in modules)
    assert not with_momentum(built("llama"), 0.5).model.layers[0].self_attn.momentum_logit.requires_grad


def test_bad_input_is_said() -> None:
    with pytest.raises(InputError, match="eta must lie between 0 and 1, not 1"):
        with_momentum(built("gpt2"), 1.0)
    with pytest.raises(InputError, match="no attention modules"):
        with_momentum(torch.nn.Linear(2, 2))
