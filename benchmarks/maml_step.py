"""One meta-training step of MAML: 32 tasks through one `vmap`, against `learn2learn`'s loop over them.

5-way 1-shot, 15 queries of each class, one inner step, second order.  What one call over all tasks saves is the
start-up of many small operations, so the gain shrinks as the network grows: the first size is the benchmark (two hidden
layers of 40, as in Finn et al. 2017's smallest experiment, on 64 inputs), the second (theirs without convolutions
for Omniglot) shows where it ends.  Gradients must agree in float64.  Where learn2learn cannot be imported, a plain loop
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
from palimpsest.learn.fewshot.maml import Classifier

TASKS, WAY, QUERIES, INNER_LR = 32, 5, 75, 0.4
SIZES = ((64, 40, 40), (784, 256, 128, 64, 64))  # inputs and hidden layers
STEPS = 10  # a round
Batch = dict[str, Tensor]
Sizes = tuple[int, ...]
Loss = Callable[[nn.Module, Batch], Tensor]


class Encoder(nn.Sequential):
    """The hidden layers."""

    def __init__(self, sizes: Sizes):
        super().__init__(*(part for a, b in pairwise(sizes) for part in (nn.Linear(a, b), nn.ReLU())))
        self.dimensions = sizes[-1]


def network(sizes: Sizes) -> nn.Module:
    torch.manual_seed(0)
    return Classifier(Encoder(sizes), head=nn.Linear(sizes[-1], WAY))


def batch(inputs: int, kind: torch.dtype = torch.float32) -> Batch:
    rng = np.random.default_rng(0)
    return {
        "support": torch.from_numpy(rng.normal(size=(TASKS, WAY, inputs))).to(kind),
        "query": torch.from_numpy(rng.normal(size=(TASKS, QUERIES, inputs))).to(kind),
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


def steps_of(loss: Loss, sizes: Sizes) -> Callable[[], None]:
    model, data = network(sizes), batch(sizes[0])
    adam = torch.optim.Adam(model.parameters(), lr=1e-3, fused=True)

    def steps() -> None:
        for _ in range(STEPS):
            adam.zero_grad()
            loss(model, data).backward()
            adam.step()

    return steps


def difference(other: Loss, sizes: Sizes) -> float:
    """The largest difference of the two gradients in float64, relative to the largest entry."""
    first, data = network(sizes).double(), batch(sizes[0], torch.float64)
    second = copy.deepcopy(first)
    for model, loss in ((first, our_loss), (second, other)):
        loss(model, data).backward()
    pairs = zip(first.parameters(), second.parameters(), strict=True)
    return max(float((a.grad - b.grad).abs().max() / b.grad.abs().max()) for a, b in pairs)


def measure(peer: Loss, sizes: Sizes) -> dict[str, float]:
    apart = difference(peer, sizes)
    assert apart < 1e-9, apart
    sides = [steps_of(loss, sizes) for loss in (our_loss, peer)]
    in_turns(*sides, rounds=1)  # warm up
    fast, slow = in_turns(*sides, rounds=7)
    return {
        "ratio": ratio_of(slow, fast),
        "milliseconds_a_step": 1000 / STEPS * float(np.median(fast)),
        "milliseconds_a_step_peer": 1000 / STEPS * float(np.median(slow)),
        "difference_of_gradients_in_float64": apart,
    }


def main() -> None:
    peer: Loss = learn2learn_loss
    name = "learn2learn"
    try:
        import learn2learn.algorithms  # noqa: F401
    except ImportError:
        name, peer = "a plain loop with autograd: learn2learn cannot be imported", plain_loss
    small, large = (measure(peer, sizes) for sizes in SIZES)
    parts = {f"larger_network_{key}": value for key, value in large.items()}
    report("maml_step", 3.0, small.pop("ratio"), against=name, tasks=TASKS, **small, **parts)


if __name__ == "__main__":
    main()
