"""How typical features are of a set of features: distances at every layer, and a one-class SVM on them.

The scoring of O3's detector (Gao et al. 2024, arXiv:2407.10223, section 3.2; sheet `o3`, part 3).  Knows nothing of
where features come from.  Shapes: N rows to be judged, n used, m held out, L layers, D dimensions.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np


@dataclass(frozen=True)
class Distances:
    """How far features are from those of the used texts, at every layer."""

    mean: np.ndarray  # (L, D)
    precision: np.ndarray  # (L, D, D)
    bank: np.ndarray  # (n, L, D), of length one
    gamma: float

    @staticmethod
    def of(used: np.ndarray, gamma: float) -> Distances:
        from sklearn.covariance import ledoit_wolf

        # shrunk: with fewer texts than dimensions the plain covariance has no inverse
        shrunk = [ledoit_wolf(used[:, layer])[0] for layer in range(used.shape[1])]
        precision = np.stack([np.linalg.inv(one + 1e-9 * np.eye(len(one))) for one in shrunk])
        return Distances(used.mean(0), precision, _unit_length(used), gamma)

    def __call__(self, found: np.ndarray, *, own: bool = False) -> np.ndarray:
        """(N, L) squared Mahalanobis distance from the mean, and `gamma` times the cosine distance from the nearest
        used text; `own`: these are the used texts, none of which is its own neighbour."""
        from_mean = found - self.mean
        mahalanobis = np.einsum("nld,lde,nle->nl", from_mean, self.precision, from_mean, optimize=True)
        cosines = np.einsum("nld,mld->nml", _unit_length(found), self.bank, optimize=True)
        if own:
            cosines[np.arange(len(found)), np.arange(len(found))] = -np.inf
        return mahalanobis + self.gamma * (1 - cosines.max(1))


@dataclass(frozen=True)
class Scale:
    """A linear one-class SVM on distances, and where its scores lie for texts of the set."""

    farthest: np.ndarray  # (L,) the largest distances of the used texts
    unit: np.ndarray  # (L,) the spread of theirs
    slope: np.ndarray  # (L,)
    offset: float
    centres: tuple[float, float] = (0.0, 0.0)  # mean scores of the used texts and of those held out
    spread: float = 1.0  # standard deviation of the latter

    @staticmethod
    def of(used: np.ndarray, rest: np.ndarray, nu: float) -> Scale:
        """From the distances of the used texts (n, L) and of those held out (m, L).

        A linear one-class SVM parts its texts from the origin.  That is put where a text would be that is as far away
        at every layer as the farthest used one, so the slope is nowhere below 0: nearness counts for a text at every
        layer.  (With the origin at distance 0, as in the published code, it would count against it.)
        """
        from sklearn.svm import OneClassSVM

        farthest, unit = used.max(0), np.maximum(used.std(0), 1e-9)
        svm = OneClassSVM(kernel="linear", nu=nu).fit((farthest - used) / unit)
        scale = Scale(farthest, unit, svm.coef_[0], float(svm.intercept_[0]))
        known, unseen = scale(used), scale(rest)
        return replace(
            scale,
            centres=(float(known.mean()), float(unseen.mean())),
            spread=max(float(unseen.std()), 1e-9),
        )

    def __call__(self, distances: np.ndarray) -> np.ndarray:
        """(N,) the SVM's scores."""
        return (self.farthest - distances) / self.unit @ self.slope + self.offset


def _unit_length(found: np.ndarray) -> np.ndarray:
    return found / np.maximum(np.linalg.norm(found, axis=-1, keepdims=True), 1e-12)
