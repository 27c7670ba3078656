"""Continual learners: NMC's sums by hand, the baselines' losses in float64, the protocol's matrix, and bad input."""

from __future__ import annotations

import signal
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from palimpsest.core.errors import InputError
from palimpsest.data.tasks import Examples
from palimpsest.learn import EWC, KNN, NMC, FineTuning, LinearProbe, LwF, Replay, load, save
from palimpsest.learn.continual.baselines import Head
from palimpsest.learn.continual.protocol import ContinualStream, Course, parted, run

QUICK = {"epochs": 3, "batch_size": 8}
ALL = [
    NMC(),
    KNN(),
    FineTuning(**QUICK),
    Replay(**QUICK, exemplars=2),
    EWC(**QUICK),
    LwF(**QUICK),
    LinearProbe(**QUICK),
]


def pool(classes: int = 6, each: int = 8, seed: int = 0, spread: float = 0.3) -> Examples:
    rng = np.random.default_rng(seed)
    y = np.repeat(np.arange(classes), each)
    centres = np.random.default_rng(7).normal(size=(classes, 5))
    return Examples(centres[y] + spread * rng.normal(size=(len(y), 5)), y, tuple("abcdefghij"[:classes]))


@pytest.fixture(scope="module")
def stream() -> ContinualStream:
    return ContinualStream(pool(), pool(seed=1), tasks=3, order_seed=4)


def test_nmc_is_the_nearest_mean_of_unit_vectors():
    train, test = pool(), pool(seed=1, spread=0.8)
    known = NMC().start().observe(train)
    unit = train.x / np.linalg.norm(train.x, axis=1, keepdims=True)
    means = np.stack([unit[train.y == label].mean(0) for label in range(6)])
    np.testing.assert_allclose(known.means.numpy(), means, rtol=0, atol=1e-14)
    queries = test.x / np.linalg.norm(test.x, axis=1, keepdims=True)
    distances = np.linalg.norm(queries[:, None] - means[None], axis=2)
    np.testing.assert_allclose(-known.scores(test.x), distances**2, atol=1e-13)
    cosine = replace(NMC(), rule="cosine").start().observe(train)
    directions = means / np.linalg.norm(means, axis=1, keepdims=True)
    np.testing.assert_array_equal(cosine.classify(test.x), (queries @ directions.T).argmax(1))


@settings(max_examples=15, deadline=None)
@given(st.integers(0, 10_000))
def test_nmc_knows_no_order_of_classes_and_states_add_up(seed: int):
    train = pool()
    first, second = (NMC().meta_fit(ContinualStream(train, train, 3, order)) for order in (0, seed))
    places = [second.names.index(name) for name in first.names]
    assert torch.equal(first.tensors["sums"], second.tensors["sums"][places])  # to the bit
    assert torch.equal(first.tensors["counts"], second.tensors["counts"][places])

    here = np.random.default_rng(seed).random(len(train)) < 0.5
    halves = [NMC().start().observe(train.take(np.flatnonzero(part))) for part in (here, ~here) if part.any()]
    merged = halves[0] if len(halves) == 1 else halves[0].merge(halves[1])
    places = [merged.names.index(name) for name in first.names]
    torch.testing.assert_close(merged.means[places], first.means, rtol=0, atol=1e-13)


def test_nmc_forgets_exactly():
    train = pool()
    known = NMC().start().observe(train)
    never = NMC().start().observe(train.of_classes(["a", "b", "d", "e", "f"]))
    left = known.forget("c")
    assert left.names == never.names
    assert torch.equal(left.means, never.means)
    some = train.take([0, 9, *range(16, 24)])  # one of a, one of b, all of c
    rest = train.take([row for row in range(len(train)) if row not in {0, 9, *range(16, 24)}])
    left = known.forget_examples(some)
    again = NMC().start().observe(rest)
    assert left.names == again.names
    torch.testing.assert_close(left.means, again.means, rtol=0, atol=1e-12)
    assert known.names == tuple("abcdef")  # as it was


