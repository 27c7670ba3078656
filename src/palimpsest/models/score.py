"""Scoring and embedding tokenised rows: batches of similar length, as many rows as a token budget allows.

A row's result does not depend on the rows it shares a batch with (up to rounding in the last digits of float32).
Shapes: B rows, T tokens, D hidden units.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor, nn

from palimpsest.core import losses
from palimpsest.core.errors import InputError
from palimpsest.data.batches import IGNORE, Encoded
from palimpsest.models.guard import Around, untouched

if TYPE_CHECKING:
    from transformers import PreTrainedModel

TOKENS = (
    2048  # tokens (padding included) of a scored batch, unless the caller says how many rows: it stays in the cache
)


def by_tokens(lengths: np.ndarray, tokens: int = TOKENS, rows: int | None = None) -> list[np.ndarray]:
    """Every row once, longest first, cut into batches of at most `tokens` tokens (or of `rows` rows, if given)."""
    if rows is not None and rows < 1:
        raise InputError(f"batch_size must be at least 1, not {rows}")
    order = np.argsort(-lengths, kind="stable")
    batches, start = [], 0
    while start < len(order):
        size = rows or max(1, tokens // max(1, int(lengths[order[start]])))
        batches.append(order[start : start + size])
        start += size
    return batches


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """No dropout, no autograd; the model's mode is given back afterwards."""
    training = model.training
    model.eval()
    try:
        with torch.inference_mode():
            yield
    finally:
        model.train(training)


def token_logprobs(
    model: nn.Module,
    encoded: Encoded,
    prompt_spans: Sequence[tuple[int, int]],
    *,
    around: Around = untouched,
    rows: int | None = None,
) -> list[np.ndarray]:
    """Log-probability (nats, float32) of each scored token of each row; an empty array for a row without any.

    `prompt_spans` are the positions (first, past the last) of each row's prompt, for the guard.
    """
    device = next(model.parameters()).device
    scored = (
        np.flatnonzero(encoded.lengths > np.maximum(encoded.starts, 1)) if len(encoded) else np.array([], dtype=int)
    )
    results = [np.empty(0, dtype=np.float32)] * len(encoded)
    with evaluating(model):
        if around is not untouched and len(scored):  # what losses learns about the model, it must learn unguarded
            losses.token_logprobs(model, encoded.batch(scored[:1]).to(device))
        for places in by_tokens(encoded.lengths[scored], rows=rows):
            batch = encoded.batch(scored[places])
            prompt = prompt_mask(batch.input_ids.shape, [prompt_spans[row] for row in scored[places]])
            with around(scored[places], prompt.to(device)):
                values = losses.token_logprobs(model, batch.to(device)).cpu()
            labelled = batch.targets != IGNORE
            for row, line, picked in zip(scored[places], values, labelled, strict=True):
                results[row] = line[picked].numpy().astype(np.float32)
    return results


def mean_hidden(model: PreTrainedModel, encoded: Encoded, spans: Sequence[tuple[int, int]], layer: int) -> np.ndarray:
    """(N, D) float32: the hidden states of `layer` (as transformers counts them), averaged over each row's span."""
    device = next(model.parameters()).device
    width = model.config.get_text_config().hidden_size
    results: list[np.ndarray] = [np.empty(width)] * len(encoded)
    with evaluating(model):
        for places in by_tokens(encoded.lengths):
            batch = encoded.batch(places).to(device)
            outputs = model(
                input_ids=batch.input_ids,
                attention_mask=batch.attention_mask,
                use_cache=False,
                output_hidden_states=True,
            )
            states = outputs.hidden_states
            if not -len(states) <= layer < len(states):
                raise InputError(f"layer {layer} of a model with hidden states 0 to {len(states) - 1}")
            for row, state_TD in zip(places, states[layer], strict=True):
                first, last = spans[row]
                results[row] = state_TD[first:last].float().mean(0).cpu().numpy()
    return np.stack(results) if results else np.empty((0, width), dtype=np.float32)


def prompt_mask(shape: Sequence[int], spans: Sequence[tuple[int, int]]) -> Tensor:
    """(B, T) bool: True inside each row's span."""
    places = torch.arange(shape[1])
    first, last = torch.tensor(spans, dtype=torch.int64).T
    return (places >= first[:, None]) & (places < last[:, None])
