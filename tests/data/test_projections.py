"""Projections and relabellings of a base set: tasks by number, their scale, the biased share, streams of tasks."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from palimpsest.core.errors import InputError
from palimpsest.data.episodes import Episodes
from palimpsest.data.projections import BaseSet, ProjectedTasks, Projections, scaled
from palimpsest.data.tasks import Examples


@pytest.fixture(scope="module")
def digits() -> BaseSet:
    return BaseSet.bundled("digits")


def test_a_base_set_is_scaled_by_one_mean_and_one_deviation(digits: BaseSet) -> None:
    assert digits.x.shape == (1797, 64)
    assert float(digits.x.mean()) == pytest.approx(0, abs=1e-5)
    assert float(digits.x.std()) == pytest.approx(1, abs=1e-3)
    assert float(digits.x.std(0).min()) == 0  # features keep their own: a corner is always white
    wine = BaseSet.bundled("wine")
    torch.testing.assert_close(wine.x.std(0, correction=0), torch.ones(13))
    picked = digits.only([7, 2])
    assert picked.classes == 2
    assert torch.equal(picked.x[picked.y == 1], digits.x[digits.y == 2])
    first, second = picked.split(0.7, seed=1)
    assert len(first.y) + len(second.y) == len(picked.y)
    rows = {tuple(row.tolist()) for row in first.x}
    assert not any(tuple(row.tolist()) in rows for row in second.x)


def test_projected_inputs_keep_unit_variance_and_labels_are_permuted(digits: BaseSet) -> None:
    stream = Projections(digits, tasks=10**6, features=7, length=50, batch_size=64)
    batch = stream(0)
    assert batch["x"].shape == (64, 50, 7)
    assert float(batch["x"].var()) == pytest.approx(1, abs=0.1)
    matrix, permutation = stream.transform(int(batch["task"][3]))
    assert sorted(permutation.tolist()) == list(range(10))
    inverse = torch.argsort(permutation)
    for x, y in zip(batch["x"][3], batch["y"][3], strict=True):
        candidates = digits.x[digits.y == inverse[y]] @ matrix.T
        assert float((candidates - x).abs().sum(1).min()) < 1e-4  # it is a projected example of the class it says


def test_tasks_and_batches_are_pure_functions(digits: BaseSet) -> None:
    stream = Projections(digits, tasks=2**25, features=4, length=5, batch_size=6, seed=3)
    again = Projections(digits, tasks=2**25, features=4, length=5, batch_size=6, seed=3)
    stream(1)
    for name, value in stream(7).items():
        assert torch.equal(value, again(7)[name])
    assert torch.equal(stream.transform(2**24)[0], again.transform(2**24)[0])
    assert not torch.equal(stream.transform(0)[0], stream.transform(1)[0])
    few = replace(stream, tasks=3, batch_size=200)(0)["task"]
    assert sorted(few.unique().tolist()) == [0, 1, 2]
    assert replace(stream, tasks=3, first=50)(0)["task"].min() >= 50


def test_the_biased_share_has_one_permutation_and_its_own_projections(digits: BaseSet) -> None:
    few = digits.only([0, 1, 2])
    batch = Projections(few, tasks=1000, features=64, length=8, batch_size=10, bias=0.8)(0)
    stream = Projections(few, tasks=1000, features=64, length=8, batch_size=10)
    plain = stream(0)
    assert torch.equal(batch["x"], plain["x"])
    assert torch.equal(batch["y"][8:], plain["y"][8:])
    fixed = stream.transform(0)[1]
    for row in range(8):
        own = torch.argsort(stream.transform(int(batch["task"][row]))[1])
        assert torch.equal(batch["y"][row], fixed[own[plain["y"][row]]])


def test_any_stream_of_tasks_can_be_projected() -> None:
    rng = np.random.default_rng(0)
    pool = Examples.of(rng.standard_normal((60, 5)), np.repeat(np.arange(6), 10))
    episodes = Episodes(pool=pool, way=3, shot=2, queries=2, nota=0.25)
    stream = ProjectedTasks(episodes, features=4, length=9, batch_size=5)
    assert stream.labels == 3
    batch = stream(2)
    assert batch["x"].shape == (5, 9, 4)
    assert batch["y"].max() < 3
    assert batch["task"].tolist() == [10, 11, 12, 13, 14]
    assert torch.equal(batch["x"], stream(2)["x"])


def test_scaling_uses_the_support_alone() -> None:
    support = np.array([[1.0, 3.0], [3.0, 5.0]])
    torch.testing.assert_close(scaled([[3.0, 3.0 + 2**0.5]], support), torch.tensor([[0.0, 1.0]]))
    with pytest.raises(InputError, match=r"row 0, column 1 is NaN or infinite"):
        scaled([[0.0, float("nan")]], support)
    with pytest.raises(InputError, match=r"not \(1, 3\)"):
        scaled([[0.0, 1.0, 2.0]], support)
    with pytest.raises(InputError, match="nothing to learn from"):
        scaled(support, np.ones((2, 2)))


def test_bad_input_is_said(digits: BaseSet) -> None:
    with pytest.raises(InputError, match="3 inputs but 2 labels"):
        BaseSet.of(np.ones((3, 2)), np.zeros(2))
    with pytest.raises(InputError, match=r"row 1, column 0 of the inputs is NaN"):
        BaseSet.of(np.array([[1.0], [np.nan]]), [0, 1])
    with pytest.raises(InputError, match="at least 2 classes"):
        BaseSet.of(np.eye(2), [1, 1])
    with pytest.raises(InputError, match="all inputs are equal"):
        BaseSet.of(np.ones((2, 2)), [0, 1])
    with pytest.raises(InputError, match="did you mean digits"):
        BaseSet.bundled("digit")
    with pytest.raises(InputError, match="share of the batch"):
        Projections(digits, 1, bias=1.5)
    with pytest.raises(InputError, match="has 10 classes, more than"):
        Projections(digits, 1, classes=5)
    with pytest.raises(InputError, match="at least 1"):
        Projections(digits, 0)
