"""Datamodels: estimators against scikit-learn and float64 algebra written out, and what they refuse."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.linear_model import Lasso, Ridge

from palimpsest.core.attribution import (
    _PENALTIES,
    Datamodel,
    check_rows,
    draw_subsets,
    group_removal,
    lasso,
    margins,
    regression,
    scale_of,
    trak,
    trusted_share,
)
from palimpsest.core.errors import InputError


def rng() -> np.random.Generator:
    return np.random.default_rng(0)


def sparse_world(models: int, rows: int = 40, noise: float = 0.3) -> tuple[np.ndarray, torch.Tensor, torch.Tensor]:
    """Subsets, outputs (M, 3, 2) and the true effects (N, 3, 2), of which one in ten is not 0."""
    random = rng()
    masks = draw_subsets(rows, models, seed=1)
    effects = random.normal(size=(rows, 3, 2)) * (random.random((rows, 3, 2)) < 0.1) * 2
    outputs = np.einsum("mn,nij->mij", masks, effects) + 1.5 + noise * random.normal(size=(models, 3, 2))
    return masks, torch.tensor(outputs), torch.tensor(effects)


def test_subsets_are_halves_drawn_anew_for_each_model() -> None:
    masks = draw_subsets(10, 6, seed=2)
    assert masks.shape == (6, 10)
    assert (masks.sum(1) == 5).all()
    assert len({mask.tobytes() for mask in masks}) == 6
    assert np.array_equal(draw_subsets(10, 3, seed=2), masks[:3])
    assert (draw_subsets(10, 4, share=0.9).sum(1) == 9).all()


def test_the_difference_of_means_by_hand() -> None:
    masks = np.array([[1, 1, 0], [1, 0, 1], [0, 1, 1], [0, 0, 1]], dtype=bool)
    outputs = torch.tensor([[4.0], [2.0], [1.0], [3.0]])
    found = regression(masks, outputs, "difference").effects
    torch.testing.assert_close(found, torch.tensor([[3.0 - 2.0], [2.5 - 2.5], [2.0 - 4.0]]))


@pytest.mark.parametrize("models", [15, 50])  # fewer and more than the rows
def test_ridge_is_the_ridge_of_the_least_leave_one_out_error(models: int) -> None:
    masks, outputs, _ = sparse_world(models)
    x, y = masks.astype(float), outputs.flatten(1).numpy()
    centred = x - x.mean(0)
    lengths = np.linalg.svd(centred, compute_uv=False) ** 2
    mean = lengths[lengths > 1e-9 * lengths[0]].mean()
    wanted = np.empty((x.shape[1], y.shape[1]))
    for column in range(y.shape[1]):
        errors = {}
        for penalty in _PENALTIES:  # the penalty of the leave-one-out fits is the whole fit's; the means are their own
            residual = [
                Ridge(alpha=penalty * mean).fit(np.delete(x, m, 0), np.delete(y[:, column], m)).predict(x[m : m + 1])[0]
                - y[m, column]
                for m in range(models)
            ]
            errors[penalty] = np.mean(np.square(residual))
        best = min(errors, key=errors.__getitem__)
        wanted[:, column] = Ridge(alpha=best * mean).fit(x, y[:, column]).coef_
    found = regression(masks, outputs, "ridge").effects.flatten(1)
    np.testing.assert_allclose(found, wanted, atol=1e-8)


def test_lasso_is_scikit_learns() -> None:
    masks, outputs, _ = sparse_world(60)
    x, y = masks - masks.mean(0), outputs.flatten(1).numpy()
    y = y - y.mean(0)
    gram, moment = torch.tensor(x.T @ x / 60), torch.tensor(x.T @ y / 60)
    penalty = 0.1 * moment.abs().amax(0)
    found = lasso(gram, moment, penalty, torch.zeros_like(moment), 3000)
    for column in range(y.shape[1]):
        wanted = Lasso(alpha=float(penalty[column]), tol=1e-12, max_iter=100_000).fit(x, y[:, column]).coef_
        np.testing.assert_allclose(found[:, column], wanted, atol=1e-6)


@pytest.mark.parametrize(("estimator", "error"), [("lasso", 0.1), ("ridge", 0.2)])
def test_the_effects_of_a_linear_world_are_found(estimator: str, error: float) -> None:
    masks, outputs, effects = sparse_world(600)
    found = regression(masks, outputs, estimator).effects  # type: ignore[arg-type]
    assert found.shape == effects.shape
    assert found.dtype == outputs.dtype
    assert float((found - effects).square().mean().sqrt() / effects.square().mean().sqrt()) < error


def test_the_difference_has_the_variance_that_it_says() -> None:
    masks, outputs, effects = sparse_world(600)
    effects = effects - effects.mean(0)  # subsets of one size do not tell what all rows add alike
    errors = regression(masks, outputs, "difference").effects - effects
    assert errors.square().mean() == pytest.approx(float((4 * outputs.var(0) / 600).mean()), rel=0.3)


@pytest.mark.parametrize("small", [0.15, 0.0])
def test_what_lasso_leaves_out_of_a_group_is_added_as_far_as_it_is_sure(small: float) -> None:
    random = rng()
    masks = random.random((400, 60)) < 0.5
    effects = np.concatenate([random.normal(size=5) * 3, np.full(20, small), np.zeros(35)])
    outputs = torch.tensor((masks @ effects + 0.5 * random.normal(size=(30, 400))).T)  # 30 outputs of one truth
    group = list(range(5, 25))
    sparse = regression(masks, outputs)
    found = {
        "sparse": sparse.removal(group),
        "difference": regression(masks, outputs, "difference").removal(group),
        "both": group_removal(sparse, masks, outputs, group),
    }
    errors = {name: float((sums - 20 * small).square().mean()) for name, sums in found.items()}
    assert errors["both"] < errors["difference"] / 3
    assert errors["both"] < max(errors["sparse"], 0.05)
    left = outputs.numpy() - masks @ sparse.effects.numpy()
    halves = []
    for half in (slice(0, None, 2), slice(1, None, 2)):
        mask = masks[half]
        halves.append(sum(left[half][mask[:, i]].mean(0) - left[half][~mask[:, i]].mean(0) for i in group))
    share = trusted_share(*map(torch.tensor, halves))
    np.testing.assert_allclose(found["both"], sparse.removal(group).numpy() + share * np.mean(halves, 0), atol=1e-9)


def test_few_models_favour_the_sparse_estimator() -> None:
    masks, outputs, effects = sparse_world(60, noise=0.1)
    errors = {
        name: float((regression(masks, outputs, name).effects - effects).square().mean())  # type: ignore[arg-type]
        for name in ("lasso", "ridge", "difference")
    }
    assert errors["lasso"] < errors["ridge"] < errors["difference"]


def test_removal_and_prediction_are_sums_of_effects() -> None:
    effects = torch.arange(12.0).reshape(6, 2)
    datamodel = Datamodel(effects)
    torch.testing.assert_close(datamodel.removal([4, 0]), effects[0] + effects[4])
    torch.testing.assert_close(datamodel.without(torch.tensor([10.0, 20.0]), [1]), torch.tensor([8.0, 17.0]))
    masks = torch.tensor([[1, 0, 0, 0, 0, 1], [0, 0, 0, 0, 0, 0]], dtype=torch.bool)
    torch.testing.assert_close(datamodel.predict(masks), torch.stack([effects[0] + effects[5], torch.zeros(2)]))
    torch.testing.assert_close(datamodel.scaled(0.5).effects, effects / 2)


@settings(max_examples=25, deadline=None)
@given(st.lists(st.integers(0, 30), min_size=1, max_size=14, unique=True), st.integers(0, 99))
def test_prediction_and_removal_agree(rows: list[int], seed: int) -> None:
    """f without F is f of the mask without F: both are the linear surrogate's."""
    generator = torch.Generator().manual_seed(seed)
    datamodel = Datamodel(torch.randn(31, 4, generator=generator, dtype=torch.float64))
    whole, less = torch.ones(1, 31, dtype=torch.bool), torch.ones(1, 31, dtype=torch.bool)
    less[0, rows] = False
    torch.testing.assert_close(datamodel.predict(less)[0], datamodel.without(datamodel.predict(whole)[0], rows))


