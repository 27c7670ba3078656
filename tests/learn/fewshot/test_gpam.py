from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from palimpsest.core.errors import InputError
from palimpsest.core.watch import Watch
from palimpsest.data.episodes import Episodes
from palimpsest.data.evaluation import evaluate
from palimpsest.learn.fewshot import GPAM, MNAV, OProto, ProtoBias
from palimpsest.learn.fewshot.episodic import EpisodeBatches
from palimpsest.learn.fewshot.gpam import Prototypes, between_classes, boundary, views_apart
from palimpsest.learn.fewshot.open_set import none_score
from palimpsest.models.convnet import SPREAD

QUIET = Watch(progress=False)
D = 4


def network_of(learner, views=1):
    torch.manual_seed(0)
    x = torch.randn(30, views, D) if views > 1 else torch.randn(30, D)
    network = learner.build(x, 3).double()
    with torch.no_grad():
        network.shared += torch.randn(D)
    return network


@pytest.mark.parametrize("views", [1, 3])
def test_prototypes_distances_and_radii_by_hand(views):
    learner = GPAM(shrinkage=3.0, slope=0.4)
    network = network_of(learner, views)
    rng = np.random.default_rng(0)
    shape = (1, 5, views, D) if views > 1 else (1, 5, D)
    support = rng.normal(size=shape)
    query = rng.normal(size=(1, 6, *shape[2:]))
    labels = np.array([[0, 0, 1, 2, 2]])
    logits = learner.scores(network, *map(torch.from_numpy, (support, labels, query)), 3)[0].detach().numpy()

    unit = SPREAD / (2 * D)
    shared = np.log1p(np.exp(network.shared.detach().numpy())) * unit
    every = support[0].reshape(5, views, D)
    weights = np.exp([2.0] + [0.0] * (views - 1)) / (np.exp(2.0) + views - 1)
    means, variances = [], []
    for n in range(3):
        own = every[labels[0] == n].reshape(-1, D)
        count = len(own) if len(own) > 1 else 0
        spread = own.var(0, ddof=1) if count else 0.0
        means.append(np.einsum("svd,v->sd", every[labels[0] == n], weights).mean(0))
        variances.append(np.maximum((count * spread + 3.0 * shared) / (count + 3.0), 0.05 * unit))

    def distance(point, n):
        volumes = [np.log(v).sum() for v in variances]
        return 10 / D * (((point - means[n]) ** 2 / variances[n]).sum() + volumes[n] - np.mean(volumes))

    near = [max(0, min(distance(means[m], n) for m in range(3) if m != n)) for n in range(3)]
    radii = [10 + network.slope.item() * value for value in near]
    for q in range(6):
        z = query[0, q].reshape(views, D)[0]
        to = [distance(z, n) for n in range(3)]
        np.testing.assert_allclose(-logits[q, :3], to, rtol=1e-9)
        assert -logits[q, 3] == pytest.approx(radii[int(np.argmin(to))], rel=1e-9)


def test_the_border_by_hand():
    classes = Prototypes(*torch.zeros(2, 1, 2, 1), near=torch.tensor([[10.0, 20.0]]), radii=torch.tensor([[5.0, 6.0]]))
    to = torch.tensor([[[4.5, 9.0], [8.0, 2.0], [6.0, 9.0], [4.0, 5.0], [9.0, 30.0]]])
    labels = torch.tensor([[0, 1, 2, 2, 2]])
    # known: 4.5 - (5 - 1) = 0.5 and 2 - (6 - 2) < 0; others: (5 + 1) - 6 = 0, 6 - 4 = 2 and 6 - 9 < 0: two count
    assert boundary(to, labels, classes, 0.1).item() == pytest.approx((0.5 + 0) / 2 + (2 + 0) / 2)
    assert boundary(to[:, :2], labels[:, :2], classes, 0.1).item() == pytest.approx(0.25)


