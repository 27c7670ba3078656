"""(h) Training on tasks made on the fly: the share of the time that the training loop does not wait for its batches.

The smallest models are the hardest, for their steps are the shortest.  One thread makes the batches (data/ahead.py);
the same without it, each batch made when it is asked for, is printed beside it.

    python benchmarks/stream_busy.py
"""

from __future__ import annotations

import time
from contextlib import contextmanager
from typing import Any
from unittest import mock

from sklearn.datasets import load_digits

from common import report
from palimpsest.core.watch import Watch
from palimpsest.data import ahead as module
from palimpsest.data.functions import Dense, FunctionStream
from palimpsest.data.projections import BaseSet, Projections
from palimpsest.learn.incontext import bayesian_prism, gpicl

STEPS = 300
QUIET = Watch(progress=False)


def main() -> None:
    x, y = load_digits(return_X_y=True)
    base = BaseSet.of(x, y, name="digits")
    sides = {
        "functions": (
            bayesian_prism,
            bayesian_prism.BayesianPrism(width=32, layers=2, heads=2, steps=STEPS),
            FunctionStream(Dense(8), points=17),
        ),
        "projections": (
            gpicl,
            gpicl.GPICL(width=32, layers=2, heads=2, steps=STEPS),
            Projections(base, tasks=4096, features=16, length=24),
        ),
    }
    found = {}
    for name, (room, learner, stream) in sides.items():
        for how, reading in (("ahead", module.ahead), ("when asked for", at_once)):
            waits: list[float] = []

            @contextmanager
            def timed(batches: Any, reading: Any = reading, waits: list[float] = waits) -> Any:
                with reading(batches) as inner:
                    yield lambda step: clocked(inner, step, waits)

            with mock.patch.object(room, "ahead", timed):
                began = time.perf_counter()
                learner.meta_fit(stream, watch=QUIET)
                found[f"{name} {how}"] = 1 - sum(waits) / (time.perf_counter() - began)
    report("stream_busy", 0.95, min(found["functions ahead"], found["projections ahead"]), **found)


@contextmanager
def at_once(batches: Any) -> Any:
    yield batches


def clocked(batches: Any, step: int, waits: list[float]) -> Any:
    began = time.perf_counter()
    batch = batches(step)
    waits.append(time.perf_counter() - began)
    return batch


if __name__ == "__main__":
    main()