def test_trak_is_its_formula() -> None:
    generator = torch.Generator().manual_seed(0)
    features = [torch.randn(9, 5, generator=generator, dtype=torch.float64) for _ in range(2)]
    own = [torch.randn(9, generator=generator, dtype=torch.float64) for _ in range(2)]
    queries = [torch.randn(4, 3, 5, generator=generator, dtype=torch.float64) for _ in range(2)]
    found = trak(features, own, ridge=0.2)
    kernels, q = 0, 0
    for phi, margin, query in zip(features, own, queries, strict=True):
        gram = phi.T @ phi
        inverse = torch.linalg.inv(gram + 0.2 * torch.trace(gram) / 5 * torch.eye(5))
        kernels = kernels + torch.einsum("abq,qr,nr->nab", query, inverse, phi) / 2
        q = q + (1 - margin.exp() / (1 + margin.exp())) / 2
    wanted = kernels * q[:, None, None]  # type: ignore[index]
    torch.testing.assert_close(found.datamodel(queries).effects, wanted)
    torch.testing.assert_close(found.removal(queries, [3, 7]), wanted[3] + wanted[7])
    torch.testing.assert_close(found.removal(queries), wanted.sum(0))
    with pytest.raises(InputError, match="gradients of 1 models for a TRAK of 2"):
        found.removal(queries[:1])


