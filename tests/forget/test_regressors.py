from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from palimpsest.core.errors import InputError
from palimpsest.core.watch import Watch
from palimpsest.forget.regressors import (
    RegressionBudget,
    Shuffled,
    attention_map,
    checked,
    evaluating,
    maps_of,
    renewed,
    shaped,
    task_loss,
    train,
)

QUIET = Watch(progress=False)


def samples(count: int = 40, seed: int = 0) -> tuple[Tensor, Tensor]:
    inputs = torch.from_numpy(np.random.default_rng(seed).normal(size=(count, 3))).float()
    return inputs, inputs @ torch.tensor([1.0, -2.0, 0.5])


def linear() -> nn.Module:
    return nn.Sequential(nn.Linear(3, 8), nn.ReLU(), nn.Linear(8, 1))


def test_training_fits_and_leaves_the_module_alone() -> None:
    model, data = renewed(linear()), samples()
    before = [p.clone() for p in model.parameters()]
    after = train(model, data, epochs=200, lr=1e-2, batch_size=16, watch=QUIET)
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), before, strict=True))
    with torch.no_grad():
        assert float((after(data[0]).squeeze(1) - data[1]).abs().mean()) < 0.2
    again = train(model, data, epochs=200, lr=1e-2, batch_size=16, watch=QUIET)
    assert all(torch.equal(p, q) for p, q in zip(after.parameters(), again.parameters(), strict=True))


def test_a_budget_is_adam_without_anything_else() -> None:
    model, (inputs, targets) = renewed(linear()), samples(8)
    tree = {"inputs": inputs, "targets": targets[:, None]}
    other = renewed(linear())
    found = RegressionBudget(epochs=3, lr=0.05, batch_size=8, loss="mse").fit("forget", model, tree, watch=QUIET)
    adam = torch.optim.Adam(other.parameters(), 0.05)
    for _ in range(3):  # one batch an epoch: its order changes the sum by rounding only
        adam.zero_grad()
        (other(inputs) - targets[:, None]).square().mean().backward()
        adam.step()
    for p, q in zip(found.parameters(), other.parameters(), strict=True):
        assert torch.allclose(p, q, atol=1e-5)
    assert not found.training


def test_fresh_weights_follow_the_seed_only() -> None:
    model = nn.Sequential(nn.Conv1d(2, 3, 3), nn.BatchNorm1d(3), nn.LSTM(4, 5), nn.Linear(5, 1))
    model[1].running_mean += 7.0
    torch.manual_seed(1)
    one = renewed(model, 4)
    torch.manual_seed(2)
    drawn = torch.rand(1)
    two, other = renewed(model, 4), renewed(model, 5)
    assert all(torch.equal(p, q) for p, q in zip(one.parameters(), two.parameters(), strict=True))
    assert not torch.equal(one[0].weight, other[0].weight)
    assert not one[1].running_mean.any(), "running statistics start anew"
    torch.manual_seed(2)
    assert torch.equal(torch.rand(1), drawn), "the global generator is left as it was"

    class Own(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.ones(2))

    with pytest.raises(InputError, match="0 has weights and no reset_parameters"):
        renewed(nn.Sequential(Own()))


def test_attention_maps_by_hand() -> None:
    activation = torch.tensor([[[[1.0, 2.0]], [[3.0, 0.0]]]])  # (1, 2, 1, 2)
    expected = torch.tensor([[5.0, 2.0]]) / 29**0.5  # (1 + 9) / 2 and (4 + 0) / 2, at length one
    assert torch.allclose(attention_map(activation, 1), expected)
    flat = attention_map(torch.tensor([[3.0, 0.0, -1.0]]), None)
    assert torch.allclose(flat, torch.tensor([[9.0, 0.0, 1.0]]) / 82**0.5)
    assert torch.isfinite(attention_map(torch.zeros(2, 3), None)).all()


