"""Labelled samples as training under label noise sees them: of each, a loss, a confidence, and whether it is believed.

Three kinds behind one interface: vectors with classes, texts with classes for any sequence classifier of
`transformers`, and prompts with answers for any causal language model (one answer is one sample).
Knows nothing of how samples are weighed.  Shapes: N samples, B of them, C classes, T tokens, V words.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import torch
from torch import Tensor

from palimpsest.core.errors import InputError
from palimpsest.core.losses import inputs_of
from palimpsest.core.seeds import numpy_rng
from palimpsest.data.batches import IGNORE, Encoded

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class Outcome:
    """What a model makes of a batch."""

    loss: Tensor  # (B,) nats, with gradient
    confidence: Tensor  # (B,) probability of the likeliest class
    agrees: Tensor  # (B,) bool: the likeliest class is the label


class Samples(Protocol):
    """N samples that a model can be trained on."""

    @property
    def labels(self) -> Tensor:
        """(N,) int64 classes from 0; all 0 where there are none."""
        ...

    @property
    def classes(self) -> int: ...

    def __len__(self) -> int: ...

    def batch(self, rows: np.ndarray) -> Any:
        """The given samples as a tree of tensors (see data/batches.py)."""
        ...

    def outcome(self, model: Any, batch: Any) -> Outcome: ...


@dataclass(frozen=True)
class Vectors:
    """Samples whose inputs are rows of one tensor; the model maps them to logits."""

    inputs: Tensor  # (N, ...)
    labels: Tensor  # (N,) int64
    classes: int
    smoothing: float = 0.0  # of labels, in the loss only

    def __post_init__(self) -> None:
        check_labels(self.labels, self.classes, len(self.inputs))

    def __len__(self) -> int:
        return len(self.labels)

    def batch(self, rows: np.ndarray) -> dict[str, Tensor]:
        picked = torch.as_tensor(rows)
        return {"inputs": self.inputs[picked], "labels": self.labels[picked]}

    def outcome(self, model: Any, batch: dict[str, Tensor]) -> Outcome:
        return classified(model(batch["inputs"]), batch["labels"], self.smoothing)

    def select(self, rows: np.ndarray) -> Vectors:
        picked = torch.as_tensor(rows)
        return replace(self, inputs=self.inputs[picked], labels=self.labels[picked])


@dataclass(frozen=True)
class Texts:
    """Texts with classes, tokenised, for a sequence classifier of `transformers`."""

    tokens: tuple[list[int], ...]  # N
    labels: Tensor  # (N,) int64
    classes: int
    pad_id: int
    smoothing: float = 0.0

    def __post_init__(self) -> None:
        check_labels(self.labels, self.classes, len(self.tokens))

    @staticmethod
    def read(
        texts: Sequence[str],
        labels: Tensor,
        classes: int,
        tokenizer: PreTrainedTokenizerBase,
        *,
        max_length: int = 128,
    ) -> Texts:
        found = tokenizer(list(texts), truncation=True, max_length=max_length, padding=False)["input_ids"]
        return Texts(tuple(found), labels, classes, int(tokenizer.pad_token_id or 0))

    def __len__(self) -> int:
        return len(self.tokens)

    def batch(self, rows: np.ndarray) -> dict[str, Tensor]:
        picked = [self.tokens[row] for row in rows]
        width = max(map(len, picked))
        ids = torch.tensor([line + [self.pad_id] * (width - len(line)) for line in picked])
        mask = torch.tensor([[1] * len(line) + [0] * (width - len(line)) for line in picked])
        return {"input_ids": ids, "attention_mask": mask, "labels": self.labels[torch.as_tensor(rows)]}

    def outcome(self, model: Any, batch: dict[str, Tensor]) -> Outcome:
        inputs = {name: value for name, value in batch.items() if name != "labels"}
        return classified(model(**inputs).logits, batch["labels"], self.smoothing)

    def select(self, rows: np.ndarray) -> Texts:
        return replace(self, tokens=tuple(self.tokens[row] for row in rows), labels=self.labels[torch.as_tensor(rows)])


@dataclass(frozen=True)
class Answers:
    """Prompts with answers for a causal language model: a sample's loss is its answer's mean nats a token.

    It agrees when the answer's first token is the likeliest; its confidence is the mean over the answer's tokens.
    """

    encoded: Encoded
    smoothing: float = 0.0

    @property
    def labels(self) -> Tensor:
        return torch.zeros(len(self.encoded), dtype=torch.int64)

    @property
    def classes(self) -> int:
        return 1

    def __len__(self) -> int:
        return len(self.encoded)

    def batch(self, rows: np.ndarray) -> dict[str, Any]:
        return {"answers": self.encoded.batch(rows)}

    def outcome(self, model: Any, batch: dict[str, Any]) -> Outcome:
        tokens = batch["answers"]
        labelled = tokens.targets != IGNORE  # (B, T-1)
        counts = labelled.sum(1).clamp_min(1)
        logprobs_BTV = model(**inputs_of(tokens)).logits[:, :-1].float().log_softmax(-1)
        targets = tokens.targets.clamp_min(0)
        loss = -logprobs_BTV.gather(-1, targets[..., None]).squeeze(-1)
        loss = (1 - self.smoothing) * loss - self.smoothing * logprobs_BTV.mean(-1)
        likeliest = logprobs_BTV.detach().max(-1)
        first = labelled.int().argmax(1, keepdim=True)
        agrees = (likeliest.indices == targets).gather(1, first).squeeze(1)
        return Outcome((loss * labelled).sum(1) / counts, (likeliest.values.exp() * labelled).sum(1) / counts, agrees)


def classified(logits: Tensor, labels: Tensor, smoothing: float = 0.0) -> Outcome:
    """`Outcome` of logits (B, C)."""
    logprobs = logits.float().log_softmax(-1) if logits.dtype != torch.float64 else logits.log_softmax(-1)
    loss = -logprobs.gather(1, labels[:, None]).squeeze(1)
    likeliest = logprobs.detach().max(1)
    loss = (1 - smoothing) * loss - smoothing * logprobs.mean(1)
    return Outcome(loss, likeliest.values.exp(), likeliest.indices == labels)


def check_labels(labels: Tensor, classes: int, inputs: int) -> None:
    """`InputError` for labels that are not classes from 0 on, one an input."""
    if classes < 2:
        raise InputError(f"found {classes} class among the labels; wanted at least 2")
    if labels.shape != (inputs,):
        raise InputError(f"labels of shape {tuple(labels.shape)} for {inputs} samples; wanted one a sample")
    if labels.is_floating_point() or labels.dtype == torch.bool:
        raise InputError(f"labels are {labels.dtype}; wanted integers from 0 to {classes - 1}")
    outside = labels[(labels < 0) | (labels >= classes)]
    if len(outside):
        raise InputError(f"found the label {int(outside[0])}; wanted integers from 0 to {classes - 1}")


@dataclass(frozen=True)
class Draws:
    """Which samples a step trains on: every one once an epoch, shuffled; a pure function of (seed, step)."""

    samples: int
    batch_size: int
    seed: int

    def rows(self, step: int) -> np.ndarray:
        """(B,) samples of a step; an epoch's incomplete last batch is filled from the next epoch's order."""
        places = np.arange(step * self.batch_size, (step + 1) * self.batch_size)
        epochs, inside = np.divmod(places, self.samples)
        rows = np.empty(len(places), dtype=np.int64)
        for epoch in np.unique(epochs):
            order = numpy_rng(self.seed, "epoch", int(epoch)).permutation(self.samples)
            rows[epochs == epoch] = order[inside[epochs == epoch]]
        return rows

    def beside(self, step: int) -> np.ndarray:
        """(B,) other samples, drawn independently of the step's own."""
        return numpy_rng(self.seed, "beside", step).choice(self.samples, self.batch_size, replace=False)

    def steps(self, epochs: float) -> int:
        return max(1, -(-round(epochs * self.samples) // self.batch_size))