def test_margins_are_log_odds() -> None:
    logits = torch.randn(3, 6, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    labels = torch.tensor([0, 1, 2, 3, 0, 1])
    p = logits.softmax(-1)[:, torch.arange(6), labels]
    torch.testing.assert_close(margins(logits, labels), (p / (1 - p)).log())
    torch.testing.assert_close(margins(logits[0], labels), (p / (1 - p)).log()[0])


def test_a_scale_and_a_trusted_share() -> None:
    generator = torch.Generator().manual_seed(0)
    truth = torch.randn(4000, generator=generator)
    assert scale_of(truth, 2.5 * truth) == pytest.approx(2.5)
    assert scale_of(torch.zeros(3), torch.ones(3)) == 0
    one, other = (truth + torch.randn(4000, generator=generator) for _ in range(2))
    assert trusted_share(one, other) == pytest.approx(1 / 1.5, abs=0.05)  # signal 1, noise of the mean 1/2
    assert trusted_share(truth, truth) == pytest.approx(1)
    assert trusted_share(truth, -truth + 0.1) == 0
    mean = (one + other) / 2
    shrunk = trusted_share(one, other) * mean
    assert (shrunk - truth).square().mean() < (mean - truth).square().mean()


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([1, 10], r"row 10 is not among the 10 training rows \(0 to 9\)"),
        ([-1], "row -1 is not among the 10"),
        ([3, 1, 3], "row 3 is named 2 times"),
        ([0, 1, 2, 3, 4], "5 of 10 training rows must go, half or more"),
        ([], "a list of row numbers"),
        ([0.5], "a list of row numbers"),
        ([True, False], "a list of row numbers"),
    ],
)
def test_rows_that_cannot_go_are_refused_in_one_line(rows: list, message: str) -> None:
    with pytest.raises(InputError, match=message) as caught:
        check_rows(np.asarray(rows), 10)
    assert "\n" not in str(caught.value)
    with pytest.raises(InputError, match=message):
        Datamodel(torch.zeros(10, 2)).removal(np.asarray(rows))


def test_masks_and_outputs_that_cannot_be_are_refused() -> None:
    masks = draw_subsets(6, 8)
    outputs = torch.zeros(8, 2)
    with pytest.raises(InputError, match="outputs of subset model 5 are not finite"):
        regression(masks, outputs.index_fill(0, torch.tensor([5]), torch.nan))
    with pytest.raises(InputError, match="as many outputs"):
        regression(masks, outputs[:7])
    with pytest.raises(InputError, match="as many outputs"):
        regression(masks.astype(float), outputs)
    always = masks.copy()
    always[:, 2] = True
    with pytest.raises(InputError, match="training row 2 is in 8 of 8 subsets"):
        regression(always, outputs)
    with pytest.raises(InputError, match="unknown estimator 'rige': did you mean ridge"):
        regression(masks, outputs, "rige")  # type: ignore[arg-type]
    with pytest.raises(InputError, match="do not fit a datamodel of 6"):
        Datamodel(torch.zeros(6, 1)).predict(np.ones((2, 5), bool))
    with pytest.raises(InputError, match="neither empty nor whole"):
        draw_subsets(4, 2, share=0.0)
