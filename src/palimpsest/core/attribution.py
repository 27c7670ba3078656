"""Datamodels: what a model would have answered, had some rows been left out of its training, without training again.

A datamodel is linear in who is there: f(x; S) = b(x) + sum over i in S of beta_i(x) (Ilyas et al. 2022,
arXiv:2202.00622).  Its coefficients come from models trained on random subsets (`regression`), or from the gradients of
a few models trained on everything (`trak`; Park et al. 2023, arXiv:2303.14186).  What a model without the rows F would
answer is h(x) = f(x; all) - sum over i in F of beta_i(x): its own answer is the intercept, which cancels the bias that
the surrogate has on the full set.  Good where few rows go; half of them or more is no longer a small change.
Shapes: N training rows, M models, K outputs (any shape, flattened inside), Q dimensions of the projection.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from palimpsest.core.errors import InputError, unknown
from palimpsest.core.seeds import numpy_rng

Estimator = Literal["lasso", "ridge", "difference"]
Rows = Sequence[int] | np.ndarray | Tensor

_PENALTIES = (0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0)  # tried by ridge; as multiples of the mean eigenvalue
_SHARES = (0.5, 0.3, 0.2, 0.1, 0.05, 0.02, 0.01)  # tried by lasso; of the penalty at which all coefficients are 0
_LASSO_STEPS = 20  # at each penalty; they start where the one before ended
_TRIED = 128  # outputs that lasso's penalty is chosen on


@dataclass(frozen=True, eq=False)
class Datamodel:
    """What each training row's presence adds to each output: `effects`, (N, ...)."""

    effects: Tensor

    def __len__(self) -> int:
        return len(self.effects)

    def removal(self, rows: Rows) -> Tensor:
        """What taking the rows away takes from each output, (...).  Raises `InputError` as `check_rows` does."""
        return self.effects[torch.as_tensor(check_rows(rows, len(self)), device=self.effects.device)].sum(0)

    def without(self, outputs: Tensor, rows: Rows) -> Tensor:
        """DM-Direct: what a model that gives `outputs`, (...), would give, had it been trained without the rows."""
        return outputs - self.removal(rows)

    def predict(self, masks: Tensor | np.ndarray) -> Tensor:
        """The outputs of models trained on the rows in `masks`, (M, N) bool, up to a constant an output: (M, ...)."""
        design = torch.as_tensor(np.asarray(masks)).to(self.effects)
        if design.ndim != 2 or design.shape[1] != len(self):
            raise InputError(f"masks {tuple(design.shape)} do not fit a datamodel of {len(self)} training rows")
        return torch.tensordot(design, self.effects, 1)

    def scaled(self, factor: float) -> Datamodel:
        return replace(self, effects=factor * self.effects)


def check_rows(rows: Rows, total: int) -> np.ndarray:
    """The numbers of the rows to forget, (k,) int64.

    `InputError` if there are none, if one comes twice or does not exist, or if they are half of all rows or more.
    """
    found = np.asarray(rows)
    if found.ndim != 1 or found.size == 0 or found.dtype.kind not in "iu":
        raise InputError(f"rows to forget are a list of row numbers, not {found.dtype} {found.shape}")
    outside = found[(found < 0) | (found >= total)]
    if len(outside):
        raise InputError(f"row {outside[0]} is not among the {total} training rows (0 to {total - 1})")
    values, counts = np.unique(found, return_counts=True)
    if (counts > 1).any():
        raise InputError(f"row {values[counts > 1][0]} is named {counts.max()} times among the rows to forget")
    if 2 * len(found) >= total:
        raise InputError(
            f"{len(found)} of {total} training rows must go, half or more: a datamodel tells of small changes; "
            "train again without them instead"
        )
    return found.astype(np.int64)


def draw_subsets(rows: int, models: int, *, share: float = 0.5, seed: int = 0) -> np.ndarray:
    """(M, N) bool: for each model a random subset of `share` of the rows (0.5 in the paper)."""
    size = round(share * rows)
    if models < 1 or not 0 < size < rows:
        raise InputError(f"{models} subsets of {size} of {rows} rows: wanted at least 1, neither empty nor whole")
    masks = np.zeros((models, rows), dtype=bool)
    for model, mask in enumerate(masks):
        mask[numpy_rng(seed, "subset", model).permutation(rows)[:size]] = True
    return masks


