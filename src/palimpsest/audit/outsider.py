"""What an outsider with token probabilities can tell: five membership attacks on one model, each an AUC with interval.

LOSS (Yeom et al. 2018), zlib (Carlini et al. 2021), Min-K% (Shi et al. 2024), Min-K%++ (Zhang et al. 2024,
arXiv:2404.02936: each token's log-probability standardised over the vocabulary) and, where there is a model that
never saw the records, the difference of losses to it.  Orientation as in `audit.membership`: 0 looks trained on, 1/2
cannot be told, 1 looks scrubbed.  Shapes: N texts, V words.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
from torch import Tensor

from palimpsest.audit import membership
from palimpsest.audit.exam import text_logprobs
from palimpsest.audit.memorisation import ends
from palimpsest.core import losses
from palimpsest.core.seeds import numpy_rng
from palimpsest.core.statistics import Interval, auc_interval
from palimpsest.data import records
from palimpsest.data.batches import IGNORE
from palimpsest.models.score import by_tokens, evaluating

if TYPE_CHECKING:
    from datasets import Dataset

    from palimpsest.data.request import ForgetRequest
    from palimpsest.models.lm import LM

K = 20.0  # percent of the least likely tokens


def members(request: ForgetRequest, most: int = 100, seed: int = 0) -> dict[str, Dataset]:
    """At most `most` forget and holdout rows of one kind: texts if both have some, else questions; empty if neither."""
    if request.holdout is None:
        return {}
    for select in (records.select_documents, records.select_questions):
        found = {"forget": select(request.forget), "holdout": select(request.holdout)}
        if all(len(table) > 1 for table in found.values()):
            return {
                name: table.select(np.sort(numpy_rng(seed, "members", name).permutation(len(table))[:most]))
                for name, table in found.items()
            }
    return {}


def scores(lm: LM, rows: Dataset, reference: LM | None = None) -> dict[str, np.ndarray]:
    """{attack: (N,)} scores of texts, high where the model is surprised."""
    logprobs = text_logprobs(lm, rows)
    texts = [completion for _, completion in records.pairs(rows)]
    found = {
        "loss": membership.loss(logprobs),
        "zlib": membership.zlib_ratio(logprobs, texts),
        f"min-{K:g}%": membership.min_k(logprobs, K),
    }
    if lm.guard is None:  # a guard rewrites prompts, and the whole distribution behind it is not given out
        found[f"min-{K:g}%++"] = membership.min_k(standardised(lm, rows), K)
    if reference is not None:
        found["reference"] = found["loss"] - membership.loss(text_logprobs(reference, rows))
    return found


def aucs(lm: LM, sides: dict[str, Dataset], reference: LM | None = None) -> dict[str, Interval]:
    """{attack: AUC of forget against holdout with its 95% interval}."""
    forget, holdout = (scores(lm, sides[name], reference) for name in ("forget", "holdout"))
    return {attack: auc_interval(forget[attack], holdout[attack]) for attack in forget}


def standardised(lm: LM, rows: Any) -> list[np.ndarray]:
    """Each row's own tokens' (log p - mean) / deviation, both over the V words by their own probability (Min-K%++)."""
    encoded = lm.encode(rows)
    found: list[np.ndarray] = [np.empty(0)] * len(encoded)
    with evaluating(lm.model):
        for places in by_tokens(encoded.lengths):
            batch = encoded.batch(places).to(lm.device)
            values = losses.per_token(lm.model, batch, _standard).cpu()
            for place, line, labelled in zip(places, values, (batch.targets != IGNORE).cpu(), strict=True):
                own = line[labelled].double().numpy()
                found[place] = own[: len(own) - ends(lm, encoded.ids[place])]
    return found


def _standard(logits: Tensor, targets: Tensor) -> Tensor:
    logp = logits.log_softmax(-1)
    p = logp.exp()
    mean = (p * logp).sum(-1)
    variance = (p * (logp - mean[:, None]) ** 2).sum(-1)
    return (logp.gather(1, targets[:, None])[:, 0] - mean) / variance.clamp(min=1e-12).sqrt()
