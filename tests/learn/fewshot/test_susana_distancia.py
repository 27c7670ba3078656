from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from palimpsest.core.errors import InputError
from palimpsest.core.watch import Watch
from palimpsest.data.episodes import Episodes
from palimpsest.learn.fewshot.episodic import EpisodeBatches
from palimpsest.learn.fewshot.susana_distancia import LOSSES, SusanaDistancia, icnn_score, proto_triplet

QUIET = Watch(progress=False)


def far(a, b):
    return float(np.sqrt(((a - b) ** 2).sum() + 1e-6))


def score_by_hand(points, labels, others, other_labels, *, alone, k, window, drop):
    """The sheet's steps a to e, point by point."""
    size = len(others)
    k = min(k, size - 2)
    rows = []
    for i in range(len(points)):
        order = sorted((far(points[i], others[j]), j) for j in range(size) if not (alone and j == i))
        order = order[drop : drop + max(window or k + 1, k)]
        rows.append([(d, labels[i] == other_labels[j]) for d, j in order])
    a, b = [], []
    widest = max((d for row in rows for d, same in row[:k] if not same), default=0.0)
    for row in rows:
        border = min((d for d, same in row if not same), default=np.inf)
        u = [0.0 if np.isinf(border) else d / (border + 1e-7) for d, _ in row[:k]]
        u = [value / max(1.0, *u) for value in u]
        same = [value for value, (_, is_same) in zip(u, row[:k], strict=True) if is_same]
        other = [d / widest for d, is_same in row[:k] if not is_same]
        if same:
            a.append(np.mean(same))
        if other:
            b.append(np.mean(other))
    pull = 1 - np.mean(a) if a else 1.0
    push = np.mean(b) if b else 1.0
    purity = 1.0 if k + 2 >= size else np.mean([np.mean([same for _, same in row[:k]]) for row in rows])
    return ((pull + push) / 2 + purity) / 2


@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 10_000),
    size=st.integers(4, 14),
    k=st.integers(1, 5),
    window=st.sampled_from([None, 7]),
    alone=st.booleans(),
    released=st.booleans(),
)
def test_the_score_against_one_point_at_a_time(seed, size, k, window, alone, released):
    rng = np.random.default_rng(seed)
    points, others = rng.normal(size=(size, 3)), rng.normal(size=(9, 3))
    labels, other_labels = rng.integers(0, 3, size), rng.integers(0, 3, 9)
    if alone:
        others, other_labels = points, labels
    drop = int(released and not alone)
    expected = score_by_hand(points, labels, others, other_labels, alone=alone, k=k, window=window, drop=drop)
    sides = [torch.from_numpy(side) for side in ((points, labels) if alone else (points, labels, others, other_labels))]
    found = icnn_score(*sides, k=k, window=window, as_released=released)
    assert found.item() == pytest.approx(expected, rel=1e-9)
    assert 0 <= found.item() <= 1 + 1e-9


def test_the_score_tells_clean_from_mixed():
    rng = np.random.default_rng(0)
    labels = torch.arange(3).repeat_interleave(10)
    noise = torch.from_numpy(rng.normal(size=(30, 4)))
    centres = torch.from_numpy(rng.normal(size=(3, 4)))
    scores = [icnn_score(size * centres[labels] + noise, labels).item() for size in (0.0, 2.0, 50.0)]
    assert scores == sorted(scores)
    assert scores[2] > 0.95


def test_equal_points_do_not_count_as_themselves():
    points = torch.zeros(6, 2, dtype=torch.float64)
    points[3:] = 5.0
    labels = torch.tensor([0, 0, 0, 1, 1, 1])
    assert icnn_score(points, labels, k=2, window=2).item() == pytest.approx(1.0)
    points.requires_grad_()
    value = icnn_score(points, labels, k=3)
    (slope,) = torch.autograd.grad(value, [points])
    assert torch.isfinite(slope).all()


def test_the_score_has_the_right_gradient():
    rng = np.random.default_rng(5)
    points = torch.from_numpy(rng.normal(size=(8, 3))).requires_grad_()
    labels = torch.tensor([0, 0, 1, 1, 2, 2, 0, 1])
    (slope,) = torch.autograd.grad(icnn_score(points, labels, k=2), [points])
    # the batch's largest distance enters without a gradient: hold it fixed in the differences too
    rows, far_off = slope.abs().sum(1).nonzero().flatten(), 1e-6
    assert len(rows) > 4
    moved = points.detach().clone()
    moved[0] += far_off * slope[0] / slope[0].norm()
    before, after = (icnn_score(p, labels, k=2).item() for p in (points.detach(), moved))
    assert after > before


def test_the_triplet_by_hand():
    prototypes = torch.tensor([[[0.0, 0.0], [3.0, 0.0], [0.0, 4.0]]], dtype=torch.float64)
    query = torch.tensor([[[1.0, 0.0], [1.4, 0.0], [0.0, 4.0]]], dtype=torch.float64)
    labels = torch.tensor([[0, 0, 2]])
    # distances to the own and the nearest wrong prototype: 1 and 2, 1.4 and 1.6, 0 and 4
    wanted = (0 + 0.3 + 0) / 3
    assert proto_triplet(prototypes, query, labels, 0.5).item() == pytest.approx(wanted, abs=1e-5)
    mean = (3 + 4 + 5) / 3
    wanted = np.mean([max(0, 1 - 2 + 0.5 * mean), max(0, 1.4 - 1.6 + 0.5 * mean), 0])
    assert proto_triplet(prototypes, query, labels, 0.5, relative=True).item() == pytest.approx(wanted, abs=1e-5)


def test_the_triplet_has_the_right_gradient():
    rng = np.random.default_rng(6)
    prototypes, query = (torch.from_numpy(rng.normal(size=(2, n, 3))).requires_grad_() for n in (3, 4))
    labels = torch.tensor([[0, 1, 2, 0], [2, 2, 1, 0]])
    assert torch.autograd.gradcheck(lambda p, q: proto_triplet(p, q, labels, 1.0), (prototypes, query))


def test_the_total_is_the_mean_of_the_chosen_losses(features):
    episodes = Episodes(pool=features, way=3, shot=2, queries=3)
    learner = SusanaDistancia(losses=LOSSES, steps=3)
    network = learner.build(features.x, 3)
    total, logs = learner.loss(network, EpisodeBatches(episodes, 2)(0), 3)
    assert set(logs) == set(LOSSES)
    assert total.item() == pytest.approx(np.mean([value.item() for value in logs.values()]), rel=1e-6)
    assert learner.meta_fit(episodes, watch=QUIET).way == 3


def test_bad_input(features):
    with pytest.raises(InputError, match="unknown loss 'icnn'"):
        SusanaDistancia(losses=("icnn",))
    with pytest.raises(InputError, match="nothing to do"):
        SusanaDistancia(losses=())
    one = Episodes(pool=features, way=3, shot=1, queries=3)
    with pytest.raises(InputError, match="at least 2 shots"):
        SusanaDistancia(losses=("icnn-support",), steps=1).meta_fit(one, watch=QUIET)
    with pytest.raises(InputError, match="at least 2 classes"):
        proto_triplet(torch.zeros(1, 1, 2), torch.zeros(1, 1, 2), torch.zeros(1, 1, dtype=torch.long))
    with pytest.raises(InputError, match="at least 3 points"):
        icnn_score(torch.zeros(2, 2), torch.zeros(2, dtype=torch.long))
