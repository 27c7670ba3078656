"""Bayesian prism's claim at a small scale: a trained transformer is near the exact Bayesian predictor of its training.

A: linear functions of two inputs whose first weight is near +3 or -3 (a mixture of two Gaussians), noisy.  The network
is held against the mixture's posterior mean and against that of the one Gaussian with the same moments.
B: sums of waves.  One network is trained on a mixture of highest frequencies 1, 2, 3, which prefers low ones when few
pairs are known; another on highest frequency 3 alone, which does not.  Both read x through the waves themselves, so
that no preference of the network for smooth functions of x interferes.
Negative control: training on mixtures is switched off, and nothing else: on the one Gaussian with the same moments
(A), on the single class (B).
"""

from __future__ import annotations

from dataclasses import asdict, replace
from typing import Any

import numpy as np
import torch

import palimpsest
from palimpsest.claims.definition import Expect, claim
from palimpsest.core import cache
from palimpsest.core.watch import Watch
from palimpsest.data.functions import Dense, Family, Fourier, FunctionStream, Mixture
from palimpsest.learn.incontext.bayesian_prism import (
    BayesianPrism,
    FittedPrism,
    compare,
    exact,
    lasso,
    least_squares,
    spectra,
)

DIM, NOISE, FREQUENCIES = 2, 0.4, 3
TWO = Mixture((Dense(DIM, 3.0, 0.0), Dense(DIM, -3.0, 0.0)))
ONE = Dense(DIM, 0.0, 3.0)  # the Gaussian with the mixture's mean and covariance
WAVES = Mixture(tuple(Fourier(high) for high in range(1, FREQUENCIES + 1)))
SINGLE = Fourier(FREQUENCIES)
FAMILIES: dict[str, Family] = {"two": TWO, "one": ONE, "waves": WAVES, "single": SINGLE}
POINTS = 6
BATCH = {"two": 64, "waves": 32}
LEARNERS = {
    "two": BayesianPrism(width=48, layers=3, heads=2, steps=2000, lr=2e-3, schedule="cosine", layout="packed"),
    "waves": BayesianPrism(width=48, layers=2, heads=4, steps=2600, lr=2e-3, schedule="cosine", waves=FREQUENCIES),
}
EXACTLY = 1e-3**0.5  # the noise at which an exact function is taken


@claim(
    paper="bayesian_prism",
    statement=(
        "A transformer trained on a mixture of function families answers as the exact posterior mean of the mixture, "
        "nearer than as its best one-family rival, and prefers simple functions only if its training data does."
    ),
    paper_says={"numbers": "none: figures in which loss and probed weights lie on the Bayesian predictor's"},
    expectations=(  # fixed before five seeds were run; the sheet's, its window of a quarter moved to a third
        Expect("ridge_1", minus="exact_1", at_least=0.0),
        Expect("ridge_2", minus="exact_2", at_least=0.0),
        Expect("ridge_3", minus="exact_3", at_least=0.0),
        Expect("three_quarters_of_ridge", minus="exact", at_least=0.0),
        Expect("least_squares", minus="exact", at_least=0.0),
        Expect("lowest_1_mixture", minus="lowest_1_single", at_least=0.25),
        Expect("lowest_2_mixture", minus="lowest_2_single", at_least=0.25),
        Expect("single_off_flat", at_most=0.1),
        Expect("spectrum_error_mixture", at_most=0.3),
        Expect("spectrum_error_single", at_most=0.3),
    ),
    minutes=3,
    data="generated: linear functions of 2 inputs with noise 0.4, sums of waves of frequencies 1 to 3",
    note=(
        "ridge_k and exact_k: median squared distance of the network's answer after k pairs to the two predictors; "
        "without a number, their mean over k = 1 to 5. lowest_k: share of frequency 1 after k pairs. single_off_flat: "
        "the largest distance of the single-class network's shares from a third at k = 1, 2. Left open: in one of five "
        "seeds that network leans to one frequency, not the lowest, after these 2,600 steps; that a network has no "
        "preference of its own is shown only by longer training."
    ),
)
def measure(seed: int, mechanism: bool = True, scale: float = 1.0) -> dict[str, float]:
    network = trained("two", "two" if mechanism else "one", seed, scale)
    batch = FunctionStream(TWO, POINTS, 512, NOISE, seed + 1000)(0)
    rivals = {"exact": exact(TWO, NOISE), "ridge": exact(ONE, NOISE), "least_squares": least_squares(ONE)}
    rivals["lasso"] = lasso(ONE, 0.05)
    distances = {name: found[1:] for name, found in compare(network, rivals, batch).items()}
    measured = {name: float(found.mean()) for name, found in distances.items()}
    measured["three_quarters_of_ridge"] = 0.75 * measured["ridge"]
    for name in ("exact", "ridge"):
        measured |= {f"{name}_{k}": float(distances[name][k - 1]) for k in (1, 2, 3)}
    found = {
        name: _spectra(trained("waves", family, seed, scale), yardstick, seed)
        for name, family, yardstick in (
            ("mixture", "waves" if mechanism else "single", WAVES),
            ("single", "single", SINGLE),
        )
    }
    for name, each in found.items():
        measured |= {f"lowest_{k}_{name}": float(mine[0]) for k, (mine, _) in each.items()}
        measured |= {f"lowest_{k}_{name}_exact": float(theirs[0]) for k, (_, theirs) in each.items()}
        measured[f"spectrum_error_{name}"] = max(float(np.abs(each[k][0] - each[k][1]).sum()) for k in (1, 2))
    flat = 1 / FREQUENCIES
    measured["single_off_flat"] = max(float(np.abs(found["single"][k][0] - flat).max()) for k in (1, 2))
    return measured


def _spectra(network: FittedPrism, yardstick: Any, seed: int) -> dict[int, tuple[np.ndarray, np.ndarray]]:
    batch = FunctionStream(yardstick, 4, 256, seed=seed + 1000)(0)
    return spectra(network, yardstick, batch, (1, 2, 4), noise=EXACTLY, high=FREQUENCIES)


def trained(task: str, family: str, seed: int, scale: float) -> FittedPrism:
    """The network for `task` trained on one of `FAMILIES`, kept in the cache: the control shares one with the claim."""
    learner = replace(LEARNERS[task], seed=seed, steps=max(2, round(LEARNERS[task].steps * scale)))
    stream = FunctionStream(FAMILIES[family], POINTS, BATCH[task], NOISE if task == "two" else 0.0, seed)
    key = [palimpsest.__version__, torch.__version__, asdict(learner), family, POINTS, BATCH[task], NOISE]
    return cache.cached(
        "claim-bayesian-prism",
        key,
        lambda folder: learner.meta_fit(stream, watch=Watch(progress=False)).write(folder),
        learner.read,
    )
