"""Teaching a model soft targets at a few chosen steps of its own rollouts; those of one rollout share one pass.

Shapes: N rollouts, S steps in all, n of a batch, M tokens of a target, D hidden units.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from palimpsest.core.losses import hidden_states
from palimpsest.core.seeds import numpy_rng
from palimpsest.curate.contrast import Steps
from palimpsest.data.batches import IGNORE, Batch


@dataclass(frozen=True)
class Chosen:
    """Batches of exactly `batch_size` chosen steps, those of a rollout together; a function of (seed, step)."""

    steps: Steps
    batch_size: int
    seed: int

    def __call__(self, step: int) -> Batch:
        chosen = np.flatnonzero(self.steps.chosen)
        rollout = np.searchsorted(self.steps.offsets, chosen, side="right") - 1
        epochs, inside = np.divmod(np.arange(step * self.batch_size, (step + 1) * self.batch_size), len(chosen))
        rows: list[int] = []
        taught: list[np.ndarray] = []
        for epoch in np.unique(epochs):  # a rollout that ends one epoch and begins the next comes twice
            order = numpy_rng(self.seed, "epoch", int(epoch)).permutation(len(self.steps.rollouts))
            places = np.argsort(np.argsort(order)[rollout], kind="stable")[inside[epochs == epoch]]
            for row in dict.fromkeys(rollout[places].tolist()):
                rows.append(row)
                taught.append(chosen[places[rollout[places] == row]])
        return self._batch(rows, taught)

    def _batch(self, rows: Sequence[int], taught: Sequence[np.ndarray]) -> Batch:
        """Rollouts up to their last taught token, with labels at the taught ones only."""
        rollouts, lines = self.steps.rollouts, []
        for row, steps in zip(rows, taught, strict=True):
            positions = steps - self.steps.offsets[row] + rollouts.starts[row]
            ids = rollouts.ids[row][: positions.max() + 1]
            labels = np.full(len(ids), IGNORE, dtype=np.int64)
            labels[positions] = ids[positions]
            lines.append((ids, labels))
        shape = (len(lines), max(len(ids) for ids, _ in lines))
        input_ids = np.full(shape, rollouts.pad_id, dtype=np.int64)
        labels, mask = np.full(shape, IGNORE, dtype=np.int64), np.zeros(shape, dtype=np.int64)
        for line, (ids, targets) in enumerate(lines):
            input_ids[line, : len(ids)], labels[line, : len(ids)], mask[line, : len(ids)] = ids, targets, 1
        return Batch(
            torch.from_numpy(input_ids),
            torch.from_numpy(labels),
            torch.from_numpy(mask),
            torch.tensor(rows),
            None,
            len(rows),
            self.batch_size,
        )


class Distillation:
    """KL(target || model) at the labelled steps of a batch, mean over the steps: 0 is perfect."""

    def __init__(self, steps: Steps):
        self.offsets = torch.from_numpy(steps.offsets)
        self.starts = torch.tensor(steps.rollouts.starts)
        self.tokens, self.weights = torch.from_numpy(steps.tokens), torch.from_numpy(steps.weights)

    def __call__(self, model: nn.Module, batch: Batch) -> Tensor:
        hidden_nD, head = hidden_states(model, batch)
        line, column = torch.nonzero(batch.targets.cpu() != IGNORE, as_tuple=True)
        row = batch.rows.cpu()[line]
        step = self.offsets[row] + column + 1 - self.starts[row]
        tokens_nM, weights_nM = self.tokens[step].to(hidden_nD.device), self.weights[step].to(hidden_nD.device)
        logprobs_nM = head(hidden_nD).float().log_softmax(-1).gather(1, tokens_nM)
        divergence = torch.xlogy(weights_nM, weights_nM) - weights_nM * logprobs_nM
        return divergence.sum() / batch.total_tokens
