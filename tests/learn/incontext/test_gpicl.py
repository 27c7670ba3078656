"""GPICL: what the model is shown, the face of the learner, the diagnosis, and the classifiers it is held against."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from palimpsest.core.errors import InputError
from palimpsest.core.watch import Watch
from palimpsest.data.episodes import Episodes
from palimpsest.data.projections import BaseSet, Projections
from palimpsest.data.tasks import Examples, Task
from palimpsest.learn.incontext.gpicl import (
    CLASSIFIERS,
    GPICL,
    Curve,
    Diagnosis,
    InContextClassifier,
    agreement,
    context_baselines,
    curve_of,
    diagnose,
    evaluation,
    online_sgd,
    plateau_exit,
    study,
    tokens,
)

QUIET = Watch(progress=False)
TINY = {"width": 16, "layers": 2, "heads": 2, "steps": 4, "lr": 1e-3}


@pytest.fixture(scope="module")
def digits() -> BaseSet:
    return BaseSet.bundled("digits").only([0, 1, 2])


@pytest.fixture(scope="module")
def stream(digits: BaseSet) -> Projections:
    return Projections(digits, tasks=4, features=8, length=8, batch_size=16)


@pytest.fixture(scope="module")
def memoriser(stream: Projections) -> InContextClassifier:
    return GPICL(**TINY | {"steps": 150, "lr": 5e-3}).meta_fit(stream, watch=QUIET)


def task(classes: int = 3, shots: int = 5, seed: int = 0) -> Task:
    rng = np.random.default_rng(seed)
    y = np.arange(shots) % classes
    names = tuple("abcdefgh"[:classes])
    return Task(
        Examples(rng.standard_normal((shots, 6)), y, names), Examples(rng.standard_normal((4, 6)), y[:4], names)
    )


def test_the_label_of_an_example_is_shown_with_the_next_one() -> None:
    x, y = torch.arange(6.0).view(1, 3, 2), torch.tensor([[2, 0, 1]])
    assert tokens(x, y, 3).tolist() == [[[0, 1, 0, 0, 0], [2, 3, 0, 0, 1], [4, 5, 1, 0, 0]]]


def test_few_tasks_are_memorised(memoriser: InContextClassifier, stream: Projections, digits: BaseSet) -> None:
    seen, unseen = evaluation(stream, digits)
    found = diagnose(memoriser, seen, unseen, {"others": replace(unseen, base=BaseSet.bundled("wine"))})
    assert found.verdict == "memorisation"
    assert found.seen.first > 0.8  # before a single example
    assert abs(found.unseen.last - 1 / 3) < 0.1
    assert len(found.others["others"].accuracy) == 8
    assert not set(seen(0)["task"].tolist()) & set(unseen(0)["task"].tolist())


@pytest.mark.parametrize("kind", ["transformer", "lstm", "fast-weights", "vsml"])
def test_position_0_knows_nothing_of_a_label(kind: str, stream: Projections) -> None:
    fitted = GPICL(kind=kind, **TINY | {"width": 4, "steps": 2}).meta_fit(stream, watch=QUIET)  # type: ignore[arg-type]
    batch = stream(0)
    other = (batch["y"] + 1) % 3
    mine, theirs = (fitted.logits(batch["x"], y) for y in (batch["y"], other))
    assert torch.equal(mine[:, 0], theirs[:, 0])
    assert not torch.allclose(mine[:, 1], theirs[:, 1])


def test_training_repeats_and_the_loss_can_be_scaled_for_a_smaller_epsilon(stream: Projections) -> None:
    learner = GPICL(**TINY)
    watches = [Watch(progress=False) for _ in range(3)]
    first, second = (learner.meta_fit(stream, watch=watch) for watch in watches[:2])
    batch = stream(9)
    assert torch.equal(first.logits(batch["x"], batch["y"]), second.logits(batch["x"], batch["y"]))
    coarse = replace(learner, adam_epsilon=1e-8, clip=2.0).meta_fit(stream, watch=watches[2])
    trace, other = (watch.traces["meta-training"] for watch in (watches[0], watches[2]))
    assert trace.logs["nll"] == pytest.approx(other.logs["nll"], rel=1e-4)  # epsilon hardly matters where gradients are
    assert trace.losses[0] == pytest.approx(100 * other.losses[0])
    assert coarse.learner.adam_epsilon == 1e-8


def test_a_predictor_answers_each_query_by_itself(memoriser: InContextClassifier) -> None:
    one = task()
    predictor = memoriser.adapt(one)
    queries = np.asarray(one.query.x)
    answers = predictor(queries)
    assert answers.shape == (4,)
    assert answers.dtype == np.int64
    alone = np.concatenate([predictor.probabilities(query[None]) for query in queries])
    np.testing.assert_allclose(predictor.probabilities(queries), alone, atol=1e-5)
    np.testing.assert_allclose(alone.sum(1), 1)
    assert predictor.probabilities(np.zeros((0, 6))).shape == (0, 3)
    assert memoriser.adapt(task(classes=2)).probabilities(queries).shape == (4, 2)  # fewer classes than the model knows


def test_it_learns_from_a_stream_of_episodes_and_survives_the_disk(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    pool = Examples.of(rng.standard_normal((40, 6)), np.repeat(np.arange(4), 10))
    learner = GPICL(**TINY, features=5, length=6, batch_size=4)
    fitted = learner(Episodes(pool=pool, way=3, shot=2, queries=2), watch=QUIET)
    fitted.write(tmp_path)
    read = learner.read(tmp_path)
    queries = rng.standard_normal((3, 6))
    np.testing.assert_array_equal(
        fitted.adapt(task()).probabilities(queries), read.adapt(task()).probabilities(queries)
    )


@pytest.mark.parametrize(
    ("seen", "unseen", "verdict"),
    [
        ([0.9, 0.9, 0.9, 0.9], [0.3, 0.3, 0.3, 0.3], "memorisation"),
        ([0.4, 0.5, 0.8, 0.9], [0.3, 0.3, 0.3, 0.3], "task identification"),
        ([0.3, 0.3, 0.6, 0.7], [0.3, 0.3, 0.6, 0.7], "learning to learn"),
        ([0.3, 0.3, 0.3, 0.3], [0.3, 0.3, 0.3, 0.3], "not learned"),
    ],
)
def test_verdicts(seen: list[float], unseen: list[float], verdict: str) -> None:
    assert Diagnosis(Curve(tuple(seen)), Curve(tuple(unseen)), chance=1 / 3).verdict == verdict


def test_curves_and_the_end_of_the_plateau(memoriser: InContextClassifier, stream: Projections) -> None:
    curve = Curve((0.2, 0.4, 0.5, 0.9))
    assert (curve.first, curve.last, curve.improvement) == pytest.approx((0.3, 0.9, 0.6))
    batch = stream(0)
    right = memoriser.logits(batch["x"], batch["y"]).argmax(-1) == batch["y"]
    assert curve_of(memoriser, stream, 1).accuracy == pytest.approx(right.double().mean(0).tolist())
    assert plateau_exit([0.3] * 10 + [0.9] * 10, 1 / 3, window=4) == 11  # a window with 1 of 4 above is 0.45 on average
    assert plateau_exit([0.3] * 10, 1 / 3) is None


def test_classifiers_on_the_same_context() -> None:
    generator = torch.Generator().manual_seed(0)
    centres = 4 * torch.eye(3)
    y = torch.arange(12).repeat(5, 1) % 3
    x = centres[y] + 0.3 * torch.randn(5, 12, 3, generator=generator)
    wanted = torch.tensor([[0, 1, 2]] * 5)
    for classify in CLASSIFIERS.values():
        assert torch.equal(classify(x, y, centres.expand(5, -1, -1), 3), wanted)
    only = CLASSIFIERS["class mean"](x[:, :2], y[:, :2], centres.expand(5, -1, -1), 3)
    assert only.max() == 1  # class 2 has no example
    weights = torch.zeros(3, 2)
    for example, label in zip(x[0], y[0] % 2, strict=True):
        wrong = (example @ weights).softmax(0) - torch.nn.functional.one_hot(label, 2)
        weights -= 0.1 * torch.outer(example, wrong)
    assert torch.equal(online_sgd(x[:1], y[:1] % 2, x[:1], 2)[0], (x[0] @ weights).argmax(1))


def test_baselines_and_agreement_share_their_contexts(memoriser: InContextClassifier, stream: Projections) -> None:
    found = context_baselines(stream, batches=2)
    assert found.keys() == agreement(memoriser, stream, batches=2).keys() == CLASSIFIERS.keys()
    batch = stream(0)
    by_hand = (
        CLASSIFIERS["1-NN"](batch["x"][:, :-1], batch["y"][:, :-1], batch["x"][:, -1:], 3)[:, 0] == batch["y"][:, -1]
    )
    assert context_baselines(stream, batches=1)["1-NN"] == pytest.approx(float(by_hand.double().mean()))


def test_a_study_trains_every_learner_on_every_number_of_tasks(digits: BaseSet) -> None:
    learners = [GPICL(**TINY), GPICL(**TINY | {"kind": "lstm", "width": 4})]
    trials = study(learners, (2, 4), digits, digits, watch=QUIET, features=4, length=5, batch_size=4)
    assert [(trial.kind, trial.tasks) for trial in trials] == [
        ("transformer", 2),
        ("transformer", 4),
        ("lstm", 2),
        ("lstm", 4),
    ]
    assert trials[0].state == 2 * 16 * 2 * 4
    assert all(len(trial.diagnosis.unseen.accuracy) == 5 for trial in trials)


def test_bad_input_is_said(memoriser: InContextClassifier, stream: Projections) -> None:
    with pytest.raises(InputError, match="adam_epsilon must be positive"):
        GPICL(adam_epsilon=0)
    with pytest.raises(InputError, match="length must be at least 1"):
        GPICL(length=0)
    with pytest.raises(InputError, match="unbiased streams"):
        diagnose(memoriser, replace(stream, bias=0.5), stream)
    with pytest.raises(InputError, match="4 classes, the model knows 3"):
        memoriser.adapt(task(classes=4))
    with pytest.raises(InputError, match="trained on sequences of 8: give at most 7 examples"):
        memoriser.adapt(task(shots=8))
    with pytest.raises(InputError, match="the class 'a' has no example in the support"):
        memoriser.adapt(replace(task(), support=task().support.take([])))
    bad = np.zeros((2, 6))
    bad[1, 2] = np.nan
    with pytest.raises(InputError, match="row 1, column 2 is NaN or infinite"):
        memoriser.adapt(task())(bad)
