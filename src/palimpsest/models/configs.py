"""Small configurations of the common decoder families, by name: ``llama-tiny``, ``gpt2-mini``, ``mixtral-tiny``, ...

| size  | width | layers | heads | parameters (vocabulary of 1024) |
|-------|-------|--------|-------|---------------------------------|
| tiny  |    64 |      2 |     4 | about 0.2 million               |
| mini  |   128 |      4 |     4 | about 1 million                 |
| small |   256 |      6 |     8 | about 5 million                 |

`llama` is the plain rotary, RMS-norm, gated form; `gpt2` has learned positions, layer norms and biases (dropout is off:
runs at this scale are compared token by token); `qwen` is Qwen3 with query/key norms and two query heads a key head.
`mixtral` and `qwen-moe` (Qwen2-MoE, with an expert that all tokens share) send each token to 2 of 8 experts.
Embeddings are tied: at these sizes a second table would be a good part of the model.  Weights start wider than the
customary 0.02, which is made for thousands of units: llama-tiny answered 97% instead of 47% of the fictional world's
held-out questions after the same 900 steps (one seed; gpt2-tiny 66% instead of 36%).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from palimpsest.core.errors import InputError, unknown
from palimpsest.models.tokenizers import BOS, EOS, PAD, SPECIAL

if TYPE_CHECKING:
    from transformers import PretrainedConfig


@dataclass(frozen=True)
class Size:
    width: int
    layers: int
    heads: int

    @property
    def initializer_range(self) -> float:
        """Standard deviation of the first weights."""
        return 0.5 / self.width**0.5

    @property
    def gated_width(self) -> int:
        """Of a gated feed-forward layer: 8/3 of the width, as Llama has it, rounded up to a multiple of 8."""
        return -(-self.width // 3) * 8

    @property
    def expert_width(self) -> int:
        """Of one of `EXPERTS`: together they are a little larger than the one feed-forward layer of a dense model."""
        return self.width * 3 // 8


EXPERTS, EXPERTS_A_TOKEN = 8, 2
SIZES = {"tiny": Size(64, 2, 4), "mini": Size(128, 4, 4), "small": Size(256, 6, 8)}


def llama(size: Size, **common: Any) -> PretrainedConfig:
    from transformers import LlamaConfig

    return LlamaConfig(
        hidden_size=size.width,
        intermediate_size=size.gated_width,
        num_hidden_layers=size.layers,
        num_attention_heads=size.heads,
        initializer_range=size.initializer_range,
        num_key_value_heads=size.heads,
        **common,
    )


def gpt2(size: Size, **common: Any) -> PretrainedConfig:
    from transformers import GPT2Config

    common["n_positions"] = common.pop("max_position_embeddings")
    return GPT2Config(
        n_embd=size.width,
        n_layer=size.layers,
        n_head=size.heads,
        initializer_range=size.initializer_range,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        **common,
    )


def qwen(size: Size, **common: Any) -> PretrainedConfig:
    from transformers import Qwen3Config

    return Qwen3Config(
        hidden_size=size.width,
        intermediate_size=size.gated_width,
        num_hidden_layers=size.layers,
        num_attention_heads=size.heads,
        initializer_range=size.initializer_range,
        num_key_value_heads=size.heads // 2,
        head_dim=size.width // size.heads,
        **common,
    )


def mixtral(size: Size, **common: Any) -> PretrainedConfig:
    from transformers import MixtralConfig

    return MixtralConfig(
        hidden_size=size.width,
        intermediate_size=size.expert_width,
        num_hidden_layers=size.layers,
        num_attention_heads=size.heads,
        initializer_range=size.initializer_range,
        num_key_value_heads=size.heads,
        num_local_experts=EXPERTS,
        num_experts_per_tok=EXPERTS_A_TOKEN,
        **common,
    )


def qwen_moe(size: Size, **common: Any) -> PretrainedConfig:
    from transformers import Qwen2MoeConfig

    return Qwen2MoeConfig(
        hidden_size=size.width,
        moe_intermediate_size=size.expert_width,
        shared_expert_intermediate_size=size.expert_width,
        num_hidden_layers=size.layers,
        num_attention_heads=size.heads,
        initializer_range=size.initializer_range,
        num_key_value_heads=size.heads,
        num_experts=EXPERTS,
        num_experts_per_tok=EXPERTS_A_TOKEN,
        **common,
    )


FAMILIES: dict[str, Callable[..., PretrainedConfig]] = {
    "llama": llama,
    "gpt2": gpt2,
    "qwen": qwen,
    "mixtral": mixtral,
    "qwen-moe": qwen_moe,
}
NAMES = tuple(f"{family}-{size}" for family in FAMILIES for size in SIZES)


def config(wanted: str | dict[str, Any] | PretrainedConfig, *, vocab_size: int, max_length: int) -> PretrainedConfig:
    """The transformers config called `wanted`, for a vocabulary and a context of `max_length` tokens.

    `wanted` may also be a transformers config, or a dict with ``model_type`` and any of that config's fields: it is
    copied, and keeps its own context length where it names one.  Special tokens are those of models/tokenizers.py.
    `InputError` for an unknown name, or a dict that no config class accepts.
    """
    from transformers import AutoConfig, PretrainedConfig

    ids = {"pad_token_id": SPECIAL.index(PAD), "bos_token_id": SPECIAL.index(BOS), "eos_token_id": SPECIAL.index(EOS)}
    special = {"vocab_size": vocab_size, **ids}
    if isinstance(wanted, str):
        if wanted not in NAMES:
            raise unknown("model config", wanted, NAMES)
        family, _, size = wanted.rpartition("-")
        return FAMILIES[family](SIZES[size], max_position_embeddings=max_length, tie_word_embeddings=True, **special)
    fields = wanted.to_dict() if isinstance(wanted, PretrainedConfig) else dict(wanted)
    if "model_type" not in fields:
        raise InputError("a config given as a dict needs 'model_type' (llama, gpt2, qwen3, ...)")
    if not {"max_position_embeddings", "n_positions"} & fields.keys():
        fields["max_position_embeddings"] = max_length
    try:
        return AutoConfig.for_model(**{**fields, **special})
    except (ValueError, TypeError) as error:
        raise InputError(f"not a model config: {str(error).splitlines()[0]}") from error
