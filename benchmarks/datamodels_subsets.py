"""Datamodels of a small network on digits: 600 subset models trained together against one after the other.

The loop is what one would write by hand: torch.optim.SGD, the same batches, steps and rows.  It runs for a twentieth of
the models and is scaled up, so that the two can take turns.  Both sides end with the outputs for 200 queries.

    python benchmarks/datamodels_subsets.py
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor, nn

from common import in_turns, ratio_of, report
from digits_networks import BATCH, SGD, TRAIN, digits, network, trained_by_hand
from palimpsest.audit.datamodels import draw_subsets, subset_outputs
from palimpsest.core.many import cross_entropy

MODELS, STEPS = 600, 280  # 20 epochs of half the rows
LOOPED = MODELS // 20


def main() -> None:
    data, (queries, labels) = digits()
    masks = draw_subsets(TRAIN, MODELS)
    found = {}

    def loss(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        return cross_entropy(model(batch[0]), batch[1])

    def together() -> None:
        found["together"] = subset_outputs(
            network, loss, data, masks, queries, steps=STEPS, batch_size=BATCH, optimizer="sgd", **SGD
        )

    def loop() -> None:
        models = [trained_by_hand(number, masks[number], STEPS) for number in range(LOOPED)]
        with torch.no_grad():
            found["loop"] = torch.stack([model(queries) for model in models])

    in_turns(loop, rounds=1)  # warm up
    stacked, looped = in_turns(together, loop, rounds=3)
    looped = [seconds * MODELS / LOOPED for seconds in looped]
    right = {side: float((outputs.argmax(-1) == labels).float().mean()) for side, outputs in found.items()}
    report(
        "datamodels_subsets",
        8.0,
        ratio_of(looped, stacked),
        models=MODELS,
        seconds_together=float(np.median(stacked)),
        seconds_in_a_loop=float(np.median(looped)),
        accuracy_together=right["together"],
        accuracy_in_a_loop=right["loop"],
    )


if __name__ == "__main__":
    main()