def regression(masks: Tensor | np.ndarray, outputs: Tensor, estimator: Estimator = "lasso") -> Datamodel:
    """A datamodel from M models: who was in their training, (M, N) bool, and what they answer, (M, ...).

    - "ridge": each output's penalty is the best of a grid by its leave-one-out error, in closed form: one decomposition
      serves all outputs.  What cannot be told from noise is shrunk towards 0.
    - "lasso": the paper's sparse regression; the penalty, a share of each output's largest sensible one, is chosen on a
      fifth of the models.  The best at predicting, but slower; see `group_removal` for many small effects.
    - "difference": mean with the row less mean without it.  Unbiased for halves, with a variance of 4 Var(f) / M.

    `InputError` for outputs that are not finite or do not fit the masks, and for a row that is in all models or none.
    """
    design = np.asarray(masks)
    if design.ndim != 2 or design.dtype != np.bool_ or len(design) != len(outputs) or len(design) < 4:
        raise InputError(
            f"wanted masks (models, rows) bool and as many outputs, 4 models or more, "
            f"not {design.dtype} {design.shape} and {tuple(outputs.shape)}"
        )
    if not torch.isfinite(outputs).all():
        broken = int((~torch.isfinite(outputs.reshape(len(outputs), -1))).any(1).nonzero()[0])
        raise InputError(f"the outputs of subset model {broken} are not finite")
    seen = design.sum(0)
    if len(constant := np.flatnonzero((seen == 0) | (seen == len(design)))):
        raise InputError(
            f"training row {constant[0]} is in {seen[constant[0]]} of {len(design)} subsets: "
            "its effect cannot be told, draw more subsets"
        )
    estimators = {"lasso": _lasso, "ridge": _ridge, "difference": _difference}
    if estimator not in estimators:
        raise unknown("estimator", estimator, estimators)
    x_MN = torch.from_numpy(design).to(outputs.device, torch.float64)
    y_MK = outputs.reshape(len(outputs), -1).double()
    effects = estimators[estimator](x_MN, y_MK)
    return Datamodel(effects.reshape(-1, *outputs.shape[1:]).to(outputs.dtype))


def _difference(x_MN: Tensor, y_MK: Tensor) -> Tensor:
    inside, outside = x_MN.sum(0)[:, None], (1 - x_MN).sum(0)[:, None]
    return x_MN.T @ y_MK / inside - (1 - x_MN).T @ y_MK / outside


def group_removal(datamodel: Datamodel, masks: Tensor | np.ndarray, outputs: Tensor, rows: Rows) -> Tensor:
    """What taking the rows away takes from each output, (...), with what a sparse datamodel has left out.

    Lasso drops the small effects of rows that are alike, whose sum may be large.  Their difference of means in what it
    left unexplained in its own M models is unbiased (Zhang and Zhang 2014, "debiasing") but noisy, so as much of it is
    added as two halves of the models agree on (`trusted_share`, over all outputs).
    """
    gone = check_rows(rows, len(datamodel))
    left = (outputs - datamodel.predict(masks)).reshape(len(outputs), -1).double()
    present = torch.from_numpy(np.asarray(masks)[:, gone]).to(left)
    one, other = (_difference(present[half], left[half]).sum(0) for half in (slice(0, None, 2), slice(1, None, 2)))
    extra = trusted_share(one, other) * (one + other) / 2
    return datamodel.removal(gone) + extra.reshape(outputs.shape[1:]).to(datamodel.effects)


