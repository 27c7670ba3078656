import numpy as np
import pytest
import torch
from torch import nn

from palimpsest.core.errors import InputError
from palimpsest.curate import noise
from palimpsest.curate.samples import Draws, Vectors


def samples(count=60):
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(count, 3, generator=generator)
    return Vectors(inputs, (inputs[:, 0] > 0).long() + (inputs[:, 1] > 0).long(), 3)


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Linear(8, 3))


def test_the_share_that_was_asked_for_is_wrong():
    labels = torch.arange(100) % 5
    for how in ("uniform", "next"):
        noisy, wrong = noise.flipped(labels, 5, 0.4, 0, how)
        assert int(wrong.sum()) == 40
        assert torch.equal(noisy != labels, wrong)
    assert torch.equal(noisy[wrong], (labels[wrong] + 1) % 5)
    assert len((noise.flipped(labels, 5, 1.0, 0)[0] - labels).unique()) > 2


def test_draws_see_every_sample_once_an_epoch():
    draws = Draws(10, 4, 0)
    seen = np.concatenate([draws.rows(step) for step in range(draws.steps(2))])
    assert sorted(seen[:10]) == sorted(seen[10:20]) == list(range(10))
    assert len(set(draws.beside(0))) == 4
    assert not np.array_equal(draws.beside(0), draws.beside(1))


def test_gradients_of_the_last_layer_are_outer_products():
    model, given = network(), samples()
    batch = given.batch(np.arange(5))
    inputs, slopes = noise.last_layer(model, model[2], given, batch)
    for row in range(5):
        model.zero_grad()
        given.outcome(model, given.batch(np.array([row]))).loss.sum().backward()
        torch.testing.assert_close(torch.outer(slopes[row], inputs[row]), model[2].weight.grad)
        torch.testing.assert_close(slopes[row], model[2].bias.grad)


def test_agra_keeps_what_points_the_same_way():
    given, seen = samples(), {}
    plain = noise.Plain(epochs=0.1, lr=1e-3, batch_size=6)

    def train(model, samples, weigh, beside):
        batch = {"own": samples.batch(np.arange(6)), "beside": samples.batch(np.arange(6, 12))}
        seen["kept"] = weigh(model, batch, torch.zeros(6))
        return model

    object.__setattr__(plain, "train", train)
    model = network()
    plain.agra(model, given)

    def gradient(rows):
        model.zero_grad()
        given.outcome(model, given.batch(rows)).loss.sum().backward()
        return torch.cat([model[2].weight.grad.flatten(), model[2].bias.grad])

    other = gradient(np.arange(6, 12))
    kept = [float(gradient(np.array([row])) @ other >= 0) for row in range(6)]
    assert seen["kept"].tolist() == kept
    assert 0 < sum(kept) < 6


def test_every_way_of_training_learns():
    given, plain = samples(), noise.Plain(epochs=30, lr=2e-2, batch_size=8)
    model = network()
    for trained in (
        plain.train(model, given),
        plain.small_loss(model, given, 0.1),
        plain.agra(model, given),
        plain.stopped_early(model, given.select(np.arange(48)), given.select(np.arange(48, 60))),
    ):
        assert noise.agreement(trained, given) > 0.85
    assert noise.agreement(model, given) < 0.7


def test_small_losses_are_kept_more_and_more_strictly():
    kept = []

    def train(model, samples, weigh):
        kept.extend(int(weigh(model, None, torch.arange(8.0)).sum()) for _ in range(100))

    plain = noise.Plain(epochs=1, lr=1e-3, batch_size=8)
    object.__setattr__(plain, "train", train)
    plain.small_loss(network(), samples(40), 0.5)
    assert kept[0] == 8
    assert kept[-1] == 4
    assert kept == sorted(kept, reverse=True)


def test_bad_input_is_one_line():
    with pytest.raises(InputError, match="share must lie between 0 and 1"):
        noise.flipped(torch.zeros(2, dtype=torch.int64), 2, 1.5, 0)
    with pytest.raises(InputError, match="unknown kind of noise"):
        noise.flipped(torch.zeros(2, dtype=torch.int64), 2, 0.5, 0, "asymmetric")
    with pytest.raises(InputError, match="the model has none"):
        noise.Plain(1, 1e-3, 8).agra(nn.Conv1d(1, 1, 1), samples())
