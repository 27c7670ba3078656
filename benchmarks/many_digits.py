"""(c) 200 small networks on the digits of scikit-learn, each on its own half of the rows: `train_many` against a loop.

What stacking saves is the interpreter's and the kernels' start-up time, so the gain shrinks as the networks grow.
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
from palimpsest.core.many import cross_entropy, predict_many, train_many

MODELS, STEPS = 200, 200
LOOPED = MODELS // 20
SIZES = ((32, 32), (64, 64))  # hidden units, rows a batch: the first is the benchmark, the second shows where it ends


def measure(hidden: int, batch_size: int) -> dict[str, float]:
    x, y = load_digits(return_X_y=True)
    inputs, labels = torch.tensor(x / 16, dtype=torch.float32), torch.tensor(y)
    train = 1500
    masks = np.random.default_rng(0).random((MODELS, train)) < 0.5
    found = {}

    def mlp() -> nn.Sequential:
        return nn.Sequential(nn.Linear(64, hidden), nn.ReLU(), nn.Linear(hidden, 10))

    def together() -> None:
        found["many"] = train_many(
            mlp,
            lambda model, batch: cross_entropy(model(batch[0]), batch[1]),
            (inputs[:train], labels[:train]),
            masks,
            steps=STEPS,
            lr=3e-3,
            batch_size=batch_size,
        )

    def loop() -> None:
        found["loop"] = [one(index) for index in range(LOOPED)]

    def one(index: int) -> nn.Module:
        torch.manual_seed(index)
        model = mlp()
        optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=0.0)
        rows = torch.from_numpy(np.flatnonzero(masks[index]))
        order = torch.cat([rows[torch.randperm(len(rows))] for _ in range(-(-STEPS * batch_size // len(rows)))])
        for step in range(STEPS):
            batch = order[step * batch_size : (step + 1) * batch_size]
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
    return {
        "ratio": ratio_of(looped, many),
        "seconds_together": float(np.median(many)),
        "seconds_in_a_loop": float(np.median(looped)),
        "accuracy_together": hits,
        "accuracy_in_a_loop": float(looped_hits),
    }


def main() -> None:
    small, large = (measure(*size) for size in SIZES)
    parts = {f"larger_networks_{name}": value for name, value in large.items()}
    report("many_digits", 8.0, small.pop("ratio"), models=MODELS, **small, **parts)


if __name__ == "__main__":
    main()