def test_the_loss_has_the_right_gradient():
    learner = GPAM(made_up=0, margin=0.0)  # the margins enter without a gradient
    network = network_of(learner, views=2)
    rng = np.random.default_rng(1)
    batch = {
        "support": torch.from_numpy(rng.normal(size=(2, 6, 2, D))),
        "query": torch.from_numpy(rng.normal(size=(2, 4, 2, D))),
        "support_labels": torch.tensor([[0, 0, 1, 1, 2, 2]] * 2),
        "labels": torch.tensor([[0, 1, 2, 3], [3, 3, 1, 0]]),
        "number": torch.arange(2),
    }
    for name in ("radius", "slope", "views", "shared"):
        parameter = getattr(network, name)
        (slope,) = torch.autograd.grad(learner.loss(network, batch, 3)[0], [parameter])
        place = (0,) * parameter.ndim
        values = []
        for sign in (1, -1):
            with torch.no_grad():
                parameter[place] += sign * 1e-6
                values.append(learner.loss(network, batch, 3)[0].item())
                parameter[place] -= sign * 1e-6
        difference = (values[0] - values[1]) / 2e-6
        assert slope[place].item() == pytest.approx(difference, rel=1e-4, abs=1e-7)


def test_made_up_negatives_lie_between_two_classes():
    torch.manual_seed(0)
    means = torch.tensor([[[0.0], [1.0], [10.0]]])
    points = between_classes(means, 200)
    assert points.shape == (1, 200, 1)
    inside = [(low <= points) & (points <= high) for low, high in ((0.35, 0.65), (3.5, 6.5), (4.15, 6.85))]
    assert torch.stack(inside).any(0).all()


def test_made_up_negatives_wait_for_the_warm_up(features):
    learner = GPAM(steps=10, episodes=2, warm_up=0.5, made_up=4)
    episodes = Episodes(pool=features, way=3, shot=1, queries=2, nota=0.4)
    network = learner.build(features.x, 3)
    batches = EpisodeBatches(episodes, 2)
    early, late = batches(0), batches(0) | {"number": torch.tensor([10, 11])}
    torch.manual_seed(0)
    assert learner.loss(network, early, 3)[0] == learner.loss(network, early, 3)[0]
    assert learner.loss(network, late, 3)[0] != learner.loss(network, early, 3)[0]


def test_views_that_agree_cost_nothing():
    z = torch.randn(1, 3, 1, D).expand(1, 3, 4, D)
    assert views_apart(z).abs().max() == 0
    moved = z.clone()
    moved[:, :, 1:] += 2.0
    assert views_apart(moved).tolist() == [[4.0, 4.0, 4.0]]


@pytest.mark.parametrize("kind", [GPAM, ProtoBias, OProto, MNAV])
def test_strangers_are_told_apart(kind, features):
    train, test = (features.of_classes(features.names[part]) for part in (slice(0, 7), slice(7, 12)))
    options = {"way": 3, "shot": 5, "queries": 3, "nota": 0.5}
    fitted = kind(steps=150, lr=1e-2).meta_fit(Episodes(pool=train, **options), watch=QUIET)
    scores = evaluate(fitted, Episodes(pool=test, count=200, **options))
    assert scores.accuracy.mean() > 0.6  # always "none" is right half of the time
    assert scores.known.mean() > 0.5
    assert scores.none_recall.mean() > 0.4
    assert scores.none_precision > 0.5


def test_views_reach_the_learner(features):
    rng = np.random.default_rng(0)
    noise = rng.normal(size=(120, 3, 8)).astype(np.float32)
    noise[:, 0] = 0
    viewed = replace(features, x=features.x[:, None] + noise)
    episodes = Episodes(pool=viewed, way=3, shot=1, queries=3, nota=0.4, count=50)
    for kind in (GPAM, ProtoBias, MNAV, OProto):
        fitted = kind(steps=3).meta_fit(episodes, watch=QUIET)
        assert fitted.shape == (3, 8)
        assert evaluate(fitted, episodes).accuracy.shape == (50,)


def test_none_score_orders_by_how_strange():
    logits = np.array([[[1.0, 0.0, 3.0], [1.0, 5.0, 3.0]]])
    assert none_score(logits).tolist() == [[2.0, -2.0]]


def test_ranges():
    with pytest.raises(InputError, match="out of range"):
        GPAM(shrinkage=0)
