"""GPAM's claim: Gaussian prototypes with an adaptive border tell relations from none of the above better than points.

FewRel's training relations are parted into those to train, tune and test on; sentences are embedded by the packaged
encoder, frozen.  Every learner sees the same episodes, half of whose queries belong to none of the five relations, with
the same budget, picks its learning rate on the validation relations and gets one threshold tuned there.  The baseline
is the best of three on those.
GPAM's formulas are our reconstruction (see `learn.fewshot.gpam`): what fails here is that, not the paper.

The negative control switches off all that is GPAM's: prototypes are points, one radius is learned for all, and there
are no views, no border loss and no made-up negatives.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from palimpsest.claims import Expect, claim
from palimpsest.core.errors import InputError
from palimpsest.core.statistics import auc
from palimpsest.core.watch import Watch
from palimpsest.data.episodes import Episodes
from palimpsest.data.labelled import read_rows
from palimpsest.data.tasks import Examples, split_classes
from palimpsest.learn.fewshot.episodic import FittedEpisodic
from palimpsest.learn.fewshot.gpam import GPAM
from palimpsest.learn.fewshot.open_set import MNAV, OpenSet, OProto, ProtoBias, none_score
from palimpsest.models.encoder import Encoder
from palimpsest.models.features import relation_features

FILE = "fewrel/train_wiki_100.jsonl.gz"
EACH = 24  # sentences of a relation
WAY, SHOT, QUERIES, TRAINED_AT = 5, 1, 5, 0.5
STEPS, RATES = 200, (1e-3, 3e-3)
BASELINES: tuple[type[OpenSet], ...] = (ProtoBias, OProto, MNAV)
OFF: dict[str, Any] = {
    "gaussian": False,
    "adaptive": False,
    "boundary_weight": 0.0,
    "view_weight": 0.0,
    "made_up": 0,
}


@dataclass(frozen=True, eq=False)
class Tuned:
    """A trained learner with the threshold that did best on the validation relations, and how well."""

    name: str
    fitted: FittedEpisodic
    threshold: float  # added to the logit of none
    accuracy: float


@claim(
    paper="gpam",
    statement="On relations never seen, half of the queries being none of the above, GPAM beats point prototypes.",
    paper_says={"headline": "better than earlier prototype methods on FewRel with none of the above (no number)"},
    expectations=(
        Expect("gpam_half", minus="baseline_half", at_least=0.5),
        Expect("gpam_auroc", minus="baseline_auroc", at_least=0.005),
    ),
    minutes=3,
    data="real: FewRel, 64 relations of 24 sentences (needs the development data)",
    note="GPAM's formulas are our reconstruction from its abstract; a first one, in which views weighed as much as the "
    "example itself, failed on the same five seeds by 2.2 points and was changed on another seed: "
    "the seeds measured here are not fresh",
)
def measure(seed: int, mechanism: bool = True, scale: float = 1.0) -> dict[str, float]:
    """Overall accuracies in percent over 600 1-shot episodes, at a half and at 15% of none of the above."""
    train, valid, test = _pools(seed, max(12, round(EACH * scale)))
    steps, count = max(4, round(STEPS * scale)), max(20, round(600 * scale))
    ours = GPAM() if mechanism else GPAM(**OFF)
    views = slice(None) if mechanism else slice(0, 1)
    plain = [replace(pool, x=pool.x[:, 0]) for pool in (train, valid, test)]
    viewed = [replace(pool, x=pool.x[:, views]) for pool in (train, valid, test)]
    candidates = [_tuned(kind.__name__, kind(), plain[0], plain[1], steps, count, seed) for kind in BASELINES]
    gpam = _tuned("gpam", ours, viewed[0], viewed[1], steps, count, seed)
    best = max(candidates, key=lambda one: (one.accuracy, one.name))
    measured: dict[str, float] = {}
    for name, one, pool in [("gpam", gpam, viewed[2]), ("baseline", best, plain[2])]:
        measured |= {f"{name}_{key}": value for key, value in _tested(one, pool, count, seed).items()}
    for one in candidates:
        measured[f"{one.name.lower()}_half"] = _tested(one, plain[2], count, seed)["half"]
    return measured


def _tuned(name: str, learner: OpenSet, train: Examples, valid: Examples, steps: int, count: int, seed: int) -> Tuned:
    found = []
    for rate in RATES:
        method = replace(learner, steps=steps, lr=rate, episodes=2, seed=seed)
        stream = Episodes(pool=train, way=WAY, shot=SHOT, queries=QUERIES, nota=TRAINED_AT, seed=seed)
        fitted = method.meta_fit(stream, watch=Watch(progress=False))
        logits, labels = _logits(fitted, valid, TRAINED_AT, count, seed)
        # the answer turns to none where none's logit plus the threshold passes the best class's
        scores = none_score(logits)
        grid = -np.quantile(scores, np.linspace(0.02, 0.98, 49))
        rates = [float((_answers(logits, shift) == labels).mean()) for shift in grid]
        found.append((max(rates), rate, float(grid[int(np.argmax(rates))]), fitted))
    accuracy, _, threshold, fitted = max(found, key=lambda one: one[:2])
    return Tuned(name, fitted, threshold, accuracy)


def _tested(one: Tuned, pool: Examples, count: int, seed: int) -> dict[str, float]:
    found = {}
    for name, share in (("half", 0.5), ("sixth", 0.15)):
        logits, labels = _logits(one.fitted, pool, share, count, seed + 1)
        answers = _answers(logits, one.threshold)
        found[name] = 100 * float((answers == labels).mean())
        if name == "half":
            known = labels < WAY
            found["known"] = 100 * float((answers == labels)[known].mean())
            found["none_recall"] = 100 * float((answers == labels)[~known].mean())
            strange = none_score(logits)
            found["auroc"] = auc(strange[~known], strange[known])
    return found


def _logits(
    fitted: FittedEpisodic, pool: Examples, share: float, count: int, seed: int
) -> tuple[np.ndarray, np.ndarray]:
    episodes = Episodes(pool=pool, way=WAY, shot=SHOT, queries=QUERIES, nota=share, count=count, seed=seed)
    rows = episodes.rows(0, count)
    return fitted.answer(episodes, rows), rows.labels


def _answers(logits: np.ndarray, threshold: float) -> np.ndarray:
    shifted = logits.copy()
    shifted[..., -1] += threshold
    return shifted.argmax(-1)


def _pools(seed: int, each: int) -> Sequence[Examples]:
    """Relations to train (40), tune (10) and test (14) on, embedded with their views."""
    whole = _embedded(each)
    train, valid, test = split_classes(whole, train=0.625, valid=0.16, seed=seed)
    assert valid is not None
    return train, valid, test


@cache
def _embedded(each: int) -> Examples:
    folder = os.environ.get("PALIMPSEST_DEV_DATA")
    path = (Path(folder) if folder else Path(__file__).resolve().parents[4] / "shared" / "data") / FILE
    if not path.is_file():
        raise InputError(f"the claim of gpam needs {FILE} in the folder that PALIMPSEST_DEV_DATA names")
    whole, _ = read_rows(path)
    rows = np.concatenate([np.flatnonzero(whole.y == label)[:each] for label in range(whole.way)])
    some = whole.take(rows)
    return replace(some, x=relation_features(some.x, Encoder.load(), views=True))
