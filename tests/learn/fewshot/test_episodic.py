from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from palimpsest.core.errors import InputError
from palimpsest.core.methods import all_methods
from palimpsest.core.watch import Watch
from palimpsest.data.episodes import Episodes
from palimpsest.data.evaluation import evaluate
from palimpsest.data.tasks import Examples, Task, Tasks
from palimpsest.learn.fewshot import MAML, MatchingNet, ProtoNet, RelationNet
from palimpsest.learn.fewshot.episodic import _products_pay, augmented, class_means, squared_distances
from palimpsest.learn.learner import load, save

QUIET = Watch(progress=False)
METHODS = [info for info in all_methods("learn") if getattr(info.cls, "family", "") == "few-shot"]
SLOW = ("fast-slow",)  # compares nothing by itself: it must learn to compare, for hundreds of steps (see its own test)
every = pytest.mark.parametrize("info", METHODS, ids=lambda info: info.name)


def stream(pool, info=None, **changes):
    nota = 0.3 if info is not None and info.cls.answers_none else 0.0
    return Episodes(pool=pool, **{"way": 3, "shot": 2, "queries": 3, "nota": nota, "count": 20, **changes})


def small(info, **changes):
    return info(**{"steps": 8, "episodes": 2, "width": 8, "lr": 1e-3, **changes})


@pytest.mark.parametrize(
    ("info", "kind"),
    [
        pytest.param(info, kind, id=f"{info.name}-{kind}")
        for info in METHODS
        for kind in ("features", "images")
        if kind in info.cls.inputs
    ],
)
def test_many_at_once_is_the_same_as_one_by_one(info, kind, request, tmp_path):
    pool = request.getfixturevalue(kind)
    episodes = stream(pool, info)
    fitted = small(info).meta_fit(episodes, watch=QUIET)
    rows = episodes.rows(0, 20)
    together = fitted.answer(episodes, rows)
    task = episodes.task(4)
    predictor = fitted.adapt(task)
    np.testing.assert_allclose(predictor.logits(task.query.x), together[4], rtol=1e-3, atol=2e-4)
    np.testing.assert_array_equal(fitted.predict(episodes, rows), together.argmax(-1))
    one = predictor.logits(task.query.x[1:2])[0]  # by itself, an input is answered alike
    np.testing.assert_allclose(one, predictor.logits(task.query.x)[1], rtol=1e-3, atol=2e-4)

    save(fitted, tmp_path / "learner")
    again = load(tmp_path / "learner")
    assert again.learner == fitted.learner
    np.testing.assert_array_equal(again.answer(episodes, rows), together)


@pytest.mark.parametrize("info", [info for info in METHODS if info.name not in SLOW], ids=lambda info: info.name)
def test_learning_helps_on_new_classes(info, features):
    train, test = (features.of_classes(features.names[part]) for part in (slice(0, 8), slice(8, 12)))
    nota = 0.2 if info.cls.answers_none else 0.0
    fitted = small(info, steps=60, episodes=4, lr=1e-2).meta_fit(stream(train, nota=nota), watch=QUIET)
    scores = evaluate(fitted, stream(test, nota=nota, count=200))
    assert scores.known.mean() > (0.6 if info.cls.answers_none else 0.8)  # by chance a third, or a quarter
    if scores.none_recall is not None:
        assert scores.none_recall.mean() > 0.1


def test_products_give_the_same_scores_as_embeddings():
    rng = np.random.default_rng(5)
    pool = Examples(rng.normal(size=(60, 5)).astype(np.float32), np.repeat(np.arange(6), 10), tuple("abcdef"))
    episodes = Episodes(pool=pool, way=4, shot=3, queries=2, count=900, seed=1)
    fitted = ProtoNet(steps=0, temperature=3.0).meta_fit(episodes, watch=QUIET)
    rows = episodes.rows(0, 900)
    assert _products_pay(fitted.embed(pool.x), rows)
    assert not _products_pay(fitted.embed(pool.x), rows[:2])
    looked_up = fitted.answer(episodes, rows)
    gathered = np.concatenate([fitted.answer(episodes, rows[start : start + 2]) for start in range(0, 900, 2)])
    np.testing.assert_allclose(looked_up, gathered, rtol=1e-4, atol=1e-4)


