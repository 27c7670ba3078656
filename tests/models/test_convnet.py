from __future__ import annotations

import numpy as np
import pytest
import torch

from palimpsest.core.errors import InputError
from palimpsest.core.precision import has_fast_bf16
from palimpsest.models.convnet import SPREAD, ConvNet, FeatureMap, halves, network_for


@pytest.mark.parametrize(("shape", "dimensions"), [((1, 28, 28), 64), ((3, 84, 84), 1600), ((1, 8, 16), 64 * 2)])
def test_sizes_of_the_literature(shape, dimensions):
    network = ConvNet(shape).eval()
    assert network.dimensions == dimensions
    assert network(torch.zeros(2, *shape)).shape == (2, dimensions)


def test_it_is_the_plain_four_blocks():
    """Against nn.Sequential in the papers' order, in float64."""
    torch.manual_seed(0)
    network = ConvNet((1, 28, 28), width=8).double()
    plain = []
    for block in range(4):
        plain += [network.layers[2 * block], network.layers[2 * block + 1], torch.nn.ReLU(), torch.nn.MaxPool2d(2)]
    x = torch.rand(5, 1, 28, 28, dtype=torch.float64)
    network.eval()
    network.standardise_by(x)
    expected = torch.nn.Sequential(*plain)((x - network.mean) / network.deviation).flatten(1)
    torch.testing.assert_close(network(x), expected, rtol=1e-12, atol=1e-12)
    assert sum(p.numel() for p in ConvNet((3, 84, 84)).parameters()) == 3 * 64 * 9 + 3 * 64 * 64 * 9 + 8 * 64


def test_bytes_and_floats_are_the_same_picture():
    network = ConvNet((1, 16, 16), width=4).eval()
    x = torch.randint(0, 256, (3, 1, 16, 16), dtype=torch.uint8)
    torch.testing.assert_close(network(x), network(x.float() / 255))


def test_group_norm_knows_no_other_image():
    network = ConvNet((1, 16, 16), width=16, norm="group").train()
    x = torch.rand(4, 1, 16, 16)
    torch.testing.assert_close(network(x)[:1], network(x[:1]), rtol=1e-4, atol=1e-5)


def test_a_feature_map_begins_as_a_similarity():
    rng = np.random.default_rng(0)
    x = (5 + 3 * rng.normal(size=(200, 6))).astype(np.float32)
    network = network_for(x)
    assert isinstance(network, FeatureMap)
    z = network(torch.from_numpy(x)).detach().numpy()
    pairs = ((z[:, None] - z) ** 2).sum(-1)
    assert pairs[~np.eye(200, dtype=bool)].mean() == pytest.approx(SPREAD, rel=0.02)
    before = ((x[:, None] - x) ** 2).sum(-1)
    np.testing.assert_allclose(pairs / pairs.max(), before / before.max(), atol=1e-4)
    assert network(torch.zeros(3, 4, 6)).shape == (3, 4, 6)  # views, one by one


def test_other_inputs_are_refused():
    for x in (["a text"], np.zeros((3, 2, 2, 2, 2))):
        with pytest.raises(InputError, match="wanted images"):
            network_for(x)
    with pytest.raises(InputError, match="unknown norm"):
        ConvNet((1, 28, 28), norm="layer")


def test_half_precision_is_for_training_alone():
    torch.manual_seed(0)
    network = ConvNet((1, 28, 28), width=16)
    x = torch.rand(8, 1, 28, 28)
    exact = network.eval()(x)
    network.bf16 = True
    torch.testing.assert_close(network(x), exact, rtol=0, atol=0)
    network.train()
    trained = network(x)
    assert trained.dtype == torch.float32
    network.bf16 = False
    plain = network(x)
    assert not torch.equal(trained, plain)
    torch.testing.assert_close(trained, plain, rtol=0.1, atol=0.1)


def test_when_half_precision_is_chosen():
    assert halves("bf16", (1, 8, 8), 4)
    assert not halves("fp32", (3, 84, 84), 64)
    assert not halves("auto", (1, 8, 8), 64)
    assert not halves("auto", (1, 28, 28), 8)
    assert halves("auto", (3, 84, 84), 64) == has_fast_bf16(
        torch.device("cuda" if torch.cuda.is_available() else "cpu")
    )
    with pytest.raises(InputError, match="unknown precision"):
        halves("fp8", (3, 84, 84), 64)
