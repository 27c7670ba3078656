"""A trained `TabularLM` as a scikit-learn classifier: `fit` stores the rows, `predict` and `predict_proba` answer.

Rows are an array, or a pandas frame whose columns may hold numbers, truth values or categories.
Shapes: S labelled rows, Q queries, D columns, C classes.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from sklearn.base import BaseEstimator, ClassifierMixin

from palimpsest.core.errors import InputError
from palimpsest.learn.incontext.machinelearninglm import TabularLM

_CATEGORIES = 20  # as many as a column of the prior has; a text column with more is no category


class TableClassifier(ClassifierMixin, BaseEstimator):
    """Classify rows in a model's context.  Missing numbers (NaN, None) and unknown categories count as the mean."""

    def __init__(self, model: TabularLM, votes: int | None = None):
        """`votes`: orders of the rows that are asked; None: as many as the model's learner says."""
        self.model = model
        self.votes = votes

    def fit(self, X: Any, y: Any) -> TableClassifier:
        """Store rows (S, D) and their labels (S,), of any kind; no weight changes.

        Raises `InputError` for a missing label, more classes than the model knows, one class only, columns that are all
        constant, and a text column with more than 20 different texts.
        """
        labels = np.asarray(y)
        if any(map(_missing, labels.tolist())):
            raise InputError("a label is missing: leave that row out")
        columns = columns_of(X)
        if len(labels) != len(columns[0][1]):
            raise InputError(f"{len(columns[0][1])} rows but {len(labels)} labels")
        self.classes_, numbers = np.unique(labels, return_inverse=True)
        self.names_ = [name for name, _ in columns]
        self.n_features_in_ = len(columns)
        self.categories_ = [categories(name, values) for name, values in columns]
        self.predictor_ = self.model.predictor(self._numbers(columns), numbers, len(self.classes_))
        return self

    def predict(self, X: Any) -> np.ndarray:
        """(Q,) labels as they were given."""
        return self.classes_[self.predict_proba(X).argmax(1)]

    def predict_proba(self, X: Any) -> np.ndarray:
        """(Q, C) probabilities in the order of `classes_`."""
        columns = columns_of(X)
        if [name for name, _ in columns] != self.names_:
            raise InputError(f"the rows have the columns {[n for n, _ in columns]}, those of fit were {self.names_}")
        return self.predictor_.probabilities(self._numbers(columns), votes=self.votes)

    def _numbers(self, columns: list[tuple[Any, np.ndarray]]) -> np.ndarray:
        """(N, D) float64; a category is its place among those that `fit` saw."""
        found = []
        for (name, values), known in zip(columns, self.categories_, strict=True):
            if known is None:
                found.append(floats(name, values))
            else:
                place = {category: float(number) for number, category in enumerate(known)}
                found.append(np.array([place.get(str(value), np.nan) for value in values.tolist()]))
        return np.stack(found, axis=1)


def columns_of(X: Any) -> list[tuple[Any, np.ndarray]]:
    """Names and values (N,) of the columns of a frame or of an array (N, D), whose names are their places."""
    if hasattr(X, "columns"):
        return [(name, np.asarray(X[name], dtype=None if _numeric(X[name]) else object)) for name in X.columns]
    rows = np.asarray(X)
    if rows.ndim != 2 or not rows.shape[1]:
        raise InputError(f"rows must be of shape (rows, columns), not {rows.shape}")
    return list(enumerate(rows.T))


def categories(name: Any, values: np.ndarray) -> list[str] | None:
    """The different texts of a column in order, None for a column of numbers.  `InputError` for more than 20."""
    if _numeric(values) or not any(isinstance(value, str) for value in values.tolist()):
        return None
    known = sorted({str(value) for value in values.tolist() if not _missing(value)})
    if len(known) > _CATEGORIES:
        raise InputError(
            f"column {name!r} holds {len(known)} different texts: it is no category of at most {_CATEGORIES}; drop it"
        )
    return known


def floats(name: Any, values: np.ndarray) -> np.ndarray:
    """(N,) float64 with NaN for what is missing.  `InputError` for what is no number."""
    try:
        return np.array([np.nan if _missing(value) else float(value) for value in values.tolist()])
    except (TypeError, ValueError):
        raise InputError(f"column {name!r} holds something that is no number") from None


def _numeric(values: Any) -> bool:
    return getattr(values.dtype, "kind", "O") in "biuf"


def _missing(value: Any) -> bool:
    return value is None or type(value).__name__ == "NAType" or value != value  # pandas' NA has no truth value