def test_class_means_and_distances_in_float64():
    rng = np.random.default_rng(2)
    support, query = rng.normal(size=(3, 6, 4)), rng.normal(size=(3, 5, 4))
    labels = np.array([[0, 0, 0, 1, 1, 2], [2, 1, 0, 2, 1, 2], [1, 2, 0, 0, 1, 2]])  # classes differ in size
    means = class_means(torch.from_numpy(support), torch.from_numpy(labels), 3)
    expected = [[support[e][labels[e] == n].mean(0) for n in range(3)] for e in range(3)]
    np.testing.assert_allclose(means, expected, rtol=1e-12)
    apart = [[[((q - c) ** 2).sum() for c in expected[e]] for q in query[e]] for e in range(3)]
    np.testing.assert_allclose(squared_distances(torch.from_numpy(query), means), apart, rtol=1e-10)


def test_baselines_score_as_their_papers_say():
    rng = np.random.default_rng(3)
    support, query = rng.normal(size=(1, 4, 3)), rng.normal(size=(1, 5, 3))
    labels = torch.tensor([[0, 0, 1, 1]])
    sides = torch.from_numpy(support), labels, torch.from_numpy(query), 2

    means = support[0].reshape(2, 2, 3).mean(1)
    nearest = -((query[0][:, None] - means) ** 2).sum(-1)
    np.testing.assert_allclose(ProtoNet(temperature=2.0).scores(None, *sides)[0], nearest / 2, rtol=1e-10)

    unit = [v / np.linalg.norm(v, axis=-1, keepdims=True) for v in (query[0], support[0])]
    weights = np.exp(10 * unit[0] @ unit[1].T)
    votes = (weights / weights.sum(1, keepdims=True)).reshape(5, 2, 2).sum(-1)
    np.testing.assert_allclose(MatchingNet().scores(None, *sides)[0].exp(), votes, rtol=1e-10)

    torch.manual_seed(0)
    network = RelationNet(hidden=4).build(torch.zeros(2, 3), 2).double()
    first, second = network.head[0], network.head[2]
    for q in range(5):
        for n in range(2):
            pair = np.concatenate([query[0, q], means[n], abs(query[0, q] - means[n])])
            hidden = np.maximum(first.weight.detach().numpy() @ pair + first.bias.detach().numpy(), 0)
            score = second.weight.detach().numpy() @ hidden + second.bias.detach().numpy()
            assert RelationNet().scores(network, *sides)[0, q, n].item() == pytest.approx(score.item(), rel=1e-10)


def test_losses_of_baselines_have_the_right_gradient(features):
    """Against finite differences in float64, through the network's weights."""
    for learner in (ProtoNet(), MatchingNet(), RelationNet(hidden=4)):
        torch.manual_seed(1)
        network = learner.build(features.x, 3).double()
        rng = np.random.default_rng(4)
        batch = {
            "support": torch.from_numpy(rng.normal(size=(2, 3, 8))),
            "query": torch.from_numpy(rng.normal(size=(2, 2, 8))),
            "support_labels": torch.tensor([[0, 1, 2], [2, 1, 0]]),
            "labels": torch.tensor([[0, 2], [1, 1]]),
        }
        weight = network.encoder.weight

        def value(w, learner=learner, network=network, batch=batch):
            return torch.func.functional_call(_Loss(network, learner, batch), {"network.encoder.weight": w}, ())

        assert torch.autograd.gradcheck(value, (weight.detach().requires_grad_(),), eps=1e-6, atol=1e-6)


