"""What the benchmarks of datamodels share: digits of scikit-learn, a small network, and its recipe by hand."""

from __future__ import annotations

from functools import cache

import numpy as np
import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn

TRAIN, QUERIES, BATCH = 900, 200, 32
SGD = {"lr": 0.05, "momentum": 0.9, "weight_decay": 5e-4}


@cache
def digits() -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """(inputs, labels) to train on, and to ask about."""
    x, y = load_digits(return_X_y=True)
    order = np.random.default_rng(0).permutation(len(x))
    inputs, labels = torch.tensor(x[order] / 16, dtype=torch.float32), torch.tensor(y[order])
    asked = slice(TRAIN, TRAIN + QUERIES)
    return (inputs[:TRAIN], labels[:TRAIN]), (inputs[asked], labels[asked])


def network() -> nn.Module:
    return nn.Sequential(nn.Linear(64, 48), nn.ReLU(), nn.Linear(48, 10))


def loss(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    return nn.functional.cross_entropy(model(batch[0]), batch[1])


def trained_by_hand(seed: int, mask: np.ndarray, steps: int) -> nn.Module:
    """One network on its rows, as one would write it."""
    torch.manual_seed(seed)
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), **SGD)
    (inputs, labels), _ = digits()
    rows = torch.from_numpy(np.flatnonzero(mask))
    order = torch.cat([rows[torch.randperm(len(rows))] for _ in range(-(-steps * BATCH // len(rows)))])
    for step in range(steps):
        picked = order[step * BATCH : (step + 1) * BATCH]
        value = loss(model, (inputs[picked], labels[picked]))
        optimizer.zero_grad()
        value.backward()
        optimizer.step()
    return model
