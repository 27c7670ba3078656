"""Datamodels end to end: subset models trained at once predict held-out subsets; LDS against scipy."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy.stats import spearmanr
from sklearn.datasets import load_digits
from torch import Tensor, nn

from palimpsest.audit.datamodels import draw_subsets, lds, margins, regression, subset_outputs, trak_of
from palimpsest.core.errors import InputError
from palimpsest.core.many import train_many

TRAINING = {"steps": 60, "lr": 0.1, "batch_size": 20, "optimizer": "sgd", "momentum": 0.9}
ROWS, QUERIES = 60, 15


def data() -> tuple[Tensor, Tensor]:
    x, y = load_digits(n_class=3, return_X_y=True)
    order = np.random.default_rng(0).permutation(len(x))[: ROWS + QUERIES]
    return torch.tensor(x[order] / 16, dtype=torch.float32), torch.tensor(y[order])


def make() -> nn.Module:
    return nn.Sequential(nn.Linear(64, 8), nn.ReLU(), nn.Linear(8, 3))


def loss(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    return nn.functional.cross_entropy(model(batch[0]), batch[1])


def outputs(masks: np.ndarray, seed: int) -> Tensor:
    x, y = data()
    logits = subset_outputs(make, loss, (x[:ROWS], y[:ROWS]), masks, x[ROWS:], seed=seed, **TRAINING)
    return margins(logits, y[ROWS:])


def test_both_estimators_predict_held_out_subsets() -> None:
    x, y = data()
    masks, held = draw_subsets(ROWS, 250, seed=0), draw_subsets(ROWS, 60, seed=1)
    observed = outputs(held, 2)
    datamodel = regression(masks, outputs(masks, 1))
    assert lds(datamodel.predict(held), observed).mean() > 0.45
    full = train_many(make, loss, (x[:ROWS], y[:ROWS]), np.ones((4, ROWS), bool), seed=9, **TRAINING)  # type: ignore[arg-type]
    models = [make() for _ in range(4)]
    for number, model in enumerate(models):
        model.load_state_dict(full.state(number))
    found = trak_of(
        models,
        lambda model, batch: margins(model(batch[0]), batch[1]),
        [(x[:40], y[:40]), (x[40:ROWS], y[40:ROWS])],
        [(x[ROWS:], y[ROWS:])],
        dimension=128,
    )
    assert found.effects.shape == (ROWS, QUERIES)
    assert lds(found.predict(held), observed).mean() > 0.3
    shuffled = found.effects[torch.randperm(ROWS, generator=torch.Generator().manual_seed(0))]
    assert abs(lds(torch.tensor(held).float() @ shuffled, observed).mean()) < 0.2


def test_subset_models_do_not_depend_on_how_many_are_trained_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    masks = draw_subsets(ROWS, 5)
    whole = outputs(masks, 3)
    monkeypatch.setattr("palimpsest.audit.datamodels._AT_ONCE", 2)
    torch.testing.assert_close(outputs(masks, 3), whole, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(outputs(masks[:3], 3), whole[:3], rtol=1e-3, atol=1e-3)


def test_lds_is_spearmans() -> None:
    random = np.random.default_rng(0)
    told, true = random.normal(size=(2, 25, 6)).round(1)  # with ties
    told[:, 5] = 1.0
    found = lds(torch.tensor(told), true)
    np.testing.assert_allclose(found[:5], [spearmanr(told[:, p], true[:, p]).statistic for p in range(5)])
    assert found[5] == 0


def test_what_cannot_be_scored_is_refused() -> None:
    with pytest.raises(InputError, match="at least 20 held-out subsets, not 19"):
        lds(np.zeros((19, 2)), np.zeros((19, 2)))
    with pytest.raises(InputError, match=r"one shape, not \(20, 2\) and \(20, 3\)"):
        lds(np.zeros((20, 2)), np.zeros((20, 3)))
    with pytest.raises(InputError, match="finite"):
        lds(np.full((20, 2), np.nan), np.zeros((20, 2)))
    with pytest.raises(InputError, match="at least one trained model"):
        trak_of([], lambda model, batch: batch, [], [])
