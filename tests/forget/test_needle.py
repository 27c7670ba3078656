"""Needle: exactly the chosen vectors change, by the noise that was drawn, and ascent stays on them."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from palimpsest.core.errors import InputError
from palimpsest.core.watch import Watch
from palimpsest.data.request import ForgetRequest
from palimpsest.data.world import World
from palimpsest.forget import Needle
from palimpsest.forget.needle import only
from palimpsest.models.concept_vectors import noise, projections, vectors_at
from palimpsest.models.lm import LM

PLACES = ((0, 3), (1, 7), (1, 0))


def rows(lm: LM) -> list[np.ndarray]:
    """(F, D) a layer, by the names that each architecture gives its matrices."""
    if hasattr(lm.model, "transformer"):
        return [block.mlp.c_proj.weight.detach().numpy().copy() for block in lm.model.transformer.h]
    return [block.mlp.down_proj.weight.detach().numpy().T.copy() for block in lm.model.model.layers]


def changed(before: LM, after: LM) -> tuple[set[tuple[int, int]], set[str]]:
    """The value vectors that differ, and the parameters that differ."""
    places = {
        (layer, int(neuron))
        for layer, (old, new) in enumerate(zip(rows(before), rows(after), strict=True))
        for neuron in np.flatnonzero((old != new).any(1))
    }
    old = dict(before.model.named_parameters())
    return places, {name for name, p in after.model.named_parameters() if not torch.equal(p, old[name])}


@pytest.mark.parametrize("steps", [0, 3])
def test_only_the_targets_change(lm: LM, asked: ForgetRequest, watch: Watch, steps: int) -> None:
    after = Needle(targets=PLACES, steps=steps, lr=0.01, batch_size=8, strength=2.0)(lm, asked, watch=watch)
    places, names = changed(lm, after)
    assert places == set(PLACES)
    assert len(names) == 2
    moved = vectors_at(after.model, PLACES) - vectors_at(lm.model, PLACES)
    drawn = noise(vectors_at(lm.model, PLACES), PLACES, 2.0, 0)
    if steps:
        assert watch.traces["needle"].steps == 3
        # AdamW moves an element by about the rate a step
        assert 0 < float((moved - drawn).abs().max()) < 0.05
    else:
        np.testing.assert_allclose(moved.double(), drawn.double(), atol=1e-6)
    assert all(p.requires_grad and p.grad is None for p in after.model.parameters())


def test_ascent_alone_raises_the_loss(taught: LM, asked: ForgetRequest, watch: Watch) -> None:
    method = Needle(targets=((0, 1), (0, 2), (1, 1), (1, 2)), strength=0.0, steps=20, lr=0.05)
    after = method(taught, asked, watch=watch)
    assert after.nll(asked.forget).mean() > taught.nll(asked.forget).mean()
    assert changed(taught, after)[0] == set(method.targets)


def test_the_gradient_outside_the_places_is_zero(lm: LM, asked: ForgetRequest) -> None:
    model = lm.copy().model
    batch = torch.as_tensor(lm.encode(asked.forget).ids[0])[None]
    with only(model, PLACES):
        assert sum(p.requires_grad for p in model.parameters()) == 2
        model(input_ids=batch, labels=batch).loss.backward()
        for layer, projection in enumerate(projections(model)):
            gradient: Any = projection.weight.grad
            gradient = gradient if hasattr(model, "transformer") else gradient.T
            touched = set(gradient.abs().sum(1).nonzero().flatten().tolist())
            assert touched == {neuron for number, neuron in PLACES if number == layer}
    assert all(p.requires_grad and p.grad is None for p in model.parameters())


def test_it_looks_for_the_vectors_of_each_concept(taught: LM, world: World, asked: ForgetRequest) -> None:
    people = set(asked.forget["person"])
    assert len(people) == 2
    method = Needle(vectors=3)
    found = method.look(taught, asked)
    assert len(found) <= 6
    after = method(taught, asked)
    assert changed(taught, after)[0] == set(found)
    again = Needle(targets=tuple(found))(taught, asked)
    assert again.sha256 == after.sha256


def test_bfloat16_stays(llama: LM, asked: ForgetRequest) -> None:
    half = llama.copy()
    half.model.to(torch.bfloat16)
    after = Needle(targets=PLACES)(half, asked)
    assert {p.dtype for p in after.model.parameters()} == {torch.bfloat16}
    moved = vectors_at(after.model, PLACES) != vectors_at(half.model, PLACES)
    assert moved.any(1).all()
    elsewhere = [(0, 0), (1, 1)]
    assert torch.equal(vectors_at(after.model, elsewhere), vectors_at(half.model, elsewhere))


def test_bad_input(llama: LM, asked: ForgetRequest) -> None:
    with pytest.raises(InputError, match="no value vector 99 in layer 5"):
        Needle(targets=((5, 99),))(llama, asked)
    with pytest.raises(InputError, match="change nothing"):
        Needle(strength=0.0)
    with pytest.raises(InputError, match="shares"):
        Needle(keep=1.5)
    with pytest.raises(InputError, match="vectors must be above 0"):
        Needle(vectors=0)
    one = asked.forget.filter(lambda row: row["person"] == asked.forget["person"][0])
    with pytest.raises(InputError, match="needs retain records"):
        Needle()(llama, ForgetRequest(one))
    with pytest.raises(InputError, match="no value vector writes the words of"):
        Needle(clarity=1.0)(llama, replace(asked, utility=None))
