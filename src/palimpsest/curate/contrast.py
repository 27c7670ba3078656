"""Where and how an expert's next token departs from an amateur's: rollouts, divergences, and contrastive targets.

Both models read the same tokens, so each step of a rollout has two distributions; they come from one pass of each
model over the whole rollout.  Tokens stay tokens: nothing is decoded and read again.
Shapes: N rollouts, S steps in all, n of them at once, M tokens of a target, V words.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from palimpsest.core.errors import InputError
from palimpsest.core.losses import evaluating, hidden_states
from palimpsest.data.batches import Encoded

if TYPE_CHECKING:
    from palimpsest.models.lm import LM

_ROWS = 16  # rollouts read at once
_STEPS = 256  # of them, steps whose logits are held at once
_FLOOR = 1e-12  # added to probabilities before their logarithm


@dataclass(frozen=True)
class Steps:
    """The steps of N rollouts, one after the other: at each, what the expert should be taught, and how far apart the
    two models are.
    """

    rollouts: Encoded  # N, prompt and response; `starts` say where the responses begin
    divergence: np.ndarray  # (S,) float32, KL(expert || amateur) in nats
    tokens: np.ndarray  # (S, M) int64
    weights: np.ndarray  # (S, M) float32, the target: 0 beyond its own tokens
    chosen: np.ndarray  # (S,) bool: the steps to be taught

    @cached_property
    def offsets(self) -> np.ndarray:
        """(N + 1,) the first step of each rollout, and S."""
        return np.concatenate([[0], np.cumsum(self.rollouts.lengths - np.asarray(self.rollouts.starts))])

    @property
    def own(self) -> np.ndarray:
        """(S,) the token that the expert itself wrote."""
        rows = zip(self.rollouts.ids, self.rollouts.starts, strict=True)
        return np.concatenate([ids[start:] for ids, start in rows])

    def choose(self, chosen: np.ndarray) -> Steps:
        return replace(self, chosen=chosen)

    def without_contrast(self) -> Steps:
        """The same steps, taught the expert's own tokens."""
        own = self.own[:, None]
        return replace(self, tokens=own, weights=np.ones(own.shape, np.float32))


def contrast(expert: Tensor, amateur: Tensor, alpha: float) -> tuple[Tensor, Tensor, Tensor]:
    """From logits (n, V) of both: the divergence (n,), and the target as tokens and weights (n, M).

    The target is proportional to expert / amateur over the tokens that the expert finds at least `alpha` times as
    likely as its first choice (all float32: rounded logits look like a divergence).
    """
    likely, other = expert.float().softmax(-1), amateur.float().softmax(-1)
    ratio = (likely + _FLOOR).log() - (other + _FLOOR).log()
    plausible = likely >= alpha * likely.max(-1, keepdim=True).values
    width = int(plausible.sum(-1).max())
    tokens = likely.masked_fill(~plausible, -1).topk(width).indices
    weights = ratio.masked_fill(~plausible, -torch.inf).gather(-1, tokens).softmax(-1)
    return (likely * ratio).sum(-1), tokens, weights


def rolled_out(expert: LM, prompts: Sequence[np.ndarray], max_new_tokens: int) -> Encoded:
    """The expert's greedy responses to prompts given as tokens; that it ends is a step as well."""
    responses = expert.generate_ids(prompts, max_new_tokens=max_new_tokens)
    end = [] if expert.tokenizer.eos_token_id is None else [expert.tokenizer.eos_token_id]
    rows = []
    for prompt, response in zip(prompts, responses, strict=True):
        ended = end if len(response) < max_new_tokens else []
        rows.append(np.concatenate([prompt, response, np.array(ended, dtype=np.int64)]))
    return Encoded(tuple(rows), tuple(len(prompt) for prompt in prompts), int(expert.tokenizer.pad_token_id))


def steps_of(expert: LM, amateur: LM, rollouts: Encoded, alpha: float) -> Steps:
    """The contrast of both models at every step of the rollouts; none is chosen yet."""
    longest = int(rollouts.lengths.max(initial=0))
    if longest > amateur.max_length:
        raise InputError(f"a rollout has {longest} tokens, and the amateur can read {amateur.max_length}")
    words = len(expert.tokenizer)  # the rows beyond are padding, and another number in each model
    offsets = np.concatenate([[0], np.cumsum(rollouts.lengths - np.asarray(rollouts.starts))])
    divergence = np.empty(offsets[-1], np.float32)
    targets: list[tuple[np.ndarray, np.ndarray]] = []
    places: list[np.ndarray] = []
    with evaluating(expert.model), evaluating(amateur.model):
        for rows in rollouts.by_length(_ROWS):
            batch = rollouts.batch(rows)
            sides = [(lm, *hidden_states(lm.model, batch.to(lm.device))) for lm in (expert, amateur)]
            where = np.concatenate([np.arange(offsets[row], offsets[row + 1]) for row in rows])
            for start in range(0, len(where), _STEPS):
                part = slice(start, start + _STEPS)
                logits = [head(hidden[part])[:, :words].float().cpu() for _, hidden, head in sides]
                found = contrast(logits[0], logits[1], alpha)
                divergence[where[part]] = found[0].numpy()
                targets.append((found[1].numpy(), found[2].numpy()))
                places.append(where[part])
    width = max((tokens.shape[1] for tokens, _ in targets), default=1)
    tokens, weights = np.zeros((offsets[-1], width), np.int64), np.zeros((offsets[-1], width), np.float32)
    for place, (some, more) in zip(places, targets, strict=True):
        tokens[place, : some.shape[1]] = some
        weights[place, : more.shape[1]] = more
    return Steps(rollouts, divergence, tokens, weights, np.zeros(offsets[-1], dtype=bool))


def decode(expert: LM, amateur: LM, prompts: Sequence[np.ndarray], *, alpha: float, max_new_tokens: int) -> list[str]:
    """Contrastive decoding, greedy: at every token the target of `contrast` decides (Li et al. 2023).

    Both models are needed for every answer, and are run over the whole text for each token: a reference, not a tool.
    """
    rows = [np.asarray(prompt) for prompt in prompts]
    running = list(range(len(rows)))
    end, words = expert.tokenizer.eos_token_id, len(expert.tokenizer)
    with evaluating(expert.model), evaluating(amateur.model):
        for _ in range(max_new_tokens):
            chosen: dict[int, int] = {}
            lengths = {len(rows[row]) for row in running}
            for length in lengths:  # rows of one length need no padding
                same = [row for row in running if len(rows[row]) == length]
                ids = torch.as_tensor(np.stack([rows[row] for row in same]))
                sides = [lm.model(input_ids=ids.to(lm.device)).logits[:, -1, :words].cpu() for lm in (expert, amateur)]
                _, tokens, weights = contrast(sides[0], sides[1], alpha)
                best = tokens.gather(1, weights.argmax(1, keepdim=True)).squeeze(1)
                chosen |= dict(zip(same, best.tolist(), strict=True))
            running = [row for row in running if chosen[row] != end]
            for row in running:
                rows[row] = np.append(rows[row], chosen[row])
            if not running:
                break
    return [
        str(expert.tokenizer.decode(row[len(prompt) :], skip_special_tokens=True))
        for row, prompt in zip(rows, prompts, strict=True)
    ]
