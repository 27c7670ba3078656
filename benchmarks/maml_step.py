"""One meta-training step of MAML: 32 tasks through one `vmap`, against `learn2learn`'s loop over them.

The network of Finn et al. 2017 for Omniglot without convolutions (784-256-128-64-64-5), 5-way 1-shot, 15 queries, one
inner step, second order.  Loss and gradient must agree in float64.  Where learn2learn cannot be imported, a plain loop
with autograd stands in for it, and the line in the results says so.

    pip install learn2learn
    python benchmarks/maml_step.py
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F

from common import in_turns, ratio_of, report
from palimpsest.learn import MAML

TASKS, WAY, QUERIES, INNER_LR = 32, 5, 75, 0.4
SIZES = (784, 256, 128, 64, 64)
Batch = dict[str, Tensor]


class Encoder(nn.Sequential):
    """The hidden layers."""

    dimensions = SIZES[-1]

    def __init__(self) -> None:
        layers = [part for a, b in pairwise(SIZES) for part in (nn.Linear(a, b), nn.ReLU())]
        super().__init__(*layers)


def network() -> nn.Module:
    from palimpsest.learn.fewshot.maml import Classifier

    torch.manual_seed(0)
    return Classifier(Encoder(), head=nn.Linear(SIZES[-1], WAY))


def batch(kind: torch.dtype = torch.float32) -> Batch:
    rng = np.random.default_rng(0)
    return {
        "support": torch.from_numpy(rng.normal(size=(TASKS, WAY, SIZES[0]))).to(kind),
        "query": torch.from_numpy(rng.normal(size=(TASKS, QUERIES, SIZES[0]))).to(kind),
        "support_labels": torch.arange(WAY).expand(TASKS, -1),
        "labels": torch.from_numpy(rng.integers(0, WAY, (TASKS, QUERIES))),
    }


def learn2learn_loss(model: nn.Module, data: Batch) -> Tensor:
    from learn2learn.algorithms import MAML as Theirs

    meta = Theirs(model, lr=INNER_LR)
    total = torch.zeros((), dtype=data["query"].dtype)
    for task in range(TASKS):
        clone = meta.clone()
        clone.adapt(F.cross_entropy(clone(data["support"][task]), data["support_labels"][task]))
        total = total + F.cross_entropy(clone(data["query"][task]), data["labels"][task])
    return total / TASKS


def plain_loss(model: nn.Module, data: Batch) -> Tensor:
    total = torch.zeros((), dtype=data["query"].dtype)
    for task in range(TASKS):
        weights = dict(model.named_parameters())
        inner = F.cross_entropy(functional_call(model, weights, (data["support"][task],)), data["support_labels"][task])
        slopes = torch.autograd.grad(inner, list(weights.values()), create_graph=True)
        fast = {name: w - INNER_LR * slope for (name, w), slope in zip(weights.items(), slopes, strict=True)}
        total = total + F.cross_entropy(functional_call(model, fast, (data["query"][task],)), data["labels"][task])
    return total / TASKS


def our_loss(model: nn.Module, data: Batch) -> Tensor:
    return MAML(inner_lr=INNER_LR, inner_steps=1).loss(model, data, WAY)


def step_of(loss: Callable[[nn.Module, Batch], Tensor]) -> Callable[[], None]:
    model, data = network(), batch()
    adam = torch.optim.Adam(model.parameters(), lr=1e-3, fused=True)

    def step() -> None:
        for _ in range(10):
            adam.zero_grad()
            loss(model, data).backward()
            adam.step()

    return step


def same_numerics(other: Callable[[nn.Module, Batch], Tensor]) -> float:
    """The largest difference of the two gradients in float64, relative to the largest entry."""
    first, data = network().double(), batch(torch.float64)
    second = copy.deepcopy(first)
    for model, loss in ((first, our_loss), (second, other)):
        loss(model, data).backward()
    pairs = zip(first.parameters(), second.parameters(), strict=True)
    return max(float((a.grad - b.grad).abs().max() / b.grad.abs().max()) for a, b in pairs)


def main() -> None:
    try:
        import learn2learn.algorithms  # noqa: F401

        peer, loss = "learn2learn", learn2learn_loss
    except ImportError as error:
        peer, loss = f"a plain loop with autograd ({type(error).__name__} on importing learn2learn)", plain_loss
    difference = same_numerics(loss)
    assert difference < 1e-9, difference
    ours, theirs, plain = step_of(our_loss), step_of(loss), step_of(plain_loss)
    in_turns(ours, theirs, plain, rounds=1)  # warm up
    fast, slow, by_hand = in_turns(ours, theirs, plain, rounds=5)
    report(
        "maml_step",
        3.0,
        ratio_of(slow, fast),
        against=peer,
        milliseconds_a_step=100 * float(np.median(fast)),
        milliseconds_a_step_peer=100 * float(np.median(slow)),
        milliseconds_a_step_plain_loop=100 * float(np.median(by_hand)),
        ratio_to_the_plain_loop=ratio_of(by_hand, fast),
        largest_difference_of_the_gradients_in_float64=difference,
    )


if __name__ == "__main__":
    main()
