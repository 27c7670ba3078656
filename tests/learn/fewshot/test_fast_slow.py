from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from palimpsest.core.errors import InputError
from palimpsest.core.watch import Watch
from palimpsest.data.episodes import Episodes
from palimpsest.data.evaluation import evaluate
from palimpsest.data.tasks import Examples
from palimpsest.learn.fewshot import FastSlow
from palimpsest.learn.fewshot.fast_slow import Feedback, Memory, State, limited
from palimpsest.learn.learner import load, save

QUIET = Watch(progress=False)
WAY = 3


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def linear(state, name, x):
    return x @ state[f"{name}.weight"].T + state.get(f"{name}.bias", 0.0)


def lstm(state, name, x, h, c):
    both = x @ state[f"{name}.weight_ih"].T + state[f"{name}.bias_ih"]
    both = both + h @ state[f"{name}.weight_hh"].T + state[f"{name}.bias_hh"]
    i, f, g, o = np.split(both, 4)
    c = sigmoid(f) * c + sigmoid(i) * np.tanh(g)
    return sigmoid(o) * np.tanh(c), c


def composed(state, read, found, e):
    hidden = np.maximum(linear(state, "composer.0", np.concatenate([read, found, e])), 0)
    return linear(state, "composer.2", hidden)


def by_hand(state, xs, labels, queries, sharpness):
    """One episode, one input and one slot at a time: memory after the supports, and the logits of the queries."""
    memory = state["first"].copy()
    slots, width = memory.shape
    rh, rc, wh, wc = (np.zeros(width) for _ in range(4))

    def attention(e):
        key = linear(state, "key", e)
        powers = np.exp([sharpness * (slot @ key) / np.sqrt(width) for slot in memory])
        return powers / powers.sum()

    for x, y in zip(xs, labels, strict=True):
        e = np.maximum(linear(state, "input", x) + state["label.weight"][:, y], 0)
        rh, rc = lstm(state, "reader", e, rh, rc)
        a = attention(e)
        found = sum(a[slot] * memory[slot] for slot in range(slots))
        wh, wc = lstm(state, "writer", composed(state, rh, found, e), wh, wc)
        v = linear(state, "value", wh)
        memory = np.stack([memory[slot] * (1 - a[slot]) + a[slot] * v for slot in range(slots)])
    logits = []
    for x in queries:
        e = np.maximum(linear(state, "input", x), 0)
        h, _ = lstm(state, "reader", e, rh, rc)
        logits.append(linear(state, "output", composed(state, h, attention(e) @ memory, e)))
    return memory, np.array(logits)


def made(seed=0, tail="synthetic", window=2, episodes=3, supports=5, queries=4, d=6, **changes):
    """A learner, its float64 network with a feedback that predicts something, and the tensors of a batch."""
    learner = FastSlow(slots=4, memory_width=5, window=window, tail=tail, feedback_width=7, **changes)
    generator = torch.Generator().manual_seed(seed)
    torch.manual_seed(seed)
    network = learner.build(np.random.default_rng(seed).normal(size=(20, d)), WAY).double()
    for part in (network.feedback.controllers, network.feedback.slots):
        part[-1].reset_parameters()
    support = torch.randn(episodes, supports, d, generator=generator, dtype=torch.float64)
    query = torch.randn(episodes, queries, d, generator=generator, dtype=torch.float64)
    labels = torch.randint(WAY, (episodes, supports), generator=generator)
    answers = torch.randint(WAY, (episodes, queries), generator=generator)
    return learner, network, (support, labels, query, answers)


def test_the_memory_against_one_slot_at_a_time():
    _, network, (support, labels, query, _) = made()
    memory = network.memory
    end = memory.listen(support, labels, memory.start(3))
    logits = memory.answer(query, end)
    state = {name: value.detach().numpy() for name, value in memory.state_dict().items()}
    for episode in range(3):
        wanted = by_hand(state, support[episode].numpy(), labels[episode], query[episode].numpy(), memory.sharpness)
        np.testing.assert_allclose(end.memory[episode].detach(), wanted[0], rtol=1e-10)
        np.testing.assert_allclose(logits[episode].detach(), wanted[1], rtol=1e-9)