@pytest.mark.parametrize(
    ("do", "message"),
    [
        (lambda known: known.forget("z"), "no class 'z' has been met"),
        (lambda known: known.forget_examples(pool(8)), "no class 'g' has been met"),
        (lambda known: known.forget_examples(pool(each=9)), "more examples of 'a' to forget"),
        (lambda known: known.merge(NMC(normalise=False).start().observe(pool())), "different features"),
        (lambda known: NMC().start().classify(pool().x), "no class has been met yet"),
        (lambda known: known.observe(pool().take([])), "no example to observe"),
        (lambda known: known.observe(replace(pool(), names=("a", "b"))), "only 2 classes have a name"),
        (lambda known: known.classify(np.ones((2, 4))), "inputs have 4 features; those before had 5"),
        (lambda known: known.classify(np.ones((2, 5, 5))), "wanted features"),
        (lambda known: known.classify(np.full((2, 5), np.nan)), "NaN or infinite"),
        (lambda known: known.classify(np.zeros((2, 5))), "all zeros"),
        (lambda known: NMC(rule="manhattan"), "manhattan"),
        (lambda known: Examples(np.full((2, 5), np.nan), np.array([0, 1]), ("a", "b")), "NaN or infinite"),
        (lambda known: KNN(neighbours=0), "nothing to look among"),
        (lambda known: FineTuning(epochs=0), "cannot be trained with"),
        (lambda known: Replay(exemplars=0), "exemplars must be at least 1"),
    ],
)
def test_bad_input_is_one_line(do, message):
    with pytest.raises(InputError, match=message) as error:
        do(NMC().start().observe(pool()))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"train": pool(1), "test": pool(1)}, "one class: there is nothing to tell apart"),
        ({"tasks": 1}, "at least 2 tasks, not 1"),
        ({"tasks": 7}, "7 tasks need at least 7 classes; there are 6"),
        ({"test": pool(7)}, "the class 'g' of the test is not among those to learn"),
        ({"test": pool(5)}, "the very classes of training"),
        ({"test": replace(pool(), y=np.full(48, 6))}, "a label without a name"),
        ({"test": pool().take(range(8))}, "the class 'b' has no example to test on"),
        ({"blur": 0.5}, "a blur needs batches"),
    ],
)
def test_a_stream_that_cannot_be(stream: ContinualStream, change, message):
    with pytest.raises(InputError, match=message):
        replace(stream, **change)


@pytest.mark.parametrize("learner", ALL, ids=lambda one: type(one).__name__)
def test_every_learner_is_repeatable_leaves_all_as_it_was_and_survives_the_disk(learner, stream, tmp_path):
    first, again = run(learner, stream), run(learner, stream)
    np.testing.assert_array_equal(first.matrix, again.matrix)
    known = first.known
    before = {name: value.clone() for name, value in known.tensors.items()}
    scores = known.scores(stream.test.x)
    known.observe(pool(8, seed=3))
    assert all(torch.equal(value, known.tensors[name]) for name, value in before.items())
    np.testing.assert_array_equal(known.scores(stream.test.x), scores)
    save(known, tmp_path / "learner")
    loaded = load(tmp_path / "learner")
    assert loaded.names == known.names
    np.testing.assert_array_equal(loaded.scores(stream.test.x), scores)
    grown = loaded.observe(pool(8, seed=3))  # and learns on
    np.testing.assert_array_equal(grown.scores(stream.test.x), known.observe(pool(8, seed=3)).scores(stream.test.x))
    assert loaded.memory_bytes == known.memory_bytes > 0


def test_memory_is_what_is_carried(stream):
    assert run(NMC(), stream).memory_bytes == 6 * 5 * 8 + 6 * 8
    assert run(Replay(**QUICK, exemplars=2), stream).kept_examples == 12
    assert run(KNN(), stream).kept_examples == 48
    assert run(KNN(exemplars=3), stream).kept_examples == 18


def test_kept_examples_are_the_same_however_large_the_batches_of_a_class_are():
    learner, train = KNN(exemplars=4), pool(2)
    known = learner.start()
    for start in range(0, 16, 4):
        known = known.observe(train.take(range(start, start + 4)))
    assert known.tensors["kept_labels"].bincount().tolist() == [4, 4]
    unit = torch.from_numpy(train.x / np.linalg.norm(train.x, axis=1, keepdims=True)).float()
    for point in known.tensors["kept"]:
        assert (unit == point).all(1).any()


