"""Projected gradients against gradients taken row by row and multiplied by the projection written out."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from palimpsest.core.errors import InputError
from palimpsest.core.gradients import _Look, linear_layers, projected_gradients

Q, SEED = 7, 3


class Residual(nn.Module):
    """Writes into what its layers gave, uses them twice, and sees positions."""

    def __init__(self) -> None:
        super().__init__()
        self.up = Conv1D(6, 4)
        self.down = nn.Linear(6, 4, bias=False)
        self.relu = nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        for _ in range(2):
            change = self.down(self.relu(self.up(x)))
            change += x
            x = change
        return x.sum(1)


def dense() -> nn.Module:
    return nn.Sequential(nn.Linear(5, 8), nn.ReLU(inplace=True), nn.Dropout(0.5), nn.Linear(8, 3))


def convolutional() -> nn.Module:
    first = nn.Conv2d(2, 4, 3, stride=2, padding=1)
    return nn.Sequential(first, nn.ReLU(inplace=True), nn.Conv2d(4, 3, 2, bias=False), nn.Flatten(), nn.Linear(12, 3))


CASES = {"dense": (dense, (5,)), "convolutional": (convolutional, (2, 6, 6)), "residual": (Residual, (3, 4))}


def written_out(model: nn.Module, name: str, layer: Any) -> Tensor:
    """(Q, weights and biases of a layer): the projection as a matrix."""
    look = _Look(name, layer, Q, SEED)
    u, v = look.u_DQ.double(), look.v_DQ.double()
    rows = []
    for k in range(Q):
        taken = u[:-1, k] if look.has_bias else u[:, k]
        matrix = torch.outer(taken, v[:, k]) if isinstance(layer, Conv1D) else torch.outer(v[:, k], taken)
        rows.append(torch.cat([matrix.flatten(), v[:, k] * u[-1, k] if look.has_bias else torch.empty(0)]))
    return torch.stack(rows) / Q**0.5


@pytest.mark.parametrize("case", CASES)
def test_they_are_the_projections_of_each_rows_gradient(case: str) -> None:
    torch.manual_seed(0)
    make, shape = CASES[case]
    model = make()
    x = torch.randn(5, *shape)

    def score(model: nn.Module, rows: Tensor) -> Tensor:
        return model(rows)[:, :2].tanh()

    values, found = projected_gradients(model, score, [x[:2], x[2:]], Q, seed=SEED)
    assert found.shape == (5, 2, Q)
    exact = make().double()
    exact.load_state_dict(model.state_dict())
    exact.eval()
    torch.testing.assert_close(values.double(), score(exact, x.double()), rtol=1e-5, atol=1e-6)
    for row in range(5):
        for column in range(2):
            exact.zero_grad()
            score(exact, x[row : row + 1].double())[0, column].backward()
            wanted = torch.zeros(Q, dtype=torch.float64)
            for name, layer in linear_layers(exact).items():
                parts = [p.grad.flatten() for p in (layer.weight, layer.bias) if p is not None]  # type: ignore[union-attr]
                wanted += written_out(exact, name, layer) @ torch.cat(parts)
            torch.testing.assert_close(found[row, column].double(), wanted, rtol=1e-4, atol=1e-5)


def test_inner_products_are_kept() -> None:
    torch.manual_seed(0)
    model, x = dense().eval(), torch.randn(6, 5)
    _, found = projected_gradients(model, lambda m, rows: m(rows)[:, 0], [x], 20_000)
    gradients = []
    for row in x:
        model.zero_grad()
        model(row[None])[0, 0].backward()
        gradients.append(torch.cat([p.grad.flatten() for p in model.parameters()]))  # type: ignore[union-attr]
    exact = torch.stack(gradients) @ torch.stack(gradients).T
    lengths = exact.diagonal().sqrt()
    assert ((found @ found.T - exact).abs() / lengths[:, None] / lengths).max() < 0.05


def test_the_model_is_left_as_it_was_and_may_be_frozen() -> None:
    torch.manual_seed(0)
    model, x = dense(), torch.randn(4, 5)
    model[2].eval()
    modes = [module.training for module in model.modules()]
    trained = projected_gradients(model, lambda m, rows: m(rows)[:, 0], [x], Q)
    frozen = projected_gradients(model.requires_grad_(False), lambda m, rows: m(rows)[:, 0], [x], Q)
    torch.testing.assert_close(frozen, trained)
    assert [module.training for module in model.modules()] == modes
    assert not any(module._forward_hooks for module in model.modules())
    assert all(p.grad is None for p in model.parameters())


def test_seed_and_name_decide_the_projection() -> None:
    torch.manual_seed(0)
    model, x = dense(), torch.randn(4, 5)
    first, again, other = (
        projected_gradients(model, lambda m, rows: m(rows)[:, 0], [x], Q, seed=seed)[1] for seed in (0, 0, 1)
    )
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_what_cannot_be_projected_is_refused() -> None:
    x = torch.randn(4, 5)
    with pytest.raises(InputError, match="LayerNorm has no linear layer"):
        projected_gradients(nn.LayerNorm(5), lambda m, rows: m(rows).sum(1), [x], Q)
    with pytest.raises(InputError, match="at least 1 dimension, not 0"):
        projected_gradients(nn.Linear(5, 1), lambda m, rows: m(rows)[:, 0], [x], 0)
    with pytest.raises(InputError, match="layer 1 sees 4 rows where the batch has 2"):
        projected_gradients(
            nn.Sequential(nn.Identity(), nn.Linear(5, 1)), lambda m, rows: m(rows).reshape(2, 2).sum(1), [x], Q
        )
