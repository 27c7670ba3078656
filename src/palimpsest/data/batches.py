"""Tokenised rows and the batches cut from them.  A batch is a pure function of (seed, step): a resume replays nothing.

Losses divide by the totals of the whole step (`Batch.total_rows`, `Batch.total_tokens`), never by those of the share
they see: so the shares of several processes, or of several micro-batches, add up to the very same loss.
Knows nothing of models.  Shapes: B rows, T tokens, N rows of the table.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor

from palimpsest.core.errors import InputError
from palimpsest.core.files import sha256_of
from palimpsest.core.seeds import numpy_rng

IGNORE = -100  # the label of a token that no loss may see
_BUCKET = 32  # at most so many batches have their rows sorted by length together
_JITTER = 1.25  # lengths are drawn up to so much longer before they are sorted


@dataclass(frozen=True)
class Batch:
    """Right-padded token rows; `labels` is aligned with `input_ids` (losses shift), `IGNORE` where no loss is due."""

    input_ids: Tensor  # (B, T) int64
    labels: Tensor  # (B, T) int64
    attention_mask: Tensor | None  # (B, T) int64; None when packed
    rows: Tensor  # (B,) int64, the rows' numbers in their table (first row of a pack)
    position_ids: Tensor | None  # (B, T) int64, restarted at each document of a pack; None when not packed
    total_rows: int  # of the step, over all shares
    total_tokens: int  # labelled tokens of the step, over all shares

    def __len__(self) -> int:
        return len(self.input_ids)

    @property
    def targets(self) -> Tensor:
        """(B, T-1): the label that the prediction at each position is scored with."""
        return self.labels[:, 1:]

    def to(self, device: torch.device | str) -> Batch:
        tensors: dict[str, Any] = {
            name: value.to(device) for name, value in vars(self).items() if isinstance(value, Tensor)
        }
        return replace(self, **tensors)

    def share(self, index: int, shares: int) -> Batch:
        """Every `shares`-th row starting at `index`, without padding columns that only the other rows needed."""
        if len(self) < shares:
            raise InputError(f"a batch of {len(self)} rows cannot be shared among {shares}: use a larger batch_size")
        pick = slice(index, None, shares)
        width = self.input_ids.shape[1]
        if self.attention_mask is not None:
            width = int(self.attention_mask[pick].sum(1).max())

        def cut(value: Tensor | None) -> Tensor | None:
            return None if value is None else value[pick, :width]

        return replace(
            self,
            input_ids=self.input_ids[pick, :width],
            labels=self.labels[pick, :width],
            attention_mask=cut(self.attention_mask),
            position_ids=cut(self.position_ids),
            rows=self.rows[pick],
        )


@dataclass(frozen=True)
class Encoded:
    """A tokenised table: each row's tokens and where its scored part starts."""

    ids: tuple[np.ndarray, ...]  # N arrays of int64, with special tokens
    starts: tuple[int, ...]  # the first scored token of each row: the length of its prompt in tokens (at least 1)
    pad_id: int

    def __len__(self) -> int:
        return len(self.ids)

    @cached_property
    def lengths(self) -> np.ndarray:
        """(N,) tokens of each row."""
        return np.array([len(row) for row in self.ids], dtype=np.int64)

    @cached_property
    def sha256(self) -> str:
        return sha256_of([[row.tolist() for row in self.ids], list(self.starts)])

    def select(self, rows: Sequence[int] | np.ndarray) -> Encoded:
        return Encoded(tuple(self.ids[r] for r in rows), tuple(self.starts[r] for r in rows), self.pad_id)

    def batch(self, rows: Sequence[int] | np.ndarray) -> Batch:
        """The given rows as one right-padded batch."""
        picked = [self.ids[r] for r in rows]
        shape = (len(picked), max(len(row) for row in picked))
        input_ids = np.full(shape, self.pad_id, dtype=np.int64)
        labels = np.full(shape, IGNORE, dtype=np.int64)
        mask = np.zeros(shape, dtype=np.int64)
        for line, (row, ids) in enumerate(zip(rows, picked, strict=True)):
            start = max(self.starts[row], 1)  # the first token has no prediction
            input_ids[line, : len(ids)] = ids
            labels[line, start : len(ids)] = ids[start:]
            mask[line, : len(ids)] = 1
        tokens = int((labels != IGNORE).sum())
        return Batch(
            torch.from_numpy(input_ids),
            torch.from_numpy(labels),
            torch.from_numpy(mask),
            torch.as_tensor(np.asarray(rows), dtype=torch.int64),
            None,
            len(picked),
            tokens,
        )

    def by_length(self, batch_size: int) -> list[np.ndarray]:
        """Every row once, sorted by length and cut into batches: the order for evaluation."""
        order = np.argsort(-self.lengths, kind="stable")
        return [order[i : i + batch_size] for i in range(0, len(order), batch_size)]


