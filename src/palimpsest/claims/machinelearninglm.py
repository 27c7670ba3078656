"""MachineLearningLM's claim at a small scale: trained on synthetic tables, a model classifies real ones in its context.

A llama of 0.17 million weights reads packed rows, is trained on tables of random causal models alone, and meets four
real tables and fresh synthetic ones.  Forest and neighbours get the same rows, columns and integers.  A second model
has the same number of steps on fresh tables only, without the warm start.
Negative control: what the tables teach is switched off, and nothing else: their labels are shuffled.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, replace
from itertools import pairwise
from typing import Any

import numpy as np
import torch

import palimpsest
from palimpsest.claims.definition import Expect, claim
from palimpsest.core import cache
from palimpsest.core.seeds import numpy_rng
from palimpsest.core.watch import Watch
from palimpsest.data.tables import IGNORE, TablePrior, Tables
from palimpsest.learn.incontext.machinelearninglm import MachineLearningLM, TabularLM
from palimpsest.learn.incontext.packed_rows import packed_integers
from palimpsest.learn.incontext.table_prompts import integers

SHOTS = (8, 16, 32, 64)
SPLITS, QUERIES = 12, 36
HELD_OUT = 256  # synthetic tables
PRIOR = TablePrior(columns=(2, 4), classes=(2, 2), deepest=1)
LEARNER = MachineLearningLM(steps=500, lr=2e-3, pool=32, votes=4)
BATCH: dict[str, Any] = {"shots": (SHOTS[0], SHOTS[-1]), "queries": 24, "batch_size": 16}
SETS = ("iris", "wine", "breast_cancer", "digits")


@claim(
    paper="machinelearninglm",
    statement=(
        "Pretraining on tables drawn from random causal models teaches a language model to classify real tables it "
        "never saw, better with every doubling of the rows in its context, at the level of a random forest; starting "
        "with tables that a forest solves helps."
    ),
    paper_says={
        "mean accuracy at 8 / 64 / 512 shots, about 200 tables": "58.4 / 70.0 / 75.3 percent",
        "distance to a random forest, 8 to 512 shots": "within about 2 percent, relative",
    },
    expectations=(  # the sheet's
        Expect("accuracy_64", minus="accuracy_8", at_least=0.03),
        *(Expect(f"accuracy_{more}", minus=f"accuracy_{less}", at_least=-0.01) for less, more in pairwise(SHOTS)),
        *(Expect(f"accuracy_{shots}", minus=f"forest_{shots}", at_least=-0.05) for shots in SHOTS[1:]),
        Expect("third_over_majority", at_least=0.15),
        Expect("accuracy_64", minus="no_warm_start_64", at_least=0.10),
        Expect("synthetic_64", minus="synthetic_8", at_least=0.03),
    ),
    minutes=3,
    data="real: pairs of classes of scikit-learn's iris, wine, breast cancer, digits; generated: the training tables",
    note=(
        "Accuracies are means over the four real tables; third_over_majority is the third best of their margins over "
        "the most frequent class, at 64 shots; synthetic_n are fresh tables of the training's kind. Steps and the "
        "easy tables of two classes were chosen in pilots on seeds 100 and 101. The sheet saw the warm start end a "
        "plateau at log 2; this model has none from the first hundred steps on, and as many fresh tables do better."
    ),
)
def measure(seed: int, mechanism: bool = True, scale: float = 1.0) -> dict[str, float]:
    steps = max(4, round(LEARNER.steps * scale))
    learner = replace(LEARNER, steps=steps, pool=max(2, round(LEARNER.pool * scale)), seed=seed)
    fitted = trained(learner, shuffled=not mechanism)
    plain = trained(replace(learner, warm_share=0.0), shuffled=False)
    splits = max(1, round(SPLITS * scale))
    each = {name: on_real(fitted, name, seed, splits) for name in SETS}
    measured = {key: float(np.mean([found[key] for found in each.values()])) for key in each["iris"]}
    measured["third_over_majority"] = sorted(found["accuracy_64"] - found["majority"] for found in each.values())[1]
    answers = [on_real(plain, name, seed, splits, rivals=False) for name in SETS]
    measured |= {
        f"no_warm_start_{shots}": float(np.mean([found[f"accuracy_{shots}"] for found in answers])) for shots in SHOTS
    }
    return measured | on_synthetic(fitted, seed) | {f"{name}_64": found["accuracy_64"] for name, found in each.items()}


def trained(learner: MachineLearningLM, *, shuffled: bool) -> TabularLM:
    """The learner after its training, kept in the cache: the control shares one of two with the claim."""
    stream = Tables(PRIOR, **BATCH, seed=learner.seed, shuffled=shuffled)
    return cache.cached(
        "claim-machinelearninglm",
        [palimpsest.__version__, torch.__version__, asdict(learner), stream.sha256],
        lambda folder: learner.meta_fit(stream, watch=Watch(progress=False)).write(folder),
        learner.read,
    )


def on_real(fitted: TabularLM, name: str, seed: int, splits: int, *, rivals: bool = True) -> dict[str, float]:
    """Mean accuracies over splits of a real table; each: two classes, some columns, the same queries at all shots."""
    x, labels = real(name)
    rng = numpy_rng(seed, "splits", name)
    found: dict[str, list[float]] = {}
    for _ in range(splits):
        pair = rng.permutation(labels.max() + 1)[:2]
        y = (labels == pair[1]).astype(np.int64)
        rows = rng.permutation(np.flatnonzero(np.isin(labels, pair)))
        while len(np.unique(y[rows[: SHOTS[0]]])) < 2:  # both are among the fewest rows
            rows = rng.permutation(rows)
        columns = rng.permutation(x.shape[1])[: fitted.features]
        asked = rows[-QUERIES:]
        truth, queries = y[asked], x[asked][:, columns]
        for shots in SHOTS:
            context, shown = x[rows[:shots]][:, columns], y[rows[:shots]]
            told = {"accuracy": fitted.predictor(context, shown, 2)(queries)}
            if rivals:
                given = integers(context, context), shown, integers(queries, context)
                told |= {rival: answer(*given) for rival, answer in RIVALS.items()}
            for key, answers in told.items():
                found.setdefault(f"{key}_{shots}", []).append(float((answers == truth).mean()))
        found.setdefault("majority", []).append(float((truth == np.bincount(y[rows[: SHOTS[-1]]]).argmax()).mean()))
    return {key: float(np.mean(values)) for key, values in found.items()}


def real(name: str) -> tuple[np.ndarray, np.ndarray]:
    """Rows and labels; digits are six principal components of 0, 1 and 2."""
    from sklearn import datasets
    from sklearn.decomposition import PCA

    x, y = getattr(datasets, f"load_{name}")(return_X_y=True)
    if name != "digits":
        return x, y
    few = y < 3
    return PCA(6, svd_solver="full").fit_transform(x[few]), y[few]


def forest(x: np.ndarray, y: np.ndarray, queries: np.ndarray) -> np.ndarray:
    from sklearn.ensemble import RandomForestClassifier

    return np.asarray(RandomForestClassifier(30, random_state=0, n_jobs=1).fit(x, y).predict(queries))


def neighbours(x: np.ndarray, y: np.ndarray, queries: np.ndarray) -> np.ndarray:
    from sklearn.neighbors import KNeighborsClassifier

    return np.asarray(KNeighborsClassifier(8, weights="distance").fit(x, y).predict(queries))


RIVALS: dict[str, Callable[[np.ndarray, np.ndarray, np.ndarray], np.ndarray]] = {
    "forest": forest,
    "neighbours": neighbours,
}


def on_synthetic(fitted: TabularLM, seed: int) -> dict[str, float]:
    """Accuracy on fresh tables by the last n of 64 rows: a query counts as wrong where its class is not among them."""
    most = SHOTS[-1]
    stream = Tables(PRIOR, (most, most), batch_size=HELD_OUT, seed=seed + 1000, block=1)
    batch = stream(0)
    truth = batch["y"][:, most:]
    found = {}
    for shots in SHOTS:
        cells = packed_integers(batch["x"][:, most - shots :], shots)
        with torch.inference_mode():
            answers = fitted.rows(cells, batch["present"], batch["y"][:, most - shots : most]).argmax(-1)
        found[f"synthetic_{shots}"] = float((answers == truth)[truth != IGNORE].double().mean())
    return found