def test_the_votes_of_neighbours():
    train = Examples(np.array([[0.0, 1], [0, 2], [0, 9]]), np.array([0, 1, 1]), ("near", "far"))
    known = KNN(neighbours=3, normalise=False).start().observe(train)
    assert known.classify(np.array([[0.0, 1.1]])).tolist() == [1]  # two votes to one
    known = KNN(neighbours=2, normalise=False).start().observe(train)
    assert known.classify(np.array([[0.0, 1.1]])).tolist() == [0]  # one each: the nearer


def losses(learner, seed: int = 0):
    """The learner's loss and its own parts, in float64, with an old head of two classes and a new one of three."""
    generator = torch.Generator().manual_seed(seed)
    old = {
        "weight": torch.randn(2, 4, generator=generator).double(),
        "bias": torch.randn(2, generator=generator).double(),
    }
    fisher = {f"fisher_{name}": torch.rand(value.shape, generator=generator).double() for name, value in old.items()}
    head = Head(torch.randn(3, 4, generator=generator), torch.randn(3, generator=generator)).double()
    batch = {"z": torch.randn(5, 4, generator=generator).double(), "y": torch.tensor([2, 0, 2, 1, 2])}
    known = replace(learner.start(), names=("a", "b", "c"), tensors=old | fisher)
    return old | fisher, head, batch, learner.loss(head, batch, known)


def softmax(logits: np.ndarray) -> np.ndarray:
    raised = np.exp(logits - logits.max(1, keepdims=True))
    return raised / raised.sum(1, keepdims=True)


def cross_entropy(head: Head, batch: dict[str, torch.Tensor]) -> tuple[float, np.ndarray]:
    logits = batch["z"].numpy() @ head.weight.detach().numpy().T + head.bias.detach().numpy()
    return -np.log(softmax(logits)[np.arange(5), batch["y"]]).mean(), logits


def test_the_pull_of_ewc():
    old, head, batch, loss = losses(EWC(strength=6.0))
    plain, _ = cross_entropy(head, batch)
    pull = (old["fisher_weight"] * (head.weight[:2] - old["weight"]) ** 2).sum()
    pull = pull + (old["fisher_bias"] * (head.bias[:2] - old["bias"]) ** 2).sum()
    assert loss.item() == pytest.approx(plain + 3.0 * pull.item(), rel=1e-12)


def test_the_fisher_information_is_the_expected_squared_gradient():
    train = pool(3)
    known = EWC(epochs=2).start().observe(train)
    weight, bias = (known.tensors[name].double().numpy() for name in ("weight", "bias"))
    z = train.x / np.linalg.norm(train.x, axis=1, keepdims=True)
    p = softmax(z @ weight.T + bias)
    expected = np.zeros_like(weight)
    for row in range(len(z)):  # over the model's own answers, not the labels
        for label in range(3):
            gradient = np.outer(p[row] - np.eye(3)[label], z[row])
            expected += p[row, label] * gradient**2 / len(z)
    np.testing.assert_allclose(known.tensors["fisher_weight"].numpy(), expected, rtol=2e-5, atol=1e-7)


def test_the_distillation_of_lwf():
    old, head, batch, loss = losses(LwF(strength=3.0, temperature=2.0))
    plain, logits = cross_entropy(head, batch)
    teacher = softmax((batch["z"].numpy() @ old["weight"].numpy().T + old["bias"].numpy()) / 2)
    student = softmax(logits[:, :2] / 2)
    divergence = (teacher * np.log(teacher / student)).sum(1).mean()
    assert loss.item() == pytest.approx(plain + 3.0 * 4 * divergence, rel=1e-12)


@pytest.mark.parametrize("learner", [EWC(), LwF()], ids=["ewc", "lwf"])
def test_gradients_of_what_holds_the_old(learner):
    tensors, head, batch, _ = losses(learner)
    known = replace(learner.start(), names=("a", "b", "c"), tensors=tensors)

    def value(weight, bias):
        stand_in = Head(weight.detach(), bias.detach()).double()
        stand_in.__dict__["_parameters"] = {"weight": weight, "bias": bias}
        return learner.loss(stand_in, batch, known)

    torch.autograd.gradcheck(value, (head.weight.detach().requires_grad_(), head.bias.detach().requires_grad_()))


