"""Does a model recite a text?  Continuations of its beginning, and what teacher-forced greedy decoding reproduces.

Verbatim memorisation is MUSE's (sheet `muse`, C1); extraction strength (Carlini et al. 2021) and exact memorisation
(Tirumala et al. 2022) are those of sheet `knowledge_unlearning`.
Texts are cut as tokens, never as strings, so prompt, truth and continuation count in the same tokens.
Shapes: N texts, T scored tokens of one.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from palimpsest.core.errors import InputError

if TYPE_CHECKING:
    from palimpsest.models.encode import Rows
    from palimpsest.models.lm import LM

SHORTEST = 8  # tokens of a text: with fewer there is nothing to cut in two


@dataclass(frozen=True)
class Recital:
    """A text cut in two: what the model is given, and how it goes on."""

    row: int  # its number among the texts
    prompt: np.ndarray  # token ids, with the beginning-of-sequence token if the tokenizer has one
    truth: np.ndarray  # token ids


def recitals(lm: LM, texts: Sequence[str], prompt_tokens: int, continuation_tokens: int) -> list[Recital]:
    """The texts cut for `recite`; those of fewer than 8 tokens are left out.

    The prompt is the first `prompt_tokens` tokens and the truth the next `continuation_tokens`.  A shorter text (or a
    smaller context) gives as its prompt all but the last `continuation_tokens`, or its first half if that is longer.
    """
    from palimpsest.models.encode import bos_length

    if not texts:
        return []
    wanted = prompt_tokens + continuation_tokens
    encoded = lm.encode(list(texts), max_length=min(lm.max_length, wanted + 2))  # and its first and last special token
    found = []
    for row, ids in enumerate(encoded.ids):
        begin = bos_length(lm.tokenizer, ids)
        body = ids[begin : len(ids) - ends(lm, ids)][:wanted]
        if len(body) < SHORTEST:
            continue
        place = min(prompt_tokens, max(len(body) - continuation_tokens, len(body) // 2))
        found.append(Recital(row, ids[: begin + place], body[place : place + continuation_tokens]))
    return found


def recite(lm: LM, asked: Sequence[Recital]) -> list[np.ndarray]:
    """The model's greedy continuation of each prompt, cut to as many tokens as its truth has."""
    if not asked:
        return []
    most = max(len(recital.truth) for recital in asked)
    said = lm.generate_ids([recital.prompt for recital in asked], max_new_tokens=most)
    return [ids[: len(recital.truth)] for ids, recital in zip(said, asked, strict=True)]


def decode(lm: LM, rows: Sequence[np.ndarray]) -> list[str]:
    """Token ids as texts, without special tokens."""
    if not rows:
        return []
    return lm.tokenizer.batch_decode(
        [ids.tolist() for ids in rows], skip_special_tokens=True, clean_up_tokenization_spaces=False
    )


def greedy_hits(lm: LM, rows: Rows) -> list[np.ndarray]:
    """For each row, (T,) bool: whether each scored token is the likeliest one after the true tokens before it.

    The end-of-sequence token that encoding adds is not among them.  `InputError` for a guarded model: its guard acts on
    what is asked, and nothing is asked here.
    """
    import torch

    from palimpsest.core import losses
    from palimpsest.data.batches import IGNORE
    from palimpsest.models.score import by_tokens, evaluating

    if lm.guard is not None:
        raise InputError("teacher-forced decoding looks at the weights alone: give the model without its guard")
    encoded = lm.encode(rows)
    hits = [np.zeros(0, dtype=bool)] * len(encoded)
    with evaluating(lm.model):
        for places in by_tokens(encoded.lengths):
            batch = encoded.batch(places).to(lm.device)
            hidden, head = losses.hidden_states(lm.model, batch)
            right = torch.cat([head(part).argmax(-1) for part in hidden.split(1024)]) if len(hidden) else hidden[:, 0]
            labelled = batch.targets != IGNORE
            right = (right == batch.targets[labelled]).cpu()
            for place, found in zip(places, right.split(labelled.sum(1).tolist()), strict=True):
                hits[place] = found.numpy()[: len(found) - ends(lm, encoded.ids[place])]
    return hits


def exact_memorisation(hits: Sequence[np.ndarray]) -> np.ndarray:
    """(N,) the share of a text's tokens that are greedy hits; 0 for a text without tokens."""
    return np.array([found.mean() if len(found) else 0.0 for found in hits])


def extraction_strength(hits: Sequence[np.ndarray]) -> np.ndarray:
    """(N,) 1 - k/T, k tokens being the shortest beginning after which greedy decoding reproduces all the rest.

    From 0 (the last token is missed) to 1 (the whole text comes from nothing); 0 for a text without tokens.
    """
    return np.array([1 - _beginning(found) / len(found) if len(found) else 0.0 for found in hits])


def _beginning(hits: np.ndarray) -> int:
    misses = np.flatnonzero(~hits)
    return int(misses[-1]) + 1 if len(misses) else 0


def ends(lm: LM, ids: np.ndarray) -> int:
    """1 if the row ends with the end-of-sequence token, else 0."""
    return int(len(ids) > 0 and lm.tokenizer.eos_token_id is not None and ids[-1] == lm.tokenizer.eos_token_id)
