"""A tiny world and untrained models of three families that read it (d = 32), for the methods to work on."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from palimpsest.core.watch import Watch
from palimpsest.data.records import select_questions
from palimpsest.data.request import ForgetRequest
from palimpsest.data.world import World
from palimpsest.models.lm import LM
from palimpsest.models.train import Recipe, train

COMMON = {"num_hidden_layers": 2, "num_attention_heads": 4, "hidden_size": 32, "tie_word_embeddings": True}
CONFIGS = {
    "llama": {"model_type": "llama", "intermediate_size": 48, **COMMON},
    "gpt2": {"model_type": "gpt2", "resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
    | {"n_embd": 32, "n_layer": 2, "n_head": 4},
    "qwen": {"model_type": "qwen3", "intermediate_size": 48, "num_key_value_heads": 2, "head_dim": 8, **COMMON},
}


def make(family: str, world: World) -> LM:
    """Untrained, but with large enough matrices that every token and position matters."""
    lm = LM.build(world.train, CONFIGS[family], vocab_size=300, max_length=256, seed=3)
    with torch.no_grad():
        for parameter in lm.model.parameters():
            if parameter.ndim == 2:
                parameter.mul_(4)
    return lm


@pytest.fixture(scope="session")
def world() -> World:
    return World(people=10, facts=4, seed=1)


@pytest.fixture(scope="session")
def llama(world: World) -> LM:
    return make("llama", world)


@pytest.fixture(scope="session", params=sorted(CONFIGS))
def lm(request: pytest.FixtureRequest, world: World) -> LM:
    """One model of each family; not to be changed by a test."""
    return make(request.param, world)


@pytest.fixture(scope="session")
def records(world: World) -> ForgetRequest:
    """Documents and questions of two people to forget, with all other sets."""
    return world.request()


@pytest.fixture(scope="session")
def asked(records: ForgetRequest) -> ForgetRequest:
    """The same with questions alone among the forget records."""
    return replace(records, forget=select_questions(records.forget))


@pytest.fixture(scope="session")
def taught(llama: LM, world: World) -> LM:
    """The Llama model after reading the world: it has something to forget."""
    return train(llama, world.train, Recipe(steps=200, lr=1e-2, batch_size=16), watch=Watch(progress=False))


@pytest.fixture
def watch() -> Watch:
    """A silent watch, whose traces a test can read."""
    return Watch(progress=False)
