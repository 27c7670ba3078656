"""Stacked training against one model at a time."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from palimpsest.core import many as many_module
from palimpsest.core.errors import InputError, TrainingDiverged
from palimpsest.core.many import Many, _draw, _seeds, cross_entropy, predict_many, train_many
from palimpsest.core.recipe import learning_rate
from palimpsest.core.seeds import numpy_rng, seed_everything

N, M = 40, 5


def data(dtype: torch.dtype) -> dict[str, torch.Tensor]:
    x = torch.randn(N, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64).to(dtype)
    return {"x": x, "y": (x.sum(1) > 0).long()}


def masks() -> np.ndarray:
    chosen = np.random.default_rng(1).random((M, N)) < 0.5
    chosen[0] = False
    chosen[0, :3] = True  # fewer rows than a batch
    return chosen


def mlp(dtype: torch.dtype = torch.float32) -> nn.Sequential:
    return nn.Sequential(nn.Linear(3, 6), nn.Tanh(), nn.LayerNorm(6), nn.Linear(6, 2)).to(dtype)


def by_torch(model, batch) -> torch.Tensor:
    return nn.functional.cross_entropy(model(batch["x"]), batch["y"])


SETTINGS = {"steps": 80, "lr": 0.02, "batch_size": 8, "warmup": 3, "schedule": "cosine", "weight_decay": 0.1}


def one_at_a_time(dtype: torch.dtype, optimizer: str) -> list[dict[str, torch.Tensor]]:
    """The models of `train_many`, each in a loop of its own with the plain optimiser of torch."""
    states = []
    rows_of = [np.flatnonzero(mask) for mask in masks()]
    for rows, seed in zip(rows_of, _seeds(0, M), strict=True):
        seed_everything(seed, "init")
        model = mlp(dtype)
        if optimizer == "adamw":
            rule = torch.optim.AdamW(model.parameters(), weight_decay=0.1, foreach=False)
        else:
            rule = torch.optim.SGD(model.parameters(), lr=1.0, momentum=0.9, weight_decay=0.1, foreach=False)
        drawn = _draw([rows], [seed], 0, SETTINGS["steps"], SETTINGS["batch_size"])[:, 0]
        for step, batch in enumerate(drawn):
            rule.param_groups[0]["lr"] = learning_rate(step, steps=80, lr=0.02, warmup=3, schedule="cosine")
            rule.zero_grad()
            by_torch(model, {name: value[batch] for name, value in data(dtype).items()}).backward()
            rule.step()
        states.append(model.state_dict())
    return states


@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-11), (torch.float32, 2e-4)])
def test_equals_one_model_at_a_time(dtype, tolerance, optimizer):
    momentum = {"momentum": 0.9} if optimizer == "sgd" else {}
    found = train_many(lambda: mlp(dtype), by_torch, data(dtype), masks(), optimizer=optimizer, **SETTINGS, **momentum)
    assert len(found) == M
    for index, state in enumerate(one_at_a_time(dtype, optimizer)):
        for name, value in state.items():
            torch.testing.assert_close(found.state(index)[name], value, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("chunk", [1, 2, 3, None])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-5)])
def test_chunks_do_not_change_the_result(dtype, tolerance, chunk):
    settings = {**SETTINGS, "steps": 30}
    together = train_many(lambda: mlp(dtype), by_torch, data(dtype), torch.from_numpy(masks()), chunk=M, **settings)
    apart = train_many(lambda: mlp(dtype), by_torch, data(dtype), masks(), chunk=chunk, **settings)
    for name, value in together.parameters.items():
        torch.testing.assert_close(apart.parameters[name], value, rtol=tolerance, atol=tolerance)


def test_a_small_memory_means_small_chunks(monkeypatch):
    monkeypatch.setattr(many_module, "MEMORY", 1)
    sizes = []
    monkeypatch.setattr(
        many_module, "vmap", lambda f: lambda p, b: sizes.append(len(b["x"])) or torch.func.vmap(f)(p, b)
    )
    train_many(mlp, by_torch, data(torch.float32), masks(), **{**SETTINGS, "steps": 2, "warmup": 0})
    assert sizes == [1] * M * 2


def test_equal_seeds_and_rows_give_equal_models_and_other_seeds_others():
    same_rows = np.repeat(masks()[1:2], 3, axis=0)
    found = train_many(mlp, by_torch, data(torch.float32), same_rows, seed=[7, 7, 8], **SETTINGS)
    weight = found.parameters["0.weight"]
    assert torch.equal(weight[0], weight[1])
    assert not torch.equal(weight[0], weight[2])


def test_batches_are_epochs_of_the_models_own_rows():
    rows = np.array([3, 5, 8, 13, 21])
    drawn = _draw([rows], [4], 0, 10, 3)[:, 0].flatten().numpy()
    for epoch in drawn.reshape(6, 5):
        assert sorted(epoch) == rows.tolist()
    later = _draw([rows], [4], 7, 10, 3)[:, 0].flatten().numpy()
    assert (later == drawn[21:]).all()


def test_predictions_are_those_of_the_models_one_by_one():
    found = train_many(mlp, by_torch, data(torch.float32), masks(), **SETTINGS)
    outputs = predict_many(found, data(torch.float32)["x"], rows_at_once=7)
    assert outputs.shape == (M, N, 2)
    for index in range(M):
        model = mlp()
        model.load_state_dict(found.state(index))
        torch.testing.assert_close(outputs[index], model(data(torch.float32)["x"]).detach(), rtol=1e-5, atol=1e-6)


def test_it_learns_and_frozen_parameters_stay():
    def init() -> nn.Module:
        model = mlp()
        model[0].requires_grad_(False)
        return model

    found: Many = train_many(init, by_torch, data(torch.float32), masks(), **SETTINGS)
    assert (found.losses[:, -10:].mean(1) < 0.7 * found.losses[:, 0]).all()
    seed_everything(_seeds(0, M)[2], "init")
    assert torch.equal(found.state(2)["0.weight"], mlp()[0].weight)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"masks": masks().astype(int)}, "bool array"),
        ({"masks": masks()[:, :-1]}, r"masks have 39 rows, the data \[40\]"),
        ({"masks": np.zeros((2, N), dtype=bool)}, r"masks of 2 models \(first: 0\)"),
        ({"masks": np.zeros((0, N), dtype=bool)}, "no model"),
        ({"seed": [1, 2]}, "2 seeds for 5 models"),
        ({"optimizer": "adam"}, "did you mean adamw"),
        ({"batch_size": 0}, "batch_size"),
        ({"lr": -1.0}, "lr=-1.0"),
        ({"init": lambda: nn.BatchNorm1d(3)}, "running statistics"),
        ({"init": lambda: mlp().requires_grad_(False)}, "no trainable parameter"),
    ],
)
def test_bad_arguments(wrong, message):
    arguments = {"init": mlp, "masks": masks(), **SETTINGS, **wrong}
    with pytest.raises(InputError, match=message):
        train_many(loss=by_torch, data=data(torch.float32), **arguments)


def test_divergence_names_the_model():
    broken = data(torch.float32)
    broken["x"][0] = float("inf")
    chosen = np.zeros((3, N), dtype=bool)
    chosen[:, 1:9] = True
    chosen[2, 0] = True
    with pytest.raises(TrainingDiverged, match="the loss of model 2 is nan"):
        train_many(mlp, by_torch, broken, chosen, chunk=2, **SETTINGS)


@pytest.mark.parametrize("scale", [1.0, 1e3])
def test_the_cross_entropy_for_stacks_is_that_of_torch(scale):
    logits = torch.from_numpy(numpy_rng(0).normal(scale=scale, size=(12, 5))).requires_grad_()
    labels = torch.arange(12) % 5
    ours = torch.autograd.grad(cross_entropy(logits, labels), logits)[0]
    theirs = torch.autograd.grad(nn.functional.cross_entropy(logits, labels), logits)[0]
    torch.testing.assert_close(cross_entropy(logits, labels), nn.functional.cross_entropy(logits, labels))
    torch.testing.assert_close(ours, theirs)
    assert torch.func.vmap(cross_entropy, in_dims=(0, None))(torch.stack([logits, 2 * logits]), labels).shape == (2,)