def test_the_matrix_and_what_is_read_from_it():
    matrix = np.array([[90.0, 0, 0], [70, 80, 0], [60, 75, 50]])
    course = Course(matrix, np.array([90.0, 75, 62]), np.zeros(1, bool), 0, 0, None)
    assert course.last_accuracy == 62
    assert course.incremental_accuracy == pytest.approx((90 + 75 + 62) / 3)
    assert course.forgetting == pytest.approx(((90 - 60) + (80 - 75)) / 2)
    assert course.backward_transfer == pytest.approx(((60 - 90) + (75 - 80)) / 2)


def test_a_course_counts_right_answers(stream):
    course = run(NMC(), stream)
    known = NMC().start()
    for stage, batch in enumerate(stream.stages()):
        known = known.observe(batch[0])
        answered = np.array(known.names)[known.classify(stream.test.x)] == np.array(stream.test.names)[stream.test.y]
        for place, group in enumerate(stream.groups):
            assert course.matrix[stage, place] == 100 * answered[np.isin(stream.test.y, group)].mean()
        assert (course.matrix[stage, stage + 1 :] == 0).all()  # of a class not met nothing can be right
    assert course.last_accuracy == 100 * answered.mean()


def test_the_order_of_classes_is_seeded(stream):
    orders = [np.concatenate(replace(stream, order_seed=seed).groups).tolist() for seed in (0, 0, 1)]
    assert orders[0] == orders[1] != orders[2]
    assert sorted(orders[0]) == list(range(6))
    assert [task.support.names for task in stream] == [tuple("abcdef"[label] for label in g) for g in stream.groups]


def test_without_borders_every_example_comes_once_and_classes_overlap(stream):
    free = replace(stream, batch_size=5, blur=0.7)
    stages = list(free.stages())
    batches = [batch for stage in stages for batch in stage]
    assert max(map(len, batches)) == 5
    rows = np.concatenate([batch.x for batch in batches])
    np.testing.assert_array_equal(np.sort(rows, axis=0), np.sort(stream.train.x, axis=0))
    met = [set(np.concatenate([batch.y for batch in stage]).tolist()) for stage in stages]
    assert met[0] & met[1]  # no border
    blocked = [set(np.concatenate([b.y for b in s]).tolist()) for s in replace(free, blur=0.0).stages()]
    assert [sorted(one) for one in blocked] == [sorted(group.tolist()) for group in stream.groups]
    nmc = run(NMC(), free).known
    places = [nmc.names.index(name) for name in stream.train.names]
    whole = NMC().start().observe(stream.train)
    torch.testing.assert_close(nmc.means[places], whole.means, rtol=0, atol=1e-13)


def test_replay_remembers_what_fine_tuning_forgets(stream):
    plain, replayed = (
        run(learner, stream)
        for learner in (FineTuning(epochs=30, batch_size=8, lr=0.1), Replay(epochs=30, batch_size=8, lr=0.1))
    )
    assert plain.forgetting > replayed.forgetting + 20
    assert replayed.last_accuracy > plain.last_accuracy + 20


def test_examples_are_parted_class_by_class():
    train, test = parted(pool(), test=0.25, seed=3)
    assert train.counts.tolist() == [6] * 6
    assert test.counts.tolist() == [2] * 6
    assert not {tuple(row) for row in train.x} & {tuple(row) for row in test.x}
    with pytest.raises(InputError, match="the class 'a' has 1 example"):
        parted(pool(each=1))
    with pytest.raises(InputError, match="above 0 and below 1"):
        parted(pool(), test=1.0)


def test_ctrl_c_stops_the_stream(stream, monkeypatch):
    plain = FineTuning.loss

    def interrupted(*arguments):
        signal.raise_signal(signal.SIGINT)
        return plain(*arguments)

    monkeypatch.setattr(FineTuning, "loss", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run(FineTuning(**QUICK), stream)
