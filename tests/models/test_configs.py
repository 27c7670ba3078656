from __future__ import annotations

import pytest
from transformers import AutoModelForCausalLM, LlamaConfig

from palimpsest.core.errors import InputError
from palimpsest.models.configs import NAMES, config

COMMON = {"vocab_size": 1024, "max_length": 128}
EXPECTED = {"tiny": 0.2e6, "mini": 1e6, "small": 5e6}


@pytest.mark.parametrize("name", NAMES)
def test_named_configs_have_their_size(name: str) -> None:
    found = config(name, **COMMON)
    model = AutoModelForCausalLM.from_config(found)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    assert 0.7 < parameters / EXPECTED[name.split("-")[-1]] < 1.3
    assert model.get_input_embeddings().weight is model.get_output_embeddings().weight
    assert (found.pad_token_id, found.bos_token_id, found.eos_token_id) == (0, 1, 2)
    assert (found.vocab_size, found.max_position_embeddings) == (1024, 128)


def test_a_config_or_its_fields() -> None:
    given = LlamaConfig(hidden_size=16, num_attention_heads=2, max_position_embeddings=77, vocab_size=9)
    copied = config(given, **COMMON)
    assert (copied.hidden_size, copied.vocab_size, copied.max_position_embeddings) == (16, 1024, 77)
    assert given.vocab_size == 9
    written = config({"model_type": "qwen3", "hidden_size": 16}, **COMMON)
    assert (written.model_type, written.hidden_size, written.max_position_embeddings) == ("qwen3", 16, 128)


def test_bad_input() -> None:
    with pytest.raises(InputError, match="unknown model config 'lama-tiny': did you mean llama-tiny"):
        config("lama-tiny", **COMMON)
    with pytest.raises(InputError, match="model_type"):
        config({"hidden_size": 16}, **COMMON)
    with pytest.raises(InputError, match="not a model config"):
        config({"model_type": "no-such-model"}, **COMMON)