def _ridge(x_MN: Tensor, y_MK: Tensor) -> Tensor:
    x_MN, y_MK = x_MN - x_MN.mean(0), y_MK - y_MK.mean(0)
    u_MR, s_R, v_RN = _svd(x_MN)
    z_RK = u_MR.T @ y_MK
    best_K = torch.full_like(y_MK[0], torch.inf)
    kept_RK = torch.zeros_like(z_RK)
    for penalty in _PENALTIES:
        share_R = s_R**2 / (s_R**2 + penalty * (s_R**2).mean())
        leverage_M = 1 / len(y_MK) + u_MR.square() @ share_R
        errors_K = ((y_MK - u_MR @ (share_R[:, None] * z_RK)) / (1 - leverage_M)[:, None]).square().mean(0)
        better_K = errors_K < best_K
        best_K = torch.where(better_K, errors_K, best_K)
        kept_RK = torch.where(better_K, (share_R / s_R)[:, None] * z_RK, kept_RK)
    return v_RN.T @ kept_RK


def _svd(x_MN: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The thin singular value decomposition, by way of the smaller Gram matrix, without the directions of length 0."""
    wide = x_MN.shape[0] < x_MN.shape[1]
    values, vectors = torch.linalg.eigh(x_MN @ x_MN.T if wide else x_MN.T @ x_MN)
    kept = values > 1e-10 * values[-1]
    s_R, vectors = values[kept].sqrt(), vectors[:, kept]
    return (vectors, s_R, vectors.T @ x_MN / s_R[:, None]) if wide else (x_MN @ vectors / s_R, s_R, vectors.T)


def _lasso(x_MN: Tensor, y_MK: Tensor) -> Tensor:
    held = torch.arange(len(x_MN)) % 5 == 4
    tried = slice(None, None, max(1, y_MK.shape[1] // _TRIED))
    x_fit, y_fit, y_held = x_MN[~held], y_MK[~held][:, tried], y_MK[held][:, tried]
    design = x_MN[held] - x_fit.mean(0)
    spread_K = y_fit.var(0).clamp(min=torch.finfo(y_fit.dtype).tiny)
    errors = [
        float(((y_held - y_fit.mean(0) - design @ beta_NK.double()).square().mean(0) / spread_K).mean())
        for beta_NK in _lasso_path(x_fit, y_fit, _SHARES)
    ]
    best = int(np.argmin(errors))
    *_, beta_NK = _lasso_path(x_MN, y_MK, _SHARES[: best + 1])
    return beta_NK


def _lasso_path(x_MN: Tensor, y_MK: Tensor, shares: Sequence[float]) -> Iterator[Tensor]:
    """The coefficients (N, K) for each penalty, largest first, each starting from the one before."""
    x_MN, y_MK = x_MN - x_MN.mean(0), y_MK - y_MK.mean(0)
    gram_NN, moment_NK = x_MN.T @ x_MN / len(x_MN), x_MN.T @ y_MK / len(x_MN)
    gram_NN, moment_NK = gram_NN.float(), moment_NK.float()  # hundreds of products of (N, N) with (N, K)
    beta_NK = torch.zeros_like(moment_NK)
    for share in shares:
        beta_NK = lasso(gram_NN, moment_NK, share * moment_NK.abs().amax(0), beta_NK, _LASSO_STEPS)
        yield beta_NK


def lasso(gram_NN: Tensor, moment_NK: Tensor, penalty_K: Tensor, start_NK: Tensor, steps: int) -> Tensor:
    """argmin of 1/2 b'Gb - m'b + penalty |b|_1 for each output, (N, K), by FISTA (Beck and Teboulle 2009)."""
    size = 1 / float(torch.linalg.matrix_norm(gram_NN, 2))
    beta_NK = ahead_NK = start_NK
    momentum = 1.0
    for _ in range(steps):
        moved_NK = ahead_NK - size * (gram_NN @ ahead_NK - moment_NK)
        next_NK = moved_NK.sign() * (moved_NK.abs() - size * penalty_K).clamp(min=0)
        grown = (1 + (1 + 4 * momentum**2) ** 0.5) / 2
        ahead_NK = next_NK + (momentum - 1) / grown * (next_NK - beta_NK)
        beta_NK, momentum = next_NK, grown
    return beta_NK


@dataclass(frozen=True, eq=False)
class Trak:
    """What TRAK keeps of M models trained on everything: beta(x) = [mean q] [mean phi(x)' (Phi'Phi + rho)^-1 Phi'].

    The means over models are taken separately and then multiplied, row by row.
    """

    whitened: tuple[Tensor, ...]  # (N, Q) of each model: Phi L^-T, where L L' = Phi'Phi + rho
    whiteners: tuple[Tensor, ...]  # (Q, Q) of each: L^-T
    weights: Tensor  # (N,): q, the mean over models of 1 - p of each row's own answer

    def removal(self, queries: Sequence[Tensor], rows: Rows | None = None) -> Tensor:
        """What taking the rows away (None: all of them) takes from each query's output, (...), before any calibration.

        `queries`: each model's projected gradients of the outputs, (..., Q).  No (N, queries) table is made.
        """
        wanted = slice(None) if rows is None else torch.as_tensor(check_rows(rows, len(self.weights)))
        weights = self.weights[wanted]
        found = [query @ (row_NQ[wanted].T @ weights) for query, row_NQ in self._pairs(queries)]
        return torch.stack(found).mean(0)

    def datamodel(self, queries: Sequence[Tensor]) -> Datamodel:
        """The effects of every training row on every query, (N, ...), before any calibration."""
        kernel = torch.stack([torch.tensordot(row_NQ, query, ([1], [-1])) for query, row_NQ in self._pairs(queries)])
        return Datamodel(kernel.mean(0) * self.weights.reshape(-1, *[1] * (kernel.ndim - 2)))

    def _pairs(self, queries: Sequence[Tensor]) -> list[tuple[Tensor, Tensor]]:
        """Of each model the whitened queries (..., Q) and the whitened rows."""
        if len(queries) != len(self.whitened):
            raise InputError(f"gradients of {len(queries)} models for a TRAK of {len(self.whitened)}")
        seen = [query @ whitener for query, whitener in zip(queries, self.whiteners, strict=True)]
        return list(zip(seen, self.whitened, strict=True))


def trak(features: Sequence[Tensor], margins: Sequence[Tensor], ridge: float = 0.1) -> Trak:
    """From each model's projected gradients of the training rows' margins, (N, Q), and these margins, (N,).

    A margin is log p / (1 - p) of the row's own answer.  `ridge` is a multiple of the mean eigenvalue of Phi'Phi; ours
    is large because it should be: on digits it nearly doubles the LDS that 1e-3 has.
    """
    whitened, whiteners = [], []
    for phi_NQ in features:
        gram_QQ = (phi_NQ.T @ phi_NQ).double()
        rho = ridge * gram_QQ.diagonal().mean().clamp(min=torch.finfo(torch.float32).tiny)
        unit_QQ = torch.eye(len(gram_QQ)).to(gram_QQ)
        factor = torch.linalg.cholesky(gram_QQ + rho * unit_QQ)
        whitener = torch.linalg.solve_triangular(factor, unit_QQ, upper=False).T.to(phi_NQ.dtype)
        whitened.append(phi_NQ @ whitener)
        whiteners.append(whitener)
    return Trak(tuple(whitened), tuple(whiteners), torch.stack([torch.sigmoid(-m) for m in margins]).mean(0))


def margins(logits: Tensor, labels: Tensor) -> Tensor:
    """log p / (1 - p) of the labelled class: logits (..., N, C), labels (N,) -> (..., N)."""
    own = labels.expand(logits.shape[:-1])[..., None]
    others = logits.scatter(-1, own, -torch.inf)
    return logits.gather(-1, own)[..., 0] - others.logsumexp(-1)


def scale_of(predicted: Tensor, observed: Tensor) -> float:
    """The factor s that brings s * predicted closest to observed, in squares; 0 where nothing was predicted."""
    return float((predicted * observed).sum() / predicted.square().sum().clamp(min=torch.finfo(predicted.dtype).tiny))


def trusted_share(one: Tensor, other: Tensor) -> float:
    """How much of the mean of two estimates is signal, 0 to 1, if their errors are independent (halves of the models).

    Their product is the signal's square on average; an effect times this share has the least expected square error.
    """
    both = ((one + other) / 2).square().sum()
    return min(max(float((one * other).sum() / both.clamp(min=torch.finfo(one.dtype).tiny)), 0.0), 1.0)
