"""A gate: does a text fall into the scope of what must be forgotten?  A linear classifier on a frozen sentence encoder.

Its threshold is conformal: set on texts the classifier had not seen, so that the share of errors is bounded.  The bound
holds for texts like those it was made from; for texts of another kind (a misspelt name, another language) nothing is
promised.  Knows nothing of what is done with its answer.  Shapes: N texts, D dimensions of the encoder.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from palimpsest.core.errors import InputError
from palimpsest.models.encoder import PACKAGED, Encoder

Rule = Literal["strict", "cautious"]

_FOLDS = 5


@dataclass(frozen=True, eq=False)
class Gate:
    """P(in scope | text) = sigmoid(w . e(text) + b) where e is the encoder; the gate fires above `threshold`."""

    weights: Tensor = field(repr=False)  # (D,) float64
    bias: float
    threshold: float
    encoder: str = PACKAGED

    @staticmethod
    def fit(
        inside: Sequence[str],
        outside: Sequence[str],
        *,
        threshold: float = 0.0,
        error: float = 0.05,
        rule: Rule = "strict",
        strength: float = 100.0,
        encoder: str = PACKAGED,
        seed: int = 0,
    ) -> Gate:
        """Train on texts inside the scope and outside it, the two weighing the same however many they are.

        `threshold` is taken as it is where it is not 0.  Else it is conformal (`conformal_threshold`) with at most
        `error` errors a class, on the probabilities that each text gets from a classifier trained on the other four
        fifths (equal texts are never on both sides).  `strength`: the inverse of the ridge penalty.
        Raises `InputError` for fewer than five different texts on a side, for a text on both sides, and for a
        `threshold` or `error` outside (0, 1).
        """
        if threshold and not 0 < threshold < 1:
            raise InputError(f"a gate's threshold must lie between 0 and 1, not {threshold:g}")
        if not 0 < error < 1:
            raise InputError(f"a gate's error must lie between 0 and 1, not {error:g}")
        sides = [list(dict.fromkeys(texts)) for texts in (inside, outside)]
        for name, texts in zip(("inside", "outside"), sides, strict=True):
            if len(texts) < _FOLDS:
                raise InputError(f"a gate needs at least {_FOLDS} different texts {name} its scope, not {len(texts)}")
        both = set(sides[0]) & set(sides[1])
        if both:
            raise InputError(
                f"{len(both)} texts are both inside and outside the gate's scope, one is {min(both)!r:.80}"
            )
        vectors = _encoder(encoder).embed(sides[0] + sides[1]).astype(np.float64)
        labels = np.repeat([1, 0], [len(texts) for texts in sides])
        weights, bias, threshold = linear_gate(
            vectors, labels, threshold=threshold, error=error, rule=rule, strength=strength, seed=seed
        )
        return Gate(torch.from_numpy(weights), bias, threshold, encoder)

    def probability(self, texts: Sequence[str]) -> np.ndarray:
        """(N,) float64: how likely each text is inside the scope.  An empty text is not: 0."""
        found = np.zeros(len(texts))
        asked = [row for row, text in enumerate(texts) if text.strip()]
        if asked:
            vectors = _encoder(self.encoder).embed([texts[row] for row in asked]).astype(np.float64)
            found[asked] = sigmoid(vectors @ self.weights.numpy() + self.bias)
        return found

    def __call__(self, texts: Sequence[str]) -> np.ndarray:
        """(N,) bool: whether the gate fires."""
        return self.probability(texts) > self.threshold

    def state(self) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """JSON-able settings, and tensors: what `restore` makes the same gate from."""
        return {"bias": self.bias, "threshold": self.threshold, "encoder": self.encoder}, {"weights": self.weights}

    @staticmethod
    def restore(settings: dict[str, Any], tensors: dict[str, Tensor]) -> Gate:
        return Gate(tensors["weights"], settings["bias"], settings["threshold"], settings["encoder"])


def linear_gate(
    vectors: np.ndarray,
    labels: np.ndarray,
    *,
    threshold: float = 0.0,
    error: float = 0.05,
    rule: Rule = "strict",
    strength: float = 100.0,
    seed: int = 0,
) -> tuple[np.ndarray, float, float]:
    """Weights (D,), bias and threshold of a gate on (N, D) vectors, labelled 1 inside the scope; see `Gate.fit`."""
    weights, bias = _logistic(vectors, labels, strength)
    if not threshold:
        seen = _held_out_probabilities(vectors, labels, strength, seed)
        threshold = conformal_threshold(seen[labels == 1], seen[labels == 0], error=error, rule=rule)
    return weights, bias, threshold


def conformal_threshold(inside: np.ndarray, outside: np.ndarray, *, error: float, rule: Rule) -> float:
    """The threshold on P(in scope) that class-conditional (Mondrian) conformal prediction gives.

    `inside` and `outside`: (n,) probabilities of calibration texts of each class, all of them held out.  A class is in
    the prediction set of a text unless its nonconformity, 1 - P(class), is above the ceil((n + 1)(1 - error))-th
    smallest of the class's own.  "strict" fires where the set is {inside}, so that at most `error` of the outside texts
    fire; "cautious" fires where the set holds inside, so that at most `error` of the inside texts pass.
    """
    inside_in_set = -conformal_quantile(-inside, error)  # P at or above this: "inside" is in the set
    if rule == "cautious":
        return float(np.nextafter(inside_in_set, -math.inf))
    outside_in_set = conformal_quantile(outside, error)  # P at or below this: "outside" is in the set
    return float(max(outside_in_set, np.nextafter(inside_in_set, -math.inf)))


def conformal_quantile(scores: np.ndarray, error: float) -> float:
    """The ceil((n + 1)(1 - error))-th smallest of (n,) scores; the largest, where they are too few for the error."""
    place = min(math.ceil((len(scores) + 1) * (1 - error)), len(scores))
    return float(np.sort(scores)[place - 1])


def _logistic(vectors: np.ndarray, labels: np.ndarray, strength: float) -> tuple[np.ndarray, float]:
    from sklearn.linear_model import LogisticRegression

    fitted = LogisticRegression(C=strength, class_weight="balanced", max_iter=2000).fit(vectors, labels)
    return fitted.coef_[0], float(fitted.intercept_[0])


def _held_out_probabilities(vectors: np.ndarray, labels: np.ndarray, strength: float, seed: int) -> np.ndarray:
    """(N,) each text's probability by a classifier that was trained without its fold."""
    from sklearn.model_selection import StratifiedKFold

    found = np.empty(len(vectors))
    for rest, fold in StratifiedKFold(_FOLDS, shuffle=True, random_state=seed).split(vectors, labels):
        weights, bias = _logistic(vectors[rest], labels[rest], strength)
        found[fold] = sigmoid(vectors[fold] @ weights + bias)
    return found


def sigmoid(values: np.ndarray) -> np.ndarray:
    from scipy.special import expit

    return expit(values)


@cache
def _encoder(name: str) -> Encoder:
    """One encoder a name and process: loading takes seconds."""
    return Encoder.load(name)
