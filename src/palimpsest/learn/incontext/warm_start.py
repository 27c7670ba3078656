"""The first tables a model sees: few, repeated, and such as a random forest can solve.

Dong et al. 2025 (arXiv:2509.06806), random-forest mimicry: a table is kept if a forest trained on its context beats
chance on the queries, and only queries that the forest answers right are asked.  The released code holds no filter; the
test, its level and the further conditions follow the paper's text as far as known, and are settings here.
Shapes: N rows (the context, then Q queries), F columns.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from palimpsest.core.errors import InputError
from palimpsest.core.seeds import derive, numpy_rng
from palimpsest.data.tables import IGNORE, Tables

_TRIED = 10  # tables looked at for each that is wanted, at most
_TREES = 30


@dataclass(frozen=True)
class Pool:
    """``pool(step)``: a batch drawn from `count` tables like those of `tables`; the same few come again and again.

    `alpha`: level of the test; None keeps every table and asks every query (the control).
    """

    tables: Tables
    count: int
    shots: int
    alpha: float | None = 0.2
    seed: int = 0

    def build(self) -> Callable[[int], dict[str, Any]]:
        """Choose the tables; the result gives the batch of a step.

        Fewer than `count` are taken where so few pass; `InputError` where none does.
        """
        stream = replace(self.tables, shots=(self.shots, self.shots), seed=derive(self.seed, "pool") % 2**31)
        kept: list[dict[str, Any]] = []
        for number in range(_TRIED * self.count):
            if len(kept) == self.count:
                break
            step, row = divmod(number, stream.batch_size)
            batch = stream(step)
            one = {name: batch[name][row] for name in ("x", "y", "present")}
            if self.alpha is not None:
                agreed = consensus(one["x"].numpy(), one["y"].numpy(), self.shots, self.alpha, seed=number)
                if agreed is None:
                    continue
                one["y"] = one["y"].clone()
                one["y"][self.shots :][~torch.from_numpy(agreed)] = IGNORE
            kept.append(one)
        if not kept:
            raise InputError(f"of {_TRIED * self.count} tables a random forest solves none: set warm_share=0")
        stacked = {name: torch.stack([one[name] for one in kept]) for name in kept[0]}
        size = min(stream.batch_size, len(kept))

        def batch_of(step: int) -> dict[str, Any]:
            rows = numpy_rng(self.seed, "pool", step).permutation(len(kept))[:size]
            return {name: value[rows] for name, value in stacked.items()} | {"shots": self.shots}

        return batch_of


def consensus(x: np.ndarray, y: np.ndarray, shots: int, alpha: float, *, seed: int = 0) -> np.ndarray | None:
    """(Q,) which queries a forest answers right, or None for a table on which it does not beat chance.

    x: (N, F), y: (N,), the first `shots` rows are the context.  To be kept: an exact one-sided binomial test against
    the larger of the majority's share and the sum of squared shares at level `alpha`; kappa above 0; balanced accuracy
    above chance; and more than one class among the answers.
    """
    from scipy.stats import binomtest
    from sklearn.ensemble import RandomForestClassifier

    asked = y[shots:] != IGNORE
    truth = y[shots:][asked]
    if not len(truth):
        return None
    forest = RandomForestClassifier(_TREES, random_state=seed, n_jobs=1).fit(x[:shots], y[:shots])
    found = forest.predict(x[shots:])
    told = found[asked]
    shares = np.unique(truth, return_counts=True)[1] / len(truth)
    chance = max(shares.max(), (shares**2).sum())
    if chance == 1 or len(np.unique(told)) == 1:
        return None
    hits = told == truth
    if binomtest(int(hits.sum()), len(truth), float(chance), alternative="greater").pvalue > alpha:
        return None
    classes = np.unique(truth)
    expected = sum(float((truth == one).mean() * (told == one).mean()) for one in classes)
    balanced = np.mean([hits[truth == one].mean() for one in classes])
    if hits.mean() <= expected or balanced <= 1 / len(classes):
        return None
    return asked & (found == y[shots:])
