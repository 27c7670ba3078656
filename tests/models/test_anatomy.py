"""The parts of a decoder, found in every family by what they are."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM, MixtralConfig

from palimpsest.core.errors import InputError
from palimpsest.models import anatomy
from palimpsest.models.lm import LM

IDS = torch.tensor([[5, 6, 7, 8, 9]])


def moe() -> nn.Module:
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(
        MixtralConfig(
            vocab_size=50,
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            num_local_experts=4,
        )
    )


def test_layers_and_their_parts(lm: LM) -> None:
    stack = anatomy.layers(lm.model)
    assert len(stack) == lm.model.config.num_hidden_layers
    width = lm.model.config.hidden_size
    for layer in stack:
        block = anatomy.feed_forward(layer)
        values = anatomy.value_vectors(anatomy.down_projection(block))
        assert values.shape[1] == width
        assert values.shape[0] > width


def test_the_down_projection_makes_the_blocks_output(lm: LM) -> None:
    block = anatomy.feed_forward(anatomy.layers(lm.model)[0])
    down = anatomy.down_projection(block)
    seen: list[torch.Tensor] = []
    with anatomy.hooked((down, lambda m, inputs, output: seen.append(inputs[0]))), torch.no_grad():
        output = block(torch.randn(1, 3, lm.model.config.hidden_size))
        wanted = seen[0] @ anatomy.value_vectors(down) + (down.bias if getattr(down, "bias", None) is not None else 0)
    torch.testing.assert_close(output, wanted)


def test_experts_have_no_down_projection_but_layers_and_blocks() -> None:
    model = moe()
    block = anatomy.feed_forward(anatomy.layers(model)[0])
    with pytest.raises(InputError, match="mixture of experts"):
        anatomy.down_projection(block)


def test_a_model_without_layers_is_refused() -> None:
    with pytest.raises(InputError, match="no stack of layers"):
        anatomy.layers(nn.Sequential(nn.Linear(2, 2)))
    with pytest.raises(InputError, match="no feed-forward block"):
        anatomy.feed_forward(nn.Linear(2, 2))


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")  # peft 0.21
def test_adapters_hide_nothing(llama: LM) -> None:
    from peft import LoraConfig, get_peft_model

    adapted = get_peft_model(llama.copy().model, LoraConfig(r=2, target_modules="all-linear", task_type="CAUSAL_LM"))
    assert len(anatomy.layers(adapted)) == len(anatomy.layers(llama.model))
    down = anatomy.down_projection(anatomy.feed_forward(anatomy.layers(adapted)[0]))
    assert any(name.startswith("lora_B") for name, _ in down.named_parameters())
    plain = anatomy.down_projection(anatomy.feed_forward(anatomy.layers(llama.model)[0]))
    assert torch.equal(anatomy.value_vectors(down), anatomy.value_vectors(plain))


def test_capture_is_the_layers_output_with_its_graph_and_stops_there(lm: LM) -> None:
    last = len(anatomy.layers(lm.model)) - 1
    after: list[int] = []
    with anatomy.hooked((anatomy.layers(lm.model)[last], lambda *call: after.append(1))):
        found = anatomy.capture(lm.model, 0, lambda: lm.model(input_ids=IDS, use_cache=False))
    wanted = lm.model(input_ids=IDS, use_cache=False, output_hidden_states=True).hidden_states[1]
    torch.testing.assert_close(found, wanted)
    assert found.requires_grad
    assert (after == []) == (last > 0)


def test_hooks_are_removed_whatever_happens_and_others_stay(llama: LM) -> None:
    layer = anatomy.layers(llama.model)[0]
    mine = layer.register_forward_hook(lambda *call: None)
    seen: list[int] = []

    def fails(*call: object) -> None:
        seen.append(len(layer._forward_hooks))
        raise RuntimeError("inside")

    with pytest.raises(RuntimeError, match="inside"), anatomy.hooked((layer, fails)):
        llama.model(input_ids=IDS)
    assert seen == [2]
    assert list(layer._forward_hooks) == [mine.id]
    mine.remove()


def test_outputs_of_both_forms() -> None:
    one, two = torch.zeros(2), torch.ones(2)
    assert anatomy.output_of((one, "cache")) is one
    assert anatomy.output_of(one) is one
    assert anatomy.with_output((one, "cache"), two) == (two, "cache")
    assert anatomy.with_output(one, two) is two


def test_same_weights_sees_one_changed_number(lm: LM) -> None:
    other = lm.copy().model
    assert anatomy.same_weights(lm.model, other)
    with torch.no_grad():
        next(other.parameters()).view(-1)[-1] += 1
    assert not anatomy.same_weights(lm.model, other)


def test_a_sharing_copy_owns_no_weights_until_it_must(lm: LM) -> None:
    shared = anatomy.sharing_copy(lm.model)
    theirs = {p.data_ptr() for p in lm.model.parameters()}
    assert {p.data_ptr() for p in shared.parameters()} == theirs
    assert not any(p.requires_grad for p in shared.parameters())
    assert all(p.requires_grad for p in lm.model.parameters())
    torch.testing.assert_close(shared(input_ids=IDS).logits, lm.model(input_ids=IDS).logits)
    anatomy.own_weights(shared, lm.model)
    assert not theirs & {p.data_ptr() for p in shared.parameters()}
    assert anatomy.same_weights(shared, lm.model)
    tied = lm.model.config.tie_word_embeddings
    assert (shared.get_input_embeddings().weight is shared.get_output_embeddings().weight) == tied  # type: ignore[operator]
