"""What a frozen model says about a table, computed once and read back from disk: no second model stays in memory.

A row's log-probability is one number.  A whole distribution is not stored: the final hidden state is (D numbers a token
instead of V), and the head that turns it into logits is the only piece of the frozen model that stays in memory.
Shapes: N rows, L labelled tokens of the table, D hidden units.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from palimpsest.core import losses
from palimpsest.core.cache import cached
from palimpsest.data.batches import IGNORE, Batch, Encoded

_TOKENS_AT_ONCE = 16_384


def sequence_logprobs(model: nn.Module, encoded: Encoded, model_sha256: str) -> Tensor:
    """Each row's summed log-probability, (N,) float32; cached under the hash of the weights and of the table."""

    def build(folder: Path) -> None:
        values = np.zeros(len(encoded), dtype=np.float32)
        for rows, batch in _passes(model, encoded):
            values[rows] = losses.sequence_logprobs(model, batch).float().cpu().numpy()
        np.save(folder / "logprobs.npy", values)

    return cached(
        "logprobs",
        [model_sha256, encoded.sha256],
        build,
        lambda folder: torch.from_numpy(np.load(folder / "logprobs.npy")),
    )


@dataclass(frozen=True)
class Reference:
    """A frozen model's predictions for every labelled token of one table (see `losses.kl`)."""

    states: Tensor  # (L, D), memory-mapped
    offsets: np.ndarray  # (N+1,): row r's tokens are states[offsets[r]:offsets[r+1]]
    head: Callable[[Tensor], Tensor]

    def hidden(self, batch: Batch) -> Tensor:
        """(labelled tokens of the batch, D) in the order of `batch.targets`; `batch` must come from the same table."""
        pieces = [self.states[self.offsets[row] : self.offsets[row + 1]] for row in batch.rows.tolist()]
        return torch.cat(pieces).to(batch.input_ids.device)


def reference(model: nn.Module, encoded: Encoded, model_sha256: str) -> Reference:
    """The `Reference` of `model` on a table, from the cache if it was asked before."""
    counts = np.maximum(encoded.lengths - np.maximum(encoded.starts, 1), 0)
    offsets = np.concatenate([[0], np.cumsum(counts)])
    first = encoded.batch([int(np.argmax(counts))])
    with torch.no_grad():
        sample, head = losses.hidden_states(model, first.to(_device(model)))
    shape, dtype = (int(offsets[-1]), sample.shape[1]), sample.dtype

    def build(folder: Path) -> None:
        states = _map(folder, shape, dtype, new=True)
        for rows, batch in _passes(model, encoded):
            hidden = losses.hidden_states(model, batch)[0].cpu()
            sizes = (batch.targets != IGNORE).sum(1).tolist()
            for row, piece in zip(rows, hidden.split(sizes), strict=True):
                states[offsets[row] : offsets[row + 1]] = piece

    states = cached(
        "hidden",
        [model_sha256, encoded.sha256, str(dtype)],
        build,
        lambda folder: _map(folder, shape, dtype, new=False),
    )
    frozen = copy.deepcopy(head).requires_grad_(False) if isinstance(head, nn.Module) else head
    return Reference(states, offsets, frozen)


def _passes(model: nn.Module, encoded: Encoded):
    """Every row once, in evaluation mode and without autograd: (row numbers, batch on the model's device)."""
    training = model.training
    model.eval()
    order = np.argsort(-encoded.lengths, kind="stable")
    try:
        with torch.no_grad():
            start = 0
            while start < len(order):
                rows = order[start : start + max(1, _TOKENS_AT_ONCE // int(encoded.lengths[order[start]]))]
                yield rows, encoded.batch(rows).to(_device(model))
                start += len(rows)
    finally:
        model.train(training)


def _device(model: nn.Module) -> torch.device:
    return next(model.parameters()).device


def _map(folder: Path, shape: tuple[int, int], dtype: torch.dtype, *, new: bool) -> Tensor:
    path = folder / "states.bin"
    if new:
        with path.open("wb") as handle:
            handle.truncate(max(shape[0] * shape[1], 1) * dtype.itemsize)
    return torch.from_file(str(path), shared=new, size=max(shape[0] * shape[1], 1), dtype=dtype)[
        : shape[0] * shape[1]
    ].view(shape)
