"""What a frozen model says about a table, computed once and read back from disk: no second model runs beside the first.

A row's log-probability is one number.  A whole distribution is not stored: the final hidden state is (D numbers a token
instead of V), and the head that turns it into logits is the frozen model's own.
Shapes: N rows, L tokens of the table (labelled ones, or all), D hidden units.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from palimpsest.core import losses
from palimpsest.core.cache import cached
from palimpsest.data.batches import Batch, Encoded

_TOKENS_AT_ONCE = 4096


def sequence_logprobs(model: nn.Module, encoded: Encoded, model_sha256: str) -> Tensor:
    """Each row's summed log-probability, (N,) float32; cached under the hash of the weights and of the table."""

    def build(folder: Path) -> None:
        values = np.zeros(len(encoded), dtype=np.float32)
        with losses.evaluating(model):
            for rows, batch in passes(model, encoded):
                values[rows] = losses.sequence_logprobs(model, batch).float().cpu().numpy()
        np.save(folder / "logprobs.npy", values)

    return cached(
        "logprobs",
        [model_sha256, encoded.sha256],
        build,
        lambda folder: torch.from_numpy(np.load(folder / "logprobs.npy")),
    )


@dataclass(frozen=True)
class TokenStates:
    """D numbers for each token of a table, on disk."""

    values: Tensor  # (L, D), memory-mapped
    offsets: np.ndarray  # (N+1,): row r's tokens are values[offsets[r]:offsets[r+1]]

    def of(self, batch: Batch) -> Tensor:
        """(tokens of the batch, D), row by row, on the batch's device; `batch` must come from the same table."""
        pieces = [self.values[self.offsets[row] : self.offsets[row + 1]] for row in batch.rows.tolist()]
        return torch.cat(pieces).to(batch.input_ids.device)


def token_states(
    kind: str,
    key: list[Any],
    model: nn.Module,
    encoded: Encoded,
    counts: np.ndarray,
    compute: Callable[[Batch], Tensor],
) -> TokenStates:
    """What ``compute(batch)`` gives for every row, cached as entry `key` of `kind`.

    `counts` (N,) are the tokens of each row that `compute` returns, (their sum over the batch, D), row by row.
    """
    offsets = np.concatenate([[0], np.cumsum(counts)])

    def build(folder: Path) -> None:
        values: Tensor | None = None
        with losses.evaluating(model):
            for rows, batch in passes(model, encoded):
                states = compute(batch).cpu()
                if values is None:
                    values = _create(folder, int(offsets[-1]), states.shape[1], states.dtype)
                for row, piece in zip(rows, states.split(counts[rows].tolist()), strict=True):
                    values[offsets[row] : offsets[row + 1]] = piece

    return TokenStates(cached(kind, key, build, _open), offsets)


@dataclass(frozen=True)
class Reference:
    """A frozen model's predictions for every labelled token of one table (see `losses.kl`)."""

    states: TokenStates
    head: losses.Head

    def hidden(self, batch: Batch) -> Tensor:
        """(labelled tokens of the batch, D) in the order of `batch.targets`."""
        return self.states.of(batch)


def reference(model: nn.Module, encoded: Encoded, model_sha256: str) -> Reference:
    """The `Reference` of `model` on a table, from the cache if it was asked before.

    The head is not copied: `model` must not be trained while the reference is in use.
    """
    counts = np.maximum(encoded.lengths - np.maximum(encoded.starts, 1), 0)
    states = token_states(
        "hidden", [model_sha256, encoded.sha256], model, encoded, counts, lambda b: losses.hidden_states(model, b)[0]
    )
    return Reference(states, _anywhere(losses.head_of(model)))


def passes(model: nn.Module, encoded: Encoded) -> Iterator[tuple[np.ndarray, Batch]]:
    """Every row once, longest first: (row numbers, batch on the model's device).  Use under `losses.evaluating`."""
    device = next(model.parameters()).device
    order = np.argsort(-encoded.lengths, kind="stable")
    start = 0
    while start < len(order):
        rows = order[start : start + max(1, _TOKENS_AT_ONCE // int(encoded.lengths[order[start]]))]
        yield rows, encoded.batch(rows).to(device)
        start += len(rows)


def _anywhere(head: nn.Module) -> losses.Head:
    """`head` for states on any device; for another than its own it is copied, once."""
    parameter = next(head.parameters(), None)
    if parameter is None:
        return head
    copies = {parameter.device: head}

    def call(states: Tensor) -> Tensor:
        if states.device not in copies:
            copies[states.device] = copy.deepcopy(head).to(states.device)
        return copies[states.device](states)

    return call


def _create(folder: Path, tokens: int, width: int, dtype: torch.dtype) -> Tensor:
    size = max(tokens * width, 1)  # an empty file cannot be mapped
    with (folder / "states.bin").open("wb") as handle:
        handle.truncate(size * dtype.itemsize)
    shape = {"tokens": tokens, "width": width, "dtype": str(dtype).removeprefix("torch.")}
    (folder / "states.json").write_text(json.dumps(shape), encoding="utf-8")
    return _map(folder, shared=True)


def _open(folder: Path) -> Tensor:
    return _map(folder, shared=False)


def _map(folder: Path, *, shared: bool) -> Tensor:
    shape = json.loads((folder / "states.json").read_text(encoding="utf-8"))
    tokens, width = shape["tokens"], shape["width"]
    size = max(tokens * width, 1)
    values = torch.from_file(str(folder / "states.bin"), shared=shared, size=size, dtype=getattr(torch, shape["dtype"]))
    return values[: tokens * width].view(tokens, width)
