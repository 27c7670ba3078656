"""Tiny models of each family: untrained, but with large weights, so that every token and position matters."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from palimpsest.models.lm import LM

QWEN2 = {
    "model_type": "qwen2",
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "tie_word_embeddings": False,
}
FAMILIES: dict[str, Any] = {"llama": "llama-tiny", "gpt2": "gpt2-tiny", "qwen3": "qwen-tiny", "qwen2": QWEN2}
TEXTS = [
    f"Person {i} is called {chr(65 + i % 26)}nna, lives in town {i % 7} and keeps {i % 5} dogs." for i in range(60)
]


def build(family: str, *, max_length: int = 96, seed: int = 3) -> LM:
    lm = LM.build(TEXTS, FAMILIES[family], vocab_size=320, max_length=max_length, seed=seed)
    with torch.no_grad():
        for parameter in lm.model.parameters():
            if parameter.ndim == 2:
                parameter.mul_(8)
    return lm


@pytest.fixture(scope="session")
def texts() -> list[str]:
    return TEXTS


@pytest.fixture(scope="session")
def new_lm() -> Callable[..., LM]:
    """Builds a model that the test may change: ``new_lm("gpt2")``."""
    return build


@pytest.fixture(scope="package", params=sorted(FAMILIES))
def lm(request: pytest.FixtureRequest) -> LM:
    """One of the four families; not to be changed by a test."""
    return build(request.param)


@pytest.fixture(scope="package")
def llama() -> LM:
    return build("llama")
