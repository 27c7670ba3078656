"""How good a learner is: accuracy over many test episodes with its 95% interval, as the field reports it.

Works for whatever `meta_fit` returned: episodes one by one through `adapt`, or hundreds at once where the learner has
``predict(episodes, rows)``.  Knows nothing of particular learners.
Shapes: E episodes, Q queries.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from palimpsest.core.errors import InputError
from palimpsest.data.episodes import Episodes


@dataclass(frozen=True, eq=False)
class Scores:
    """Answers to E episodes and what they are worth.  The last label, `way`, is "none of them"."""

    answers: np.ndarray  # (E, Q)
    labels: np.ndarray  # (E, Q)
    way: int

    @property
    def accuracy(self) -> np.ndarray:
        """(E,) share of right answers, "none of them" included."""
        return (self.answers == self.labels).mean(1)

    @property
    def known(self) -> np.ndarray:
        """(E,) share of right answers to queries of the episode's classes."""
        known = self.labels < self.way
        return ((self.answers == self.labels) & known).sum(1) / known.sum(1)

    @property
    def none_recall(self) -> np.ndarray | None:
        """(E,) share of the queries of no class that were told to be so; None where there are no such queries."""
        strange = self.labels == self.way
        return ((self.answers == self.way) & strange).sum(1) / strange.sum(1) if strange.any() else None

    @property
    def none_precision(self) -> float | None:
        """Share of the answers "none of them" that are right, over all episodes; None where nobody gave that answer."""
        said = self.answers == self.way
        return float((self.labels[said] == self.way).mean()) if said.any() else None

    def __str__(self) -> str:
        return in_words(self.accuracy)


def interval(values: np.ndarray) -> tuple[float, float, float]:
    """(mean, low, high) of (E,) values: plus and minus 1.96 standard errors, the field's 95% interval."""
    mean = float(values.mean())
    half = 1.96 * float(values.std(ddof=1)) / len(values) ** 0.5 if len(values) > 1 else float("nan")
    return mean, mean - half, mean + half


def in_words(values: np.ndarray) -> str:
    """``78.31 ± 0.42 %``"""
    mean, low, _ = interval(values)
    return f"{100 * mean:.2f} ± {100 * (mean - low):.2f} %"


def evaluate(fitted: Any, episodes: Episodes, *, count: int | None = None) -> Scores:
    """Answer the first `count` episodes (default: the stream's length).

    Raises InputError for a learner whose answers do not fit the queries or name a class that is not there.
    """
    count = count or len(episodes)
    rows = episodes.rows(0, count)
    if hasattr(fitted, "predict"):
        answers = fitted.predict(episodes, rows)
    else:
        answers = np.stack([_answers(fitted, episodes, index) for index in range(count)])
    if answers.min() < 0 or answers.max() > episodes.way:
        raise InputError(f"an answer is {answers.min()} or {answers.max()}; wanted 0 to {episodes.way}")
    return Scores(answers, rows.labels, episodes.way)


def _answers(fitted: Any, episodes: Episodes, index: int) -> np.ndarray:
    task = episodes.task(index)
    answers = np.asarray(fitted.adapt(task)(task.query.x))
    if answers.shape != task.query.y.shape:
        raise InputError(f"{task.name}: {answers.shape} answers to {len(task.query)} queries")
    return answers
