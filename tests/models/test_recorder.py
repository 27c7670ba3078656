"""What is recorded of attention, against the eager attention of transformers and a computation by hand."""

from __future__ import annotations

import inspect

import pytest
import torch

from palimpsest.core.errors import InputError
from palimpsest.models.attention import attention_modules
from palimpsest.models.recorder import recording

FAMILIES = {
    "llama": {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_key_value_heads": 2},
    "qwen3": {
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_hidden_layers": 2,
        "num_key_value_heads": 2,
        "head_dim": 4,
    },
    "gpt2": {"n_embd": 16, "n_layer": 2},
}


def built(family: str):
    from transformers import AutoConfig, AutoModelForCausalLM

    settings = dict(FAMILIES[family], num_attention_heads=4, vocab_size=20, max_position_embeddings=32)
    special = {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2}
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **settings, **special)).eval()


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_scores_are_those_before_the_softmax(family: str) -> None:
    model = built(family)
    ids = torch.randint(3, 20, (2, 7), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        plain = model(input_ids=ids).logits
        with recording(model) as recorder:
            inside = model(input_ids=ids).logits
        torch.testing.assert_close(inside, plain)
        torch.testing.assert_close(model(input_ids=ids).logits, plain)  # as it was
        model.set_attn_implementation("eager")
        maps = model(input_ids=ids, output_attentions=True).attentions
    assert len(recorder.scores) == len(recorder.outputs) == len(recorder.queries) == 2
    for scores, weights in zip(recorder.scores, maps, strict=True):
        assert scores.shape == (2, 4, 7)
        torch.testing.assert_close(scores.softmax(-1), weights[:, :, -1])


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_outputs_and_queries_are_those_of_each_layer(family: str) -> None:
    model = built(family)
    ids = torch.randint(3, 20, (2, 5), generator=torch.Generator().manual_seed(1))
    seen: list[torch.Tensor] = []
    hooks = [m.register_forward_hook(lambda _, i, o: seen.append(o[0][:, -1])) for m in attention_modules(model)]
    with torch.no_grad(), recording(model) as recorder:
        model(input_ids=ids)
    for hook in hooks:
        hook.remove()
    for kept, output, queries in zip(recorder.outputs, seen, recorder.queries, strict=True):
        assert torch.equal(kept, output)
        assert queries.shape == (2, 5, 16)
    # keys are rotated, and so are queries, so unrotated ones do not give the scores; at the first place nothing turns
    with torch.no_grad(), recording(model) as recorder:
        model(input_ids=ids[:, :1])
    assert recorder.scores[0].shape == (2, 4, 1)
    assert not hasattr(attention_modules(model)[0], "recorder")


def test_a_pass_with_a_cache_sees_the_cached_keys() -> None:
    from transformers import DynamicCache

    model = built("llama")
    ids = torch.randint(3, 20, (1, 6), generator=torch.Generator().manual_seed(1))
    with torch.no_grad(), recording(model) as recorder:
        model(input_ids=ids)
        whole = [part.clone() for part in recorder.scores]
        cache = DynamicCache(config=model.config)
        name = "cache" if "cache" in inspect.signature(model.forward).parameters else "past_key_values"
        for part in (ids[:, :4], ids[:, 4:]):
            model(input_ids=part, use_cache=True, **{name: cache})
    for scores, expected in zip(recorder.scores, whole, strict=True):
        torch.testing.assert_close(scores, expected, atol=1e-5, rtol=1e-5)
    assert recorder.queries[0].shape == (1, 2, 16)


def test_a_model_without_attention_is_refused() -> None:
    with pytest.raises(InputError, match="no attention modules"), recording(torch.nn.Linear(2, 2)):
        pass