@dataclass(frozen=True)
class Batches:
    """Shuffled batches of equal size, rows of similar length together; ``batches(step)`` is a function of (seed, step).

    Every row comes once an epoch; an epoch's incomplete last batch is filled from the next epoch's order.
    Rows are sorted by length inside windows of at most 32 batches and one epoch, by lengths varied at random by up to a
    quarter: who meets whom changes from epoch to epoch, but rows of very different length (short questions, long
    documents) seldom meet.
    """

    encoded: Encoded
    batch_size: int
    seed: int = 0

    def __post_init__(self) -> None:
        _check(self.encoded, self.batch_size)

    @property
    def steps_per_epoch(self) -> int:
        return -(-len(self.encoded) // self.batch_size)

    def rows(self, step: int) -> np.ndarray:
        """The rows of a step, (batch_size,)."""
        window, place = divmod(step, self._window_steps)
        return self._window(window)[place]

    def __call__(self, step: int) -> Batch:
        return self.encoded.batch(self.rows(step))

    @property
    def _window_steps(self) -> int:
        """Never more than an epoch has: sorted together, the copies of a row from several epochs would meet."""
        return min(_BUCKET, max(1, len(self.encoded) // self.batch_size))

    def _window(self, window: int) -> np.ndarray:
        """(_window_steps, batch_size): the rows of a window's steps."""
        size = self._window_steps * self.batch_size
        places = np.arange(window * size, (window + 1) * size)
        rng = numpy_rng(self.seed, "window", window)
        pieces = []
        for turn, epoch in enumerate(np.unique(places // len(self.encoded))):
            rows = self._epoch(int(epoch))[places[places // len(self.encoded) == epoch] % len(self.encoded)]
            order = np.argsort(self.encoded.lengths[rows] * rng.uniform(1, _JITTER, len(rows)), kind="stable")
            # each epoch's part is sorted by itself, up and down in turn: only one batch mixes two epochs
            pieces.append(rows[order[:: 1 if turn % 2 == 0 else -1]])
        return rng.permutation(np.concatenate(pieces).reshape(self._window_steps, self.batch_size))

    def _epoch(self, epoch: int) -> np.ndarray:
        return numpy_rng(self.seed, "epoch", epoch).permutation(len(self.encoded))


@dataclass(frozen=True)
class Packed:
    """Blocks of exactly `length` tokens, filled with whole shuffled documents; a document goes on in the next block.

    Positions restart at each document and no attention mask is given: models then keep documents apart by themselves.
    """

    encoded: Encoded
    batch_size: int
    length: int
    seed: int = 0

    def __post_init__(self) -> None:
        _check(self.encoded, self.batch_size)
        if self.length < 2:
            raise InputError(f"length must be at least 2, not {self.length}: the first token has no prediction")

    @property
    def steps_per_epoch(self) -> int:
        return max(1, int(self.encoded.lengths.sum()) // (self.batch_size * self.length))

    def __call__(self, step: int) -> Batch:
        epoch, place = divmod(step, self.steps_per_epoch)
        order = numpy_rng(self.seed, "epoch", epoch).permutation(len(self.encoded))
        ends = np.cumsum(self.encoded.lengths[order])
        size = (self.batch_size, self.length)
        first = place * self.batch_size * self.length
        ids, labels, positions = (np.empty(size, dtype=np.int64) for _ in range(3))
        rows = np.empty(self.batch_size, dtype=np.int64)
        for line in range(self.batch_size):
            rows[line] = self._fill(ids[line], labels[line], positions[line], order, ends, first + line * self.length)
        return Batch(
            torch.from_numpy(ids),
            torch.from_numpy(labels),
            None,
            torch.from_numpy(rows),
            torch.from_numpy(positions),
            self.batch_size,
            int((labels[:, 1:] != IGNORE).sum()),
        )

    def _fill(
        self,
        ids: np.ndarray,
        labels: np.ndarray,
        positions: np.ndarray,
        order: np.ndarray,
        ends: np.ndarray,
        start: int,
    ) -> int:
        """Fill one block from token `start` of the epoch's stream; return its first row."""
        total = int(ends[-1])
        filled = 0
        first_row = -1
        while filled < self.length:
            token = (start + filled) % total
            document = int(np.searchsorted(ends, token, side="right"))
            row = int(order[document])
            offset = token - (int(ends[document]) - int(self.encoded.lengths[row]))
            piece = self.encoded.ids[row][offset : offset + self.length - filled]
            span = slice(filled, filled + len(piece))
            ids[span] = piece
            labels[span] = piece
            prompt = max(self.encoded.starts[row], 1) - offset  # a piece's first token has no prediction in this block
            labels[filled : filled + min(max(prompt, 1), len(piece))] = IGNORE
            positions[span] = np.arange(len(piece))
            first_row = row if first_row < 0 else first_row
            filled += len(piece)
        return first_row


@dataclass(frozen=True)
class Together:
    """Several sources read side by side: ``Together(forget=..., retain=...)(step)`` is a dict of their batches."""

    sources: dict[str, Callable[[int], Any]]

    def __init__(self, **sources: Callable[[int], Any] | None):
        object.__setattr__(self, "sources", {name: source for name, source in sources.items() if source is not None})

    def __call__(self, step: int) -> dict[str, Any]:
        return {name: source(step) for name, source in self.sources.items()}


def _check(encoded: Encoded, batch_size: int) -> None:
    if len(encoded) == 0:
        raise InputError("no rows to make batches from")
    if batch_size < 1:
        raise InputError(f"batch_size must be at least 1, not {batch_size}")
    if (encoded.lengths <= np.maximum(encoded.starts, 1)).all():
        raise InputError("every label is masked: no row has a token to learn after its prompt (cut off by max_length?)")


Tree = TypeVar("Tree")


def share(tree: Tree, index: int, shares: int) -> Tree:
    """The `index`-th of `shares` shares of a batch: `Batch`, tensor (rows first), or dict, list, tuple of them."""
    found: Any = tree
    if shares == 1:
        return tree
    if isinstance(found, Batch):
        found = found.share(index, shares)
    elif isinstance(found, Tensor):
        found = found[index::shares]
    elif isinstance(found, dict):
        found = {name: share(value, index, shares) for name, value in found.items()}
    elif isinstance(found, list | tuple):
        found = type(found)(share(value, index, shares) for value in found)
    return found


def to_device(tree: Tree, device: torch.device | str) -> Tree:
    """The same batch on another device."""
    found: Any = tree
    if isinstance(found, Batch | Tensor):
        found = found.to(device)
    elif isinstance(found, dict):
        found = {name: to_device(value, device) for name, value in found.items()}
    elif isinstance(found, list | tuple):
        found = type(found)(to_device(value, device) for value in found)
    return found


def count_tokens(tree: Any) -> int:
    """Tokens (padding excluded) of a batch, for the speed shown to people; rows where there are no tokens."""
    if isinstance(tree, Batch):
        return int(tree.input_ids.numel() if tree.attention_mask is None else tree.attention_mask.sum())
    if isinstance(tree, Tensor):
        return len(tree)
    if isinstance(tree, dict):
        return sum(count_tokens(value) for value in tree.values())
    if isinstance(tree, list | tuple):
        return max((count_tokens(value) for value in tree), default=0)
    return 0
