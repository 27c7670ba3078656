"""(c) 200 small networks on the digits of scikit-learn, each on its own half of the rows: `train_many` against a loop.

The loop is what one would write by hand: one model after the other, torch.optim.AdamW, the same batch size, steps and
rows.  It runs for a twentieth of the models and is scaled up, so that the two can take turns.

    python benchmarks/many_digits.py
"""

from __future__ import annotations

import numpy as np
import torch
from sklearn.datasets import load_digits
from torch import nn

from common import in_turns, ratio_of, report
from palimpsest.core.many import predict_many, train_many

MODELS, HIDDEN, STEPS, ROWS = 200, 64, 300, 64
LOOPED = MODELS // 20


def mlp() -> nn.Sequential:
    return nn.Sequential(nn.Linear(64, HIDDEN), nn.ReLU(), nn.Linear(HIDDEN, 10))


def main() -> None:
    x, y = load_digits(return_X_y=True)
    inputs, labels = torch.tensor(x / 16, dtype=torch.float32), torch.tensor(y)
    train = 1500
    masks = np.random.default_rng(0).random((MODELS, train)) < 0.5
    found = {}

    def together() -> None:
        found["many"] = train_many(
            mlp,
            lambda model, batch: nn.functional.cross_entropy(model(batch[0]), batch[1]),
            (inputs[:train], labels[:train]),
            masks,
            steps=STEPS,
            lr=3e-3,
            batch_size=ROWS,
        )

    def loop() -> None:
        found["loop"] = [one(index) for index in range(LOOPED)]

    def one(index: int) -> nn.Module:
        torch.manual_seed(index)
        model = mlp()
        optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=0.0)
        rows = torch.from_numpy(np.flatnonzero(masks[index]))
        order = torch.cat([rows[torch.randperm(len(rows))] for _ in range(-(-STEPS * ROWS // len(rows)))])
        for step in range(STEPS):
            batch = order[step * ROWS : (step + 1) * ROWS]
            loss = nn.functional.cross_entropy(model(inputs[batch]), labels[batch])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        return model

    in_turns(together, loop, rounds=1)  # warm up
    many, looped = in_turns(together, loop, rounds=5)
    looped = [seconds * MODELS / LOOPED for seconds in looped]
    hits = (predict_many(found["many"], inputs[train:]).argmax(-1) == labels[train:]).float().mean().item()
    with torch.no_grad():
        looped_hits = np.mean(
            [(m(inputs[train:]).argmax(-1) == labels[train:]).float().mean().item() for m in found["loop"]]
        )
    report(
        "many_digits",
        8.0,
        ratio_of(looped, many),
        models=MODELS,
        seconds_together=float(np.median(many)),
        seconds_in_a_loop=float(np.median(looped)),
        accuracy_together=hits,
        accuracy_in_a_loop=float(looped_hits),
    )


if __name__ == "__main__":
    main()
