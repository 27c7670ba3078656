from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from palimpsest.audit.regression import (
    Relearning,
    answers,
    error,
    ignorance,
    mean_difference,
    membership,
    relative_differences,
    wasserstein,
)
from palimpsest.core.errors import InputError


class Says(nn.Module):
    """Answers its input times a factor, plus a shift."""

    def __init__(self, factor: float = 1.0, shift: float = 0.0):
        super().__init__()
        self.factor, self.shift = nn.Parameter(torch.tensor(factor)), nn.Parameter(torch.tensor(shift))

    def forward(self, inputs: Tensor) -> Tensor:
        return inputs * self.factor + self.shift


LINE = torch.linspace(1.0, 2.0, 1000)[:, None]


def test_errors_and_distances_by_hand() -> None:
    samples = (LINE, LINE[:, 0])
    assert error(Says(1.0, 0.5), samples) == pytest.approx(0.5, rel=1e-5)
    assert error(Says(1.0, 0.5), samples, squared=True) == pytest.approx(0.25, rel=1e-5)
    assert wasserstein(Says(1.0, 0.25), Says(), LINE) == pytest.approx(0.25, rel=1e-4)
    assert mean_difference(Says(1.0, -0.25), Says(), LINE) == pytest.approx(0.25, rel=1e-4)
    found = relative_differences(Says(2.0), Says(), samples)
    assert np.allclose(found, 1.0, atol=1e-5)
    assert ignorance(Says(1.0, 0.25), Says(), Says(1.0, 1.0), LINE) == pytest.approx(0.25, rel=1e-3)
    assert ignorance(Says(), Says(), Says(1.0, 1.0), LINE) == pytest.approx(0)


def test_the_distance_of_distributions_does_not_see_who_answers_what() -> None:
    mirrored = Says(-1.0, 3.0)  # 1 to 2 becomes 2 to 1
    assert wasserstein(mirrored, Says(), LINE) == pytest.approx(0, abs=1e-5)
    assert mean_difference(mirrored, Says(), LINE) == pytest.approx(0.5, rel=1e-2)


def test_membership_takes_what_is_answered_too_well_for_trained_on() -> None:
    rng = np.random.default_rng(0)
    inputs = torch.from_numpy(rng.normal(size=(300, 1))).float()
    near, far = (inputs + torch.from_numpy(rng.normal(0, size, (300, 1))).float() for size in (0.01, 1.0))
    members, strangers = (inputs, near), (inputs, far)
    assert membership(Says(), members, strangers, (inputs, near)) > 0.9
    assert membership(Says(), members, strangers, (inputs, far)) < 0.1
    half = (inputs, torch.cat([near[:150], far[150:]]))
    assert 0.4 < membership(Says(), members, strangers, half) < 0.6
    few = (inputs[:40], far[:40])
    assert membership(Says(), members, few, (inputs, near), seed=1) > 0.8, "sides are made equal in number"


def test_relearning_counts_steps_from_a_copy() -> None:
    train = (LINE, LINE[:, 0])
    back = Relearning(lr=0.02, batch_size=100, most=60)
    original, away, farther = Says(1.0, 0.2), Says(1.0, 0.8), Says(1.0, 1.6)
    near, far = (back.steps(one, original, train, train) for one in (away, farther))
    assert back.steps(original, original, train, train) == 0
    assert 5 < near < far <= 60
    assert back.steps(away, original, train, train) == near, "nothing was trained in place"
    assert float(away.shift.detach()) == pytest.approx(0.8)
    assert back.anamnesis(away, farther, original, train, train) == near / far
    assert Relearning(lr=0.02, batch_size=100, most=7).steps(farther, original, train, train) == 7
    coarse = Relearning(lr=0.02, batch_size=100, most=60, every=4).steps(away, original, train, train)
    assert coarse % 4 == 0
    assert near <= coarse < near + 4
    with pytest.raises(InputError, match="nothing was to be forgotten"):
        back.anamnesis(away, original, original, train, train)


def test_the_rows_of_an_epoch_are_everything_in_the_same_order_for_all() -> None:
    back = Relearning(batch_size=30)
    epoch = np.concatenate([back._rows(step, 90) for step in range(3)])
    assert sorted(epoch.tolist()) == list(range(90))
    assert np.array_equal(back._rows(4, 90), Relearning(batch_size=30)._rows(4, 90))


def test_answers_leave_the_mode_and_running_statistics_alone() -> None:
    model = nn.Sequential(nn.BatchNorm1d(1), nn.Linear(1, 1))
    model.train()
    before = model[0].running_mean.clone()
    assert answers(model, LINE).shape == (1000,)
    assert model.training
    assert torch.equal(model[0].running_mean, before)


def test_bad_input() -> None:
    with pytest.raises(InputError, match="no samples"):
        error(Says(), (LINE[:0], LINE[:0, 0]))
    with pytest.raises(InputError, match="1000 answers for 10 targets"):
        error(Says(), (LINE, LINE[:10, 0]))
    with pytest.raises(InputError, match="at least 2 members"):
        membership(Says(), (LINE[:1], LINE[:1]), (LINE, LINE), (LINE, LINE))
