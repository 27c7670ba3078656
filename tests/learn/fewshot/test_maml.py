from __future__ import annotations

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from palimpsest.core.errors import InputError
from palimpsest.learn.fewshot import ANIL, MAML


def batch(rng, d=6):
    return {
        "support": torch.from_numpy(rng.normal(size=(4, 3, d))),
        "query": torch.from_numpy(rng.normal(size=(4, 5, d))),
        "support_labels": torch.tensor([[0, 1, 2]] * 4),
        "labels": torch.from_numpy(rng.integers(0, 3, size=(4, 5))),
    }


def network_of(learner, d=6):
    torch.manual_seed(0)
    return learner.build(torch.randn(20, d), 3).double()


def by_hand(learner, network, data, only_head):
    """A plain loop over the tasks with autograd, as in the papers' pseudo-code."""
    total = 0.0
    for task in range(4):
        weights = dict(network.named_parameters())
        moving = [name for name in weights if not only_head or name.startswith("head")]

        def output(x, weights):
            z = ((x - network.encoder.mean) * network.encoder.gain) @ weights["encoder.weight"]
            return z @ weights["head.weight"].T + weights["head.bias"]

        for _ in range(learner.inner_steps):
            loss = F.cross_entropy(output(data["support"][task], weights), data["support_labels"][task])
            slopes = torch.autograd.grad(loss, [weights[name] for name in moving], create_graph=True)
            slopes = [slope.detach() for slope in slopes] if learner.first_order else slopes
            weights = weights | {n: weights[n] - learner.inner_lr * s for n, s in zip(moving, slopes, strict=True)}
        total = total + F.cross_entropy(output(data["query"][task], weights), data["labels"][task]) / 4
    return total


@pytest.mark.parametrize("kind", [MAML, ANIL])
@pytest.mark.parametrize("first_order", [False, True])
def test_loss_and_meta_gradient_are_those_of_a_plain_loop(kind, first_order):
    learner = kind(inner_steps=2, inner_lr=0.3, first_order=first_order)
    network = network_of(learner)
    data = batch(np.random.default_rng(0))
    values = learner.loss(network, data, 3), by_hand(learner, network, data, kind is ANIL)
    sides = [(value.item(), torch.autograd.grad(value, list(network.parameters()))) for value in values]
    (ours, our_slopes), (theirs, their_slopes) = sides
    assert ours == pytest.approx(theirs, rel=1e-12)
    for a, b in zip(our_slopes, their_slopes, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)


def test_the_meta_gradient_is_of_second_order():
    """Against finite differences of the loss after adaptation, which first order would miss."""
    learner = MAML(inner_steps=1, inner_lr=0.5)
    network = network_of(learner)
    data = batch(np.random.default_rng(1))
    weight = network.head.weight
    (slope,) = torch.autograd.grad(learner.loss(network, data, 3), [weight])
    step = torch.zeros_like(weight)
    step[1, 2] = 1e-6
    values = []
    for sign in (1, -1):
        with torch.no_grad():
            weight += sign * step
            values.append(learner.loss(network, data, 3).item())
            weight -= sign * step
    assert slope[1, 2].item() == pytest.approx((values[0] - values[1]) / 2e-6, rel=1e-5)
    first = MAML(inner_steps=1, inner_lr=0.5, first_order=True)
    (other,) = torch.autograd.grad(first.loss(network, data, 3), [weight])
    assert not torch.allclose(slope, other, rtol=1e-2)


def test_steps_that_cannot_be():
    with pytest.raises(InputError, match="at least one inner step"):
        MAML(inner_steps=0)
