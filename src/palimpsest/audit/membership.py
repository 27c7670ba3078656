"""Can an outsider who sees token probabilities tell that texts were trained on, or that they were scrubbed?

Min-K% Prob (Shi et al. 2024, arXiv:2310.16789) and its older relatives give each text a score that is high where the
model is surprised.  `forget_auc` has MUSE's orientation: P(score of a forget text > score of a holdout text), so 0 says
"trained on", 1/2 "cannot tell", 1 "suspiciously unknown".  The textbook orientation is one minus that; the relative
leakage below would differ in sign and scale.
Shapes: N texts; F forget and H holdout texts.  Knows nothing of models: it reads their token log-probabilities.
"""

from __future__ import annotations

import zlib
from collections.abc import Sequence

import numpy as np

from palimpsest.core.errors import InputError
from palimpsest.core.seeds import numpy_rng
from palimpsest.core.statistics import auc, auc_interval

Logprobs = Sequence[np.ndarray]  # of each text, its predicted tokens' log-probabilities in nats

LOWEST_AUC = 0.05  # of the reference: below it the relative leakage explodes


def min_k(logprobs: Logprobs, k: float = 40) -> np.ndarray:
    """(N,) Min-K% score: minus the mean of each text's k% least likely tokens (at least one token)."""
    if not 0 < k <= 100:
        raise InputError(f"k is a percentage above 0 and at most 100, not {k}")
    return np.array(
        [-np.sort(row)[: max(1, int(len(row) * k / 100))].mean(dtype=np.float64) for row in _checked(logprobs)]
    )


def loss(logprobs: Logprobs) -> np.ndarray:
    """(N,) mean negative log-likelihood a token."""
    return np.array([-row.mean(dtype=np.float64) for row in _checked(logprobs)])


def zlib_ratio(logprobs: Logprobs, texts: Sequence[str]) -> np.ndarray:
    """(N,) loss over the text's length in bytes once compressed: surprise beyond what its own variety explains."""
    return loss(logprobs) / np.array([len(zlib.compress(text.encode("utf-8", "surrogatepass"))) for text in texts])


def lowercase_ratio(logprobs: Logprobs, lowered: Logprobs) -> np.ndarray:
    """(N,) loss over the loss of the lower-cased text; `lowered` are the latter's log-probabilities."""
    return loss(logprobs) / np.maximum(loss(lowered), 1e-12)


def forget_auc(forget: Sequence[float] | np.ndarray, holdout: Sequence[float] | np.ndarray) -> float:
    """P(a forget text's score > a holdout text's), ties counting half: MUSE's AUC."""
    return auc(forget, holdout)


def privacy_leakage(auc_after: float, auc_reference: float) -> float:
    """100 (AUC(after) - AUC(reference)) / AUC(reference), in percent; 0 where an outsider sees no difference.

    `InputError` where the reference's AUC is below 0.05: the ratio would say more about it than about the model.
    """
    if auc_reference < LOWEST_AUC:
        raise InputError(
            f"the reference's AUC is {auc_reference:.3f}: below {LOWEST_AUC} the leakage relative to it explodes "
            "(was the reference trained on the forget set, or is holdout of another distribution?)"
        )
    return 100 * (auc_after - auc_reference) / auc_reference


def feasible(auc_reference: float) -> tuple[float, float]:
    """The least and the largest privacy leakage possible beside a reference with this AUC, in percent."""
    return privacy_leakage(0.0, auc_reference), privacy_leakage(1.0, auc_reference)


def placements(forget: np.ndarray, holdout: np.ndarray) -> np.ndarray:
    """(F,) the share of holdout texts scored below each forget text, ties counting half; their mean is `forget_auc`."""
    return _wins(np.asarray(forget), np.asarray(holdout)).mean(1)


def leakage_interval(
    after: tuple[np.ndarray, np.ndarray],
    reference: tuple[np.ndarray, np.ndarray],
    *,
    confidence: float = 0.95,
    resamples: int = 5000,
    seed: int = 0,
) -> tuple[float | None, float | None]:
    """(low, high) of `privacy_leakage` in percent; (None, None) with fewer than two texts on a side.

    Both arguments are ((F,), (H,)) scores of the same texts.  Texts are resampled, each with both of its scores, so
    what both models find hard does not widen the interval (percentile bootstrap).  Where every pair is won or lost the
    bootstrap collapses to a point; there Newcombe's score interval of the AUC is used, the reference held fixed.
    """
    (forget, holdout), (forget_reference, holdout_reference) = after, reference
    if min(len(forget), len(holdout)) < 2:
        return None, None
    wins, wins_reference = _wins(forget, holdout), _wins(forget_reference, holdout_reference)
    fixed = float(wins_reference.mean())
    if wins.min() == wins.max():
        interval = auc_interval(forget, holdout, confidence=confidence)
        assert interval.low is not None
        assert interval.high is not None
        return privacy_leakage(interval.low, fixed), privacy_leakage(interval.high, fixed)
    rng = numpy_rng(seed, "leakage interval")
    drawn = [rng.multinomial(size, np.full(size, 1 / size), resamples) / size for size in (len(forget), len(holdout))]
    aucs, aucs_reference = (
        np.einsum("rf,fh,rh->r", drawn[0], table, drawn[1], optimize=True) for table in (wins, wins_reference)
    )
    values = 100 * (aucs - aucs_reference) / np.maximum(aucs_reference, LOWEST_AUC)
    low, high = np.quantile(values, [(1 - confidence) / 2, (1 + confidence) / 2])
    return float(low), float(high)


def _wins(forget: np.ndarray, holdout: np.ndarray) -> np.ndarray:
    """(F, H): 1 where the forget text's score is above the holdout text's, 1/2 where they are equal, else 0."""
    return (np.sign(forget[:, None] - holdout[None, :]) + 1) / 2


def _checked(logprobs: Logprobs) -> Logprobs:
    for row, values in enumerate(logprobs):
        if len(values) == 0:
            raise InputError(
                f"text {row} has no token to score: it is empty, or a single token without a beginning before it"
            )
    return logprobs