def test_the_memory_has_the_right_gradient():
    _, network, (support, labels, query, answers) = made(episodes=2, supports=2, queries=2)

    def loss(first, support, query):
        state = network.memory.start(2)._replace(memory=first)
        logits = network.memory.answer(query, network.memory.listen(support, labels, state))
        return F.cross_entropy(logits.flatten(0, 1), answers.flatten())

    first = torch.randn(2, 4, 5, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(loss, (first, support.requires_grad_(), query.requires_grad_()))


def test_exact_tails_are_full_back_propagation():
    learner, network, (support, labels, query, answers) = made(tail="exact")
    found = learner.gradients(network, support, labels, query, answers, "exact")
    support, query = support.clone().requires_grad_(), query.clone().requires_grad_()
    memory = network.memory
    states = [memory.start(3)]
    for first in range(0, 5, 2):
        states.append(memory.listen(support[:, first : first + 2], labels[:, first : first + 2], states[-1]))
    loss = F.cross_entropy(memory.answer(query, states[-1]).flatten(0, 1), answers.flatten())
    at = [*memory.parameters(), support, query, *(state.memory for state in states[1:])]
    wanted = torch.autograd.grad(loss, at)
    assert found.loss.item() == pytest.approx(loss.item())
    for got, want in zip([*found.parameters, found.support, found.query], wanted[:-3], strict=True):
        torch.testing.assert_close(got, want)
    for (_, target), want in zip(found.states, wanted[-3:], strict=True):
        torch.testing.assert_close(target.memory, 12 * want)  # times episodes and queries


def test_a_window_ends_with_the_predicted_gradient():
    """Window by window with one scalar each: inner products of end states with what the feedback network predicts."""
    learner, network, (support, labels, query, answers) = made(injection=0.5)
    found = learner.gradients(network, support, labels, query, answers, "synthetic")
    memory = network.memory
    told = memory.told(query, answers).detach()
    parameters = list(memory.parameters())
    sums = [torch.zeros_like(one) for one in parameters]
    state, targets = memory.start(3), []
    for number, first in enumerate(range(0, 5, 2)):
        end = memory.listen(support[:, first : first + 2], labels[:, first : first + 2], state)
        ahead = [limited(one.detach(), 4) * 0.5 / 12 for one in network.feedback(end, told)]
        value = sum((part * slope).sum() for part, slope in zip(end, ahead, strict=True))
        wanted = torch.autograd.grad(value, [*parameters, *(state if number else ())], allow_unused=True)
        sums = [total if new is None else total + new for total, new in zip(sums, wanted, strict=False)]
        targets += [wanted[-1]] if number else []
        state = State(*(part.detach().requires_grad_() for part in end))
    loss = F.cross_entropy(memory.answer(query, state).flatten(0, 1), answers.flatten())
    wanted = torch.autograd.grad(loss, [*parameters, state.memory], allow_unused=True)
    sums = [total if new is None else total + new for total, new in zip(sums, wanted, strict=False)]
    for got, want in zip(found.parameters, sums, strict=True):
        torch.testing.assert_close(got, want)
    for (_, target), want in zip(found.states, [*targets, wanted[-1]], strict=True):
        torch.testing.assert_close(target.memory, 12 * want)
        assert not target.memory.requires_grad


def test_zero_feedback_is_truncation():
    learner, network, batch = made()
    for part in (network.feedback.controllers, network.feedback.slots):
        torch.nn.init.zeros_(part[-1].weight)
        torch.nn.init.zeros_(part[-1].bias)
    synthetic, zero = (learner.gradients(network, *batch, tail) for tail in ("synthetic", "zero"))
    for got, want in zip(synthetic.parameters, zero.parameters, strict=True):
        torch.testing.assert_close(got, want)
    assert zero.support.abs().max() == 0  # nothing that was written gets a gradient
    names = [name for name, _ in network.memory.named_parameters()]
    of = dict(zip(names, zero.parameters, strict=True))
    assert of["value.weight"].abs().max() == 0
    assert of["key.weight"].abs().max() > 0


def test_a_fresh_feedback_predicts_zero():
    feedback = Feedback(5, 0, 7)
    state = State(*(torch.randn(2, 5) for _ in range(4)), torch.randn(2, 4, 5))
    assert all(part.abs().max() == 0 for part in feedback(state))
    assert [part.shape for part in feedback(state)] == [part.shape for part in state]


def test_the_loss_hands_on_the_gradients_it_found():
    learner, network, (support, labels, query, answers) = made(warm_up=1.0)
    batch = {"support": support, "support_labels": labels, "query": query, "labels": answers}
    torch.manual_seed(3)
    value, logs = learner.loss(network, batch | {"number": torch.arange(3)}, WAY)
    value.backward()
    torch.manual_seed(3)
    order = torch.rand(3, 5).argsort(1)
    memory, encoder = network.memory, network.encoder
    shuffled = encoder(support.gather(1, order[..., None].expand_as(support)))
    end = memory.listen(shuffled, labels.gather(1, order), memory.start(3))
    wanted = F.cross_entropy(memory.answer(encoder(query), end).flatten(0, 1), answers.flatten())
    assert value.item() == pytest.approx(wanted.item())
    trained = [*memory.parameters(), *encoder.parameters()]
    for parameter, want in zip(trained, torch.autograd.grad(wanted, trained), strict=True):
        torch.testing.assert_close(parameter.grad, want)
    norm = torch.cat([one.grad.flatten() for one in network.feedback.parameters()]).norm()
    assert 0 < norm <= 0.1 + 1e-9
    assert set(logs) == {"feedback", "cosine"}
    assert -1 <= logs["cosine"] <= 1


def test_the_feedback_learns_a_gradient_that_does_not_change():
    learner, network, batch = made(tail="exact")
    found = learner.gradients(network, *batch, "exact")
    optimiser = torch.optim.Adam(network.feedback.parameters(), lr=1e-2)
    before, _ = learner.feedback_loss(network, found)
    for _ in range(300):
        optimiser.zero_grad()
        loss, logs = learner.feedback_loss(network, found)
        loss.backward()
        optimiser.step()
    assert loss < 0.05 * before
    assert logs["cosine"] > 0.9


def test_a_long_gradient_is_limited_episode_by_episode():
    gradient = torch.tensor([[3.0, 4.0], [0.3, 0.4], [0.0, 0.0]])
    torch.testing.assert_close(limited(gradient, 1.0), torch.tensor([[0.6, 0.8], [0.3, 0.4], [0.0, 0.0]]))


@pytest.fixture(scope="module")
def pool():
    rng = np.random.default_rng(0)
    y = np.repeat(np.arange(12), 6)
    x = 2 * rng.normal(size=(12, 8))[y] + 0.3 * rng.normal(size=(72, 8))
    return Examples(x.astype(np.float32), y, tuple(f"class {label}" for label in range(12)))


def test_it_learns_to_recall(pool):
    train, test = pool.of_classes(pool.names[:9]), pool.of_classes(pool.names[9:])
    stream = Episodes(pool=train, way=2, shot=1, queries=2)
    watch = Watch(progress=False)
    learner = FastSlow(steps=250, lr=1e-2, warm_up=1.0)
    fitted = learner.meta_fit(stream, watch=watch)
    losses = watch.traces["meta-training"].losses
    assert np.mean(losses[-20:]) < 0.75 * np.mean(losses[:20])
    assert evaluate(fitted, Episodes(pool=test, way=2, shot=1, queries=2, count=200)).accuracy.mean() > 0.6


def test_the_same_each_time_and_from_disk(pool, tmp_path):
    stream = Episodes(pool=pool, way=WAY, shot=2, queries=2)
    x, y = pool.x.copy(), pool.y.copy()
    learner = FastSlow(steps=6, episodes=4, lr=1e-2)
    first, second = (learner.meta_fit(stream, watch=QUIET) for _ in range(2))
    state = second.network.state_dict()
    for name, value in first.network.state_dict().items():
        assert torch.equal(value, state[name])
    np.testing.assert_array_equal(pool.x, x)
    np.testing.assert_array_equal(pool.y, y)
    task = stream.task(0)
    logits = first.adapt(task).logits(task.query.x)
    lied = replace(task, query=replace(task.query, y=1 - np.minimum(task.query.y, 1)))
    np.testing.assert_array_equal(first.adapt(lied).logits(task.query.x), logits)
    save(first, tmp_path / "learner")
    np.testing.assert_array_equal(load(tmp_path / "learner").adapt(task).logits(task.query.x), logits)


def test_the_feedback_network_has_no_part_in_an_answer(pool):
    """`conditioned` tells it of the labels of the queries: nothing of it may reach what a query is answered."""
    stream = Episodes(pool=pool, way=WAY, shot=2, queries=2)
    fitted = FastSlow(steps=3, episodes=4, warm_up=0.0).meta_fit(stream, watch=QUIET)
    rows = stream.rows(0, 20)
    before = fitted.answer(stream, rows)
    for parameter in fitted.network.feedback.parameters():
        torch.nn.init.constant_(parameter, torch.nan)
    np.testing.assert_array_equal(fitted.answer(stream, rows), before)


def test_the_feedback_network_is_told_of_each_class():
    _, network, (_, _, query, answers) = made()
    answers[0] = 1
    told = network.memory.told(query, answers)
    inputs = network.memory.input(query).relu()
    torch.testing.assert_close(told[0, 5:10], inputs[0].mean(0))
    assert told[0, :5].abs().max() == told[0, 10:].abs().max() == 0


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"tail": "half"}, "unknown tail 'half'"),
        ({"window": 0}, "window must be at least 1, not 0"),
        ({"slots": 0}, "slots must be at least 1"),
        ({"warm_up": 1.5}, "warm_up=1.5"),
        ({"injection": 0.0}, "injection=0.0"),
    ],
)
def test_bad_settings(changes, message):
    with pytest.raises(InputError, match=message):
        FastSlow(**changes)