class _Loss(torch.nn.Module):
    def __init__(self, network, learner, batch):
        super().__init__()
        self.network, self.learner, self.batch = network, learner, batch

    def forward(self):
        return self.learner.loss(self.network, self.batch, 3)


def test_steps_0_is_the_nearest_mean_of_the_given_features(features):
    episodes = stream(features)
    fitted = ProtoNet(steps=0).meta_fit(episodes, watch=QUIET)
    rows = episodes.rows(0, 20)
    for e, answers in enumerate(fitted.predict(episodes, rows)):
        means = features.x[rows.support[e]].mean(1)
        nearest = ((features.x[rows.query[e]][:, None] - means) ** 2).sum(-1).argmin(-1)
        np.testing.assert_array_equal(answers, nearest)


def test_only_the_stream_is_seen(features):
    """What was learnt does not change with the classes that are not in the training pool, nor with query labels."""
    train = features.of_classes(features.names[:8])
    other = features.of_classes(features.names[8:])
    fitted = ProtoNet(steps=5).meta_fit(stream(train), watch=QUIET)
    drawn = np.unique(np.concatenate([stream(train).rows(0, 50).support.reshape(-1)]))
    assert not np.isin(train.x[drawn], other.x).all(axis=1).any()
    task = stream(other).task(0)
    lied = replace(task, query=replace(task.query, y=np.zeros_like(task.query.y)))
    answers = [fitted.adapt(one)(task.query.x) for one in (task, lied)]
    np.testing.assert_array_equal(*answers)


def test_a_stream_of_tasks_of_different_sizes(features):
    tasks = Tasks((stream(features).task(0), stream(features, shot=3).task(1)))
    ProtoNet(steps=2, episodes=1).meta_fit(tasks, watch=QUIET)
    with pytest.raises(InputError, match="differ in size: use episodes=1"):
        ProtoNet(steps=2, episodes=2).meta_fit(tasks, watch=QUIET)


def test_supports_may_differ_in_size(features):
    fitted = ProtoNet(steps=0).meta_fit(stream(features), watch=QUIET)
    rows = np.r_[0:3, 10:11, 20:25]
    support = Examples(features.x[rows], np.array([0] * 3 + [1] + [2] * 5), ("a", "b", "c"))
    assert fitted.adapt(Task(support, support))(features.x[:3]).tolist() == [0, 0, 0]


def test_images_are_moved_but_not_changed_in_kind():
    x = torch.arange(2 * 3 * 64, dtype=torch.uint8).reshape(1, 2, 3, 8, 8)
    torch.manual_seed(0)
    moved = augmented({"support": x, "query": x.float()})
    assert moved["support"].dtype == torch.uint8
    assert moved["support"].shape == moved["query"].shape == x.shape
    assert (moved["support"] != x).any()
    assert set(moved["support"].unique().tolist()) <= set(x.unique().tolist())


def test_bad_input_in_one_line(features):
    fitted = ProtoNet(steps=0).meta_fit(stream(features), watch=QUIET)
    task = stream(features).task(0)
    with pytest.raises(InputError, match=r"inputs have the shape \(5,\); the learner was trained on \(8,\)"):
        fitted.adapt(task)(np.zeros((2, 5), dtype=np.float32))
    with pytest.raises(InputError, match="NaN or infinite"):
        fitted.adapt(task)(np.full((1, 8), np.nan, dtype=np.float32))
    with pytest.raises(InputError, match="protonet has no answer 'none of them'"):
        ProtoNet().meta_fit(stream(features, nota=0.5), watch=QUIET)
    with pytest.raises(InputError, match="wanted images"):
        ProtoNet().meta_fit(stream(replace(features, x=["a text"] * 120)), watch=QUIET)
    with pytest.raises(InputError, match="steps=-1"):
        ProtoNet(steps=-1)
    with pytest.raises(InputError, match="trained on 3 ways"):
        MAML(steps=0).meta_fit(stream(features), watch=QUIET).adapt(stream(features, way=4).task(0))(features.x[:1])
