"""Bayesian prism: what the network reads, its face, the yardsticks, and the probes on predictors that are known."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from palimpsest.core.errors import InputError
from palimpsest.core.watch import Watch
from palimpsest.data.functions import Dense, Fourier, FunctionStream, Mixture, Sparse
from palimpsest.learn.incontext.bayesian_prism import (
    BayesianPrism,
    FittedPrism,
    Pairs,
    compare,
    exact,
    lasso,
    lasso_weights,
    least_squares,
    spectra,
    spectrum_probe,
    weight_probe,
)

QUIET = Watch(progress=False)
TINY = {"width": 16, "layers": 2, "heads": 2, "steps": 3, "lr": 1e-3}
LAYOUTS = pytest.mark.parametrize("layout", ["interleaved", "packed"])


def fitted(dim: int = 2, points: int = 6, **settings) -> FittedPrism:
    return BayesianPrism(**TINY | settings).meta_fit(FunctionStream(Dense(dim), points, 8), watch=QUIET)


def test_what_the_network_reads() -> None:
    x, y = torch.tensor([[[1.0, 2.0], [3.0, 4.0]]]), torch.tensor([[5.0, 6.0]])
    assert BayesianPrism().tokens(x, y).tolist() == [[[1, 2], [5, 0], [3, 4], [6, 0]]]
    assert BayesianPrism(layout="packed").tokens(x, y).tolist() == [[[1, 2, 0], [3, 4, 5]]]
    waves = BayesianPrism(layout="packed", waves=2).tokens(torch.tensor([[[2.5]]]), y[:, :1])
    torch.testing.assert_close(waves, torch.tensor([[[0.0, -1.0, 1.0, 0.0, 0.0]]]), atol=1e-6, rtol=0)


@LAYOUTS
def test_a_prediction_sees_the_pairs_before_it_and_nothing_else(layout: str) -> None:
    one = fitted(layout=layout)
    batch = FunctionStream(Dense(2), 6, 4, seed=1)(0)
    x, y = batch["x"], batch["y"]
    before = one.predictions(x, y)
    assert before.shape == (4, 6)
    assert before.dtype == torch.float64
    for n in range(6):
        other = y.clone()
        other[:, n:] += 1
        moved = one.predictions(x, other)
        torch.testing.assert_close(moved[:, : n + 1], before[:, : n + 1], atol=1e-6, rtol=0)
        if n < 5:
            assert not torch.allclose(moved[:, n + 1], before[:, n + 1], atol=1e-4)


@LAYOUTS
def test_queries_are_answered_each_by_itself(layout: str) -> None:
    one = fitted(layout=layout)
    batch = FunctionStream(Dense(2), 6, 4, seed=2)(0)
    x, y = batch["x"], batch["y"]
    for shots in (0, 1, 4):
        answers = one.answers(x[:, :shots], y[:, :shots], x[:, shots:])
        for query in range(shots, 6):
            prompt = torch.cat([x[:, :shots], x[:, query : query + 1]], dim=1)
            alone = one.predictions(prompt, torch.cat([y[:, :shots], torch.zeros(4, 1)], dim=1))[:, -1]
            torch.testing.assert_close(answers[:, query - shots].double(), alone, atol=1e-5, rtol=1e-5)


@LAYOUTS
def test_it_adapts_and_survives_the_disk(layout: str, tmp_path: Path) -> None:
    learner = BayesianPrism(**TINY, layout=layout)  # type: ignore[arg-type]
    first = learner(FunctionStream(Dense(2), 5, 4), watch=QUIET)
    again = learner(FunctionStream(Dense(2), 5, 4), watch=QUIET)
    first.write(tmp_path)
    task, queries = Pairs(np.eye(2), np.ones(2)), np.random.default_rng(0).standard_normal((7, 2))
    answers = first.adapt(task)(queries)
    assert answers.shape == (7,)
    assert answers.dtype == np.float64
    for other in (again, learner.read(tmp_path)):
        np.testing.assert_array_equal(other.adapt(task)(queries), answers)


def test_least_squares_and_lasso_against_scikit_learn() -> None:
    from sklearn.linear_model import Lasso

    family = Sparse(6, 2)
    batch = FunctionStream(family, 12, 3, noise=0.1)(0)
    x, y = batch["x"].double(), batch["y"].double()
    found = lasso_weights(x, y, 0.05, iterations=2000)
    for row in range(3):
        expected = Lasso(alpha=0.05, fit_intercept=False, tol=1e-10, max_iter=100_000).fit(x[row], y[row]).coef_
        np.testing.assert_allclose(found[row], expected, atol=1e-5)
    by_prefix = lasso(family, 0.05)(batch["x"], batch["y"])
    part = lasso_weights(x[:, :11], y[:, :11], 0.05)
    torch.testing.assert_close(by_prefix[:, 11], (x[:, 11] * part).sum(1))
    ols = least_squares(family)(batch["x"], batch["y"])
    by_hand = [np.linalg.lstsq(x[row, :8].numpy(), y[row, :8].numpy())[0] @ x[row, 8].numpy() for row in range(3)]
    np.testing.assert_allclose(ols[:, 8], by_hand)
    assert ols[:, 0].eq(0).all()


def test_distances_are_medians_and_exact_bayes_is_nearest_to_itself() -> None:
    class Oracle(FittedPrism):
        def predictions(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
            return exact(mixture, 0.4)(x, y)

    mixture = Mixture((Dense(2, 3.0, 0.0), Dense(2, -3.0, 0.0)))
    batch = FunctionStream(mixture, 5, 64, noise=0.4)(0)
    oracle = Oracle(BayesianPrism(), None)  # type: ignore[arg-type]
    rivals = {"exact": exact(mixture, 0.4), "matched": exact(Dense(2, 0.0, 3.0), 0.4)}
    found = compare(oracle, rivals, batch)
    assert found["exact"].tolist() == [0] * 5
    assert (found["matched"][1:4] > 1e-3).all()
    gap = (exact(mixture, 0.4)(batch["x"], batch["y"]) - batch["function"]).square().median(0).values
    np.testing.assert_allclose(found["truth"], gap)


def test_the_weight_probe_finds_a_linear_predictor() -> None:
    class Ridge(FittedPrism):
        def answers(self, x: torch.Tensor, y: torch.Tensor, queries: torch.Tensor) -> torch.Tensor:
            gram = x.transpose(1, 2) @ x + torch.eye(x.shape[2])
            return (queries @ torch.linalg.solve(gram, x.transpose(1, 2) @ y[..., None]))[..., 0]

    batch = FunctionStream(Dense(3), 6, 4)(0)
    found = weight_probe(Ridge(BayesianPrism(), None), batch["x"], batch["y"])  # type: ignore[arg-type]
    x, y = batch["x"].double(), batch["y"].double()
    assert found.shape == (4, 7, 3)
    by_hand = torch.linalg.solve(x.transpose(1, 2) @ x + torch.eye(3), x.transpose(1, 2) @ y[..., None])[..., 0]
    torch.testing.assert_close(found[:, 6], by_hand, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(found[:, 0], torch.zeros(4, 3).double(), atol=1e-6, rtol=0)


def test_the_spectrum_probe_finds_known_waves() -> None:
    def waves(grid: torch.Tensor) -> torch.Tensor:
        angle = torch.pi * grid[..., 0] / 5
        return 3 + 2 * torch.sin(angle) + torch.cos(3 * angle)

    np.testing.assert_allclose(spectrum_probe(waves, 5.0, 4), [0.8, 0, 0.2, 0], atol=1e-6)
    with pytest.raises(InputError, match="the answers are constant"):
        spectrum_probe(lambda grid: grid[..., 0] * 0, 5.0, 4)


def test_the_exact_spectrum_of_one_class_is_flat_and_of_a_mixture_falls() -> None:
    network = BayesianPrism(**TINY, layout="packed", waves=3).meta_fit(FunctionStream(Fourier(3), 4, 8), watch=QUIET)
    one, mixture = Fourier(3), Mixture(tuple(Fourier(n) for n in (1, 2, 3)))
    batch = FunctionStream(mixture, 4, 400, seed=1)(0)
    flat = spectra(network, one, batch, (1,), noise=0.03, high=3)[1]
    falling = spectra(network, mixture, batch, (1, 2), noise=0.03, high=3)
    np.testing.assert_allclose(flat[1], [1 / 3] * 3, atol=1e-3)  # one pair cannot tell frequencies apart
    assert falling[1][1][0] > 0.6
    assert (np.diff(falling[2][1]) < 0).all()
    assert flat[0].sum() == pytest.approx(1)


def test_bad_input_is_said() -> None:
    with pytest.raises(InputError, match="unknown layout 'packd': did you mean packed"):
        BayesianPrism(layout="packd")  # type: ignore[arg-type]
    one = fitted(layout="packed")
    with pytest.raises(InputError, match=r"not \(2, 2\) and \(3,\)"):
        one.adapt(Pairs(np.eye(2), np.ones(3)))
    with pytest.raises(InputError, match="finite"):
        one.adapt(Pairs(np.eye(2), np.array([1, np.inf])))
    with pytest.raises(InputError, match=r"shape \(Q, 2\)"):
        one.adapt(Pairs(np.eye(2), np.ones(2)))(np.ones((1, 3)))
    with pytest.raises(InputError, match="7 tokens are more than the 6"):
        one.adapt(Pairs(np.ones((6, 2)), np.ones(6)))(np.ones((1, 2)))
    longer = FittedPrism(one.learner, replace(one.learner, positions=False).model(2, 6))
    assert longer.adapt(Pairs(np.ones((9, 2)), np.ones(9)))(np.ones((1, 2))).shape == (1,)