def test_bad_input(pool):
    with pytest.raises(InputError, match="7 shots"):
        Episodes(pool=pool, way=WAY, shot=7, queries=2)
    with pytest.raises(InputError, match="2 ways need 2 classes; the pool has 1"):
        Episodes(pool=pool.of_classes(["class 0"]), way=2)
    with pytest.raises(InputError, match="NaN or infinite"):
        Examples(np.full((4, 2), np.nan), np.array([0, 0, 1, 1]), ("a", "b"))
    stream = Episodes(pool=pool, way=WAY, shot=2, queries=2)
    fitted = FastSlow(steps=1).meta_fit(stream, watch=QUIET)
    with pytest.raises(InputError, match="4 ways; the learner was trained on 3 ways"):
        fitted.adapt(Episodes(pool=pool, way=4, shot=1, queries=2).task(0))
    with pytest.raises(InputError, match="leave out the views"):
        FastSlow(steps=1).meta_fit(replace(stream, pool=replace(pool, x=pool.x[:, None])), watch=QUIET)


def test_memories_of_one_slot_work():
    memory = Memory(4, WAY, 1, 5, 4.0)
    end = memory.listen(torch.randn(2, 3, 4), torch.tensor([[0, 1, 2], [2, 1, 0]]), memory.start(2))
    assert memory.answer(torch.randn(2, 2, 4), end).shape == (2, 2, WAY)
