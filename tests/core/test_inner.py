import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from palimpsest.core import inner

X, Y = torch.randn(6, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0)), torch.arange(6) % 2


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)).double()


def losses(module, inputs=X, labels=Y):
    return F.cross_entropy(module(inputs), labels, reduction="none")


def train(optimiser, steps):
    module = network()
    parameters = inner.leaves(module)
    state = optimiser.start(parameters)
    for _ in range(steps):
        loss = inner.evaluate(losses, module, parameters).mean()
        parameters, state = inner.step(loss, parameters, optimiser, state)
        parameters, state = inner.detached(parameters), inner.detached(state)
    return parameters


@pytest.mark.parametrize(
    ("optimiser", "torchs"),
    [
        (inner.SGD(0.1), lambda p: torch.optim.SGD(p, 0.1)),
        (inner.Adam(0.05), lambda p: torch.optim.Adam(p, 0.05)),
        (inner.Adam(0.05, (0.8, 0.9), 1e-6, 0.1), lambda p: torch.optim.AdamW(p, 0.05, (0.8, 0.9), 1e-6, 0.1)),
    ],
)
def test_steps_are_those_of_torch(optimiser, torchs):
    module = network()
    theirs = torchs(module.parameters())
    for _ in range(5):
        theirs.zero_grad()
        losses(module).mean().backward()
        theirs.step()
    for name, value in train(optimiser, 5).items():
        torch.testing.assert_close(value, module.get_parameter(name), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("optimiser", [inner.SGD(0.3), inner.Adam(0.1)])
def test_the_gradient_through_two_steps_is_that_of_finite_differences(optimiser):
    module = network()

    def outer(weights):
        parameters = inner.leaves(module)
        state = optimiser.start(parameters)
        for _ in range(2):
            loss = (weights * inner.evaluate(losses, module, parameters)).mean()
            parameters, state = inner.step(loss, parameters, optimiser, state)
        return inner.evaluate(losses, module, parameters, X.flip(0), Y).mean()

    weights = torch.linspace(0.2, 1.0, 6, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(outer, (weights,), eps=1e-6, atol=1e-7)


def test_a_learning_rate_can_be_learnt():
    module = network()
    parameters = inner.leaves(module)
    rate = torch.tensor(0.1, dtype=torch.float64, requires_grad=True)
    loss = inner.evaluate(losses, module, parameters).mean()
    new, _ = inner.step(loss, parameters, inner.SGD(rate), None)
    (slope,) = torch.autograd.grad(inner.evaluate(losses, module, new).mean(), rate)
    gradients = torch.autograd.grad(loss, list(parameters.values()))
    assert slope < 0  # a longer step goes further down
    assert slope == pytest.approx(-sum(float(g.square().sum()) for g in gradients), rel=0.2)


def test_a_parameter_without_gradient_stays_and_its_slope_is_finite():
    parameters = {"used": torch.ones(2, requires_grad=True), "unused": torch.ones(2, requires_grad=True)}
    weight = torch.tensor(1.0, requires_grad=True)
    optimiser = inner.Adam(0.1)
    loss = (weight * parameters["used"] * torch.tensor([1.0, 0.0])).sum()
    new, state = inner.step(loss, parameters, optimiser, optimiser.start(parameters))
    assert torch.equal(new["unused"], torch.ones(2))
    assert new["used"][1] == 1
    assert state.steps == 1
    (slope,) = torch.autograd.grad(new["used"].sum(), weight)
    assert torch.isfinite(slope)


def test_the_module_keeps_its_own_parameters_and_may_be_used_in_parts():
    module = network()
    before = copy.deepcopy(module.state_dict())
    other = {name: torch.zeros_like(value) for name, value in module.named_parameters()}
    assert inner.evaluate(lambda m: m[0](X).abs().sum() + m[2].weight.sum(), module, other) == 0
    assert all(torch.equal(value, before[name]) for name, value in module.state_dict().items())


def test_attention_inside_is_twice_differentiable():
    query = torch.randn(1, 1, 4, 8, requires_grad=True)

    def slope():
        out = F.scaled_dot_product_attention(query, query, query)
        (first,) = torch.autograd.grad(out.square().sum(), query, create_graph=True)
        return torch.autograd.grad(first.square().sum(), query)[0]

    with inner.twice_differentiable():
        assert torch.isfinite(slope()).all()
    with pytest.raises(RuntimeError):
        slope()
