import math
from statistics import NormalDist

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from palimpsest.curate import rescaler
from palimpsest.curate.samples import Outcome

MEANS, SPREADS = st.floats(-5, 5), st.floats(0.05, 4)


def outcome(losses, confidences, agrees):
    return Outcome(torch.tensor(losses), torch.tensor(confidences), torch.tensor(agrees))


@settings(max_examples=80, deadline=None)
@given(MEANS, SPREADS, MEANS, SPREADS)
@example(0.0, 0.05000000000000001, 1.0, 0.05)
def test_distances_of_two_normals(mean, spread, usual, usual_spread):
    values = [torch.tensor([value], dtype=torch.float64) for value in (mean, spread, usual, usual_spread)]
    if math.isclose(spread, usual_spread, rel_tol=1e-6):  # there the library's own formula loses all digits
        overlap = 2 * NormalDist().cdf(-abs(mean - usual) / (spread + usual_spread))
    else:
        overlap = NormalDist(mean, spread).overlap(NormalDist(usual, usual_spread))
    assert float(rescaler.overlap(*values)) == pytest.approx(overlap, abs=1e-7)
    x = np.linspace(mean - 9 * spread, mean + 9 * spread, 20_001)
    density = np.exp(-0.5 * ((x - mean) / spread) ** 2) / (spread * np.sqrt(2 * np.pi))
    log_ratio = (
        np.log(usual_spread / spread) - 0.5 * ((x - mean) / spread) ** 2 + 0.5 * ((x - usual) / usual_spread) ** 2
    )
    integral = np.trapezoid(density * log_ratio, x)
    assert float(rescaler.divergence(*values)) == pytest.approx(min(integral, 50), abs=1e-4)


def test_distances_where_a_normal_has_no_width():
    mean, flat = torch.tensor([1.0, 1.0], dtype=torch.float64), torch.tensor([0.0, 0.0], dtype=torch.float64)
    spread = torch.tensor([1.0, 1e-9], dtype=torch.float64)
    assert rescaler.divergence(mean, flat, mean, spread).tolist() == [0, 0]
    assert float(rescaler.divergence(mean, spread, mean + 1, spread)[1]) == 50
    assert rescaler.overlap(mean, flat, mean, flat).tolist() == [1, 1]
    assert float(rescaler.overlap(mean, flat, mean + 1, flat)[0]) == 0


def test_signals_are_means_spreads_and_the_majority():
    passes = [
        outcome([1.0, 2.0], [0.5, 0.5], [True, False]),
        outcome([2.0, 2.0], [0.7, 0.5], [False, True]),
        outcome([3.0, 5.0], [0.9, 0.5], [True, False]),
    ]
    found = rescaler.observe(passes)
    assert found.values[0].tolist() == pytest.approx([2, 1, 0.7, 0.2])
    assert found.values[1].tolist() == pytest.approx([3, 3**0.5, 0.5, 0])
    assert found.agrees.tolist() == [True, False]
    assert rescaler.observe(passes[:2]).agrees.tolist() == [True, False]  # ties: the first pass decides
    assert rescaler.observe(passes[:1]).values[:, 1].tolist() == [0, 0]


def test_statistics_of_groups():
    rng = np.random.default_rng(0)
    values, groups = rng.normal(size=(9, 2)), np.array([0, 3, 3, 0, 3, 5, 0, 0, 3])
    wanted = np.array([3, 5, 0])
    mean, deviation = rescaler.group_statistics(*map(torch.from_numpy, (values, groups, wanted)))
    for row, group in enumerate(wanted):
        inside = values[groups == group]
        assert mean[row].tolist() == pytest.approx(inside.mean(0))
        assert deviation[row].tolist() == pytest.approx(inside.std(0, ddof=1) if len(inside) > 1 else [1e-8] * 2)


def test_a_sample_is_compared_with_those_of_its_class_and_belief():
    memory = rescaler.Memory()
    values = torch.rand(6, 4, dtype=torch.float64)
    agrees = torch.tensor([True, True, False, False, True, True])
    classes = torch.tensor([0, 0, 0, 0, 1, 1])
    features = memory(rescaler.Signals(values, agrees), classes)
    assert features.shape == (6, 19)
    torch.testing.assert_close(features[:, 0].double(), values[:, 0], rtol=1e-6, atol=1e-6)
    for pair in ([0, 1], [2, 3], [4, 5]):
        inside = values[pair]
        for signal in range(4):
            own = features[pair, 3 * signal : 3 * signal + 3].double()
            torch.testing.assert_close(own[:, 1], inside[:, signal].mean().expand(2), rtol=1e-6, atol=1e-6)
            torch.testing.assert_close(own[:, 2], inside[:, signal].std().expand(2), rtol=1e-6, atol=1e-6)
        kl = rescaler.divergence(inside[:, 0], inside[:, 1], inside[:, 0].mean(), inside[:, 1].mean())
        torch.testing.assert_close(features[pair, 12].double(), kl, rtol=1e-5, atol=1e-6)
    assert features[:, 18].tolist() == agrees.float().tolist()
    together = rescaler.Memory(by_agreement=False)(rescaler.Signals(values, agrees), classes)
    assert together[0, 1] == pytest.approx(float(values[:4, 0].mean()), rel=1e-6)
    assert rescaler.Memory(features="loss")(rescaler.Signals(values, agrees), classes).shape == (6, 2)


@pytest.mark.parametrize(("window", "expected"), [(1, 3.0), (2, 2.5), (0, 2.0)])
def test_the_window_is_how_many_batches_count(window, expected):
    memory = rescaler.Memory(window)
    for value in (1.0, 2.0, 3.0):
        signals = rescaler.Signals(torch.full((2, 4), value, dtype=torch.float64), torch.tensor([True, True]))
        features = memory(signals, torch.zeros(2, dtype=torch.int64))
    assert float(features[0, 1]) == expected
    assert len(memory.kept) == (window or 3)


def test_weights_lie_around_a_half_and_a_sample_alone_gets_it():
    torch.manual_seed(0)
    net = rescaler.Rescaler(19, groups=2)
    features, groups = torch.randn(33, 19), torch.tensor([0] * 32 + [1])
    weights = net(features, groups)
    assert weights[32] == 0.5
    assert 0.3 < float(weights[:32].detach().mean()) < 0.7
    odds = (weights[:32] / (1 - weights[:32])).log().detach()
    assert float(odds.mean()) == pytest.approx(0, abs=1e-5)  # logits are centred, whatever is learned
    torch.testing.assert_close(net(features.flip(0), groups.flip(0)).flip(0), weights)


def test_standardising_is_batch_norm_without_parameters():
    values = torch.randn(8, 3)
    torch.testing.assert_close(rescaler.standardised(values), torch.nn.BatchNorm1d(3, affine=False)(values))


def test_binary_weights_pass_a_clipped_gradient():
    weights = torch.tensor([0.2, 0.6, 0.7], requires_grad=True)
    cut = rescaler.binary(weights, 0.5)
    assert cut.tolist() == [0, 1, 1]
    (cut * torch.tensor([5.0, 0.5, -3.0])).sum().backward()
    assert weights.grad.tolist() == [1.0, 0.5, -1.0]
