"""Every forgetting loss, for use in a training loop of your own.

They take a model and a `palimpsest.data.batches.Batch` (or log-probabilities), and give a scalar (or a value a row)::

    from palimpsest.forget import losses

    encoded = lm.encode(forget_records)                      # an Encoded table
    start = losses.start_logprobs(lm, encoded)               # the frozen model's numbers, computed once, kept on disk
    batch = encoded.batch(range(8))                          # 8 rows
    now = losses.sequence_logprobs(model, batch)             # (8,)
    losses.npo(now, start(batch), beta=0.1).mean().backward()

Means divide by `batch.total_rows` and `batch.total_tokens`, which for a batch made as above are its own: a batch cut
into shares (`Batch.share`) keeps the totals of the whole, so that the shares' losses add up.
"""

from __future__ import annotations

from palimpsest.core.losses import (
    cross_entropy,
    dpo,
    kl,
    nll,
    npo,
    over_rows,
    over_tokens,
    per_token,
    sequence_logprobs,
    simnpo,
    token_kl,
    token_logprobs,
)
from palimpsest.core.reference import reference
from palimpsest.forget.ascent import gradient_ascent
from palimpsest.forget.dmm import log_odds
from palimpsest.forget.rmu import misdirection, states_of
from palimpsest.forget.scrub import distilled
from palimpsest.forget.unlearn import start_logprobs
from palimpsest.forget.weighted import ce_u, undial, weighted_ascent

__all__ = [
    "ce_u",
    "cross_entropy",
    "distilled",
    "dpo",
    "gradient_ascent",
    "kl",
    "log_odds",
    "misdirection",
    "nll",
    "npo",
    "over_rows",
    "over_tokens",
    "per_token",
    "reference",
    "sequence_logprobs",
    "simnpo",
    "start_logprobs",
    "states_of",
    "token_kl",
    "token_logprobs",
    "undial",
    "weighted_ascent",
]