@given(st.integers(0, 1000), st.floats(0.1, 50))
@settings(max_examples=20, deadline=None)
def test_a_map_does_not_see_how_strong_an_activation_is(seed: int, scale: float) -> None:
    activation = torch.randn(2, 3, 4, generator=torch.Generator().manual_seed(seed))
    assert torch.allclose(attention_map(scale * activation, -1), attention_map(activation, -1), atol=1e-5)


@pytest.mark.parametrize(
    ("module", "shape", "positions"),
    [
        (nn.Conv2d(1, 4, 3, padding=1), (2, 1, 5, 6), 30),
        (nn.Conv1d(3, 4, 1), (2, 3, 7), 7),
        (nn.LSTM(3, 4, batch_first=True), (2, 7, 3), 7),
        (nn.Linear(3, 4), (2, 3), 4),
    ],
)
def test_positions_of_each_kind_of_layer(module: nn.Module, shape: tuple[int, ...], positions: int) -> None:
    model = nn.Sequential(module)
    with maps_of(model, ["0"]) as found:
        model(torch.randn(shape))
    assert found["0"].shape == (2, positions)
    assert torch.allclose(found["0"].norm(dim=1), torch.ones(2), atol=1e-6)
    assert not module._forward_hooks


def test_batches_are_a_function_of_the_step_and_an_epoch_is_everything() -> None:
    batches = Shuffled({"inputs": torch.arange(10), "other": torch.arange(10) * 2}, 4, 0)
    assert batches.steps_per_epoch == 3
    epochs = [torch.cat([batches(step)["inputs"] for step in range(3 * n, 3 * n + 3)]) for n in range(2)]
    assert all(sorted(epoch.tolist()) == list(range(10)) for epoch in epochs)
    assert not torch.equal(*epochs)
    assert torch.equal(batches(5)["inputs"], batches(5)["inputs"])
    assert torch.equal(batches(5)["other"], 2 * batches(5)["inputs"])


def test_losses_by_hand_and_shapes_that_would_compare_all_pairs() -> None:
    answers, targets = torch.tensor([[1.0], [3.0]]), torch.tensor([[0.0], [5.0]])
    assert task_loss(answers, targets, "l1") == 1.5
    assert task_loss(answers, targets, "mse") == 2.5
    with pytest.raises(InputError, match=r"shape \(2, 1\) for targets of shape \(2,\)"):
        task_loss(answers, targets[:, 0], "l1")


def test_targets_take_the_shape_of_the_answers() -> None:
    inputs, targets = samples()
    forget, retain = checked(linear(), (inputs[:10], targets[:10]), (inputs[10:], targets[10:, None]))
    assert forget[1].shape == (10, 1)
    assert retain[1].shape == (30, 1)


def test_evaluation_gives_every_module_its_mode_back() -> None:
    model = nn.Sequential(nn.BatchNorm1d(3), nn.Dropout(0.5), nn.Linear(3, 1))
    model.train()
    model[0].eval()
    with evaluating(model):
        assert not any(module.training for module in model.modules())
        assert torch.equal(model(torch.ones(2, 3)), model(torch.ones(2, 3)))
    assert [module.training for module in model.modules()] == [True, False, True, True]


def test_bad_samples() -> None:
    inputs, targets = samples()
    bad: list[tuple[Any, str]] = [
        ((inputs[:0], targets[:0]), "0 inputs and 0 targets"),
        ((inputs, targets[:3]), "40 inputs and 3 targets"),
        ((inputs, targets.long()), "finite floating-point"),
        ((inputs, targets / 0), "finite floating-point"),
        ((inputs, torch.ones(40, 2)), r"shape \(2,\) a sample for answers of shape \(1,\)"),
    ]
    for one, message in bad:
        with pytest.raises(InputError, match=message):
            shaped(linear(), one, "forget")
    with pytest.raises(InputError, match="20 samples must go and 20 stay"):
        checked(linear(), (inputs[:20], targets[:20]), (inputs[20:], targets[20:]))
    with pytest.raises(InputError, match="lr must be above 0"):
        RegressionBudget(lr=0.0)
