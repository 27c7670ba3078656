"""Many tiny language models, each trained on its own subset of documents and scored on the same held-out ones.

What a proxy's loss says of a selection is all that is wanted of it, so proxies are GPTs of some 40,000 parameters over
a byte-level vocabulary of 512 tokens, trained all at once (`core.many`).  Knows nothing of how subsets are chosen.
Shapes: N documents, T tokens, M models, D width.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from palimpsest.core.errors import InputError
from palimpsest.core.many import predict_many, train_many
from palimpsest.models.tokenizers import train_bpe

VOCABULARY = 512
_PAD = 0


class TinyGPT(nn.Module):
    """(B, T) token ids -> (B, 2): the summed loss in nats over each row's tokens after the first, and their number."""

    def __init__(self, vocabulary: int = VOCABULARY, length: int = 64, width: int = 32, layers: int = 2):
        super().__init__()
        self.tokens = nn.Embedding(vocabulary, width)
        self.places = nn.Embedding(length, width)
        self.layers = nn.ModuleList(Block(width) for _ in range(layers))
        self.norm = nn.LayerNorm(width)
        for table in (self.tokens, self.places):
            nn.init.normal_(table.weight, std=0.05)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.tokens(ids) + self.places.weight[: ids.shape[1]]
        for layer in self.layers:
            x = layer(x)
        logits = self.norm(x)[:, :-1] @ self.tokens.weight.T
        target = ids[:, 1:]
        loss = torch.logsumexp(logits, -1) - logits.gather(-1, target[..., None]).squeeze(-1)
        real = (target != _PAD).to(loss.dtype)
        return torch.stack([(loss * real).sum(1), real.sum(1)], dim=1)


class Block(nn.Module):
    def __init__(self, width: int):
        super().__init__()
        self.before, self.after = nn.LayerNorm(width), nn.LayerNorm(width)
        self.mix, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.wide, self.narrow = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        query, key, value = self.mix(self.before(x)).chunk(3, dim=-1)
        scores = query @ key.transpose(-1, -2) / x.shape[-1] ** 0.5
        future = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool, device=x.device).triu(1)
        x = x + self.out(scores.masked_fill(future, float("-inf")).softmax(-1) @ value)
        return x + self.narrow(nn.functional.gelu(self.wide(self.after(x))))


def encode(texts: Sequence[str], others: Sequence[str], length: int) -> tuple[Tensor, Tensor]:
    """The first `length` tokens of each text, right-padded, (N, T) int64, by a tokenizer trained on `texts`."""
    tokenizer = train_bpe(texts, vocab_size=VOCABULARY, max_length=length)
    found = []
    for documents in (texts, others):
        rows = tokenizer([text or " " for text in documents], truncation=True, max_length=length)["input_ids"]
        ids = torch.full((len(rows), length), _PAD)
        for place, row in enumerate(rows):
            ids[place, : len(row)] = torch.tensor(row)
        found.append(ids)
    return found[0], found[1]


def losses(
    train: Tensor,
    held_out: Tensor,
    masks: np.ndarray,
    *,
    steps: int,
    seeds: Sequence[int],
    width: int = 32,
    lr: float = 3e-3,
    batch: int = 16,
) -> np.ndarray:
    """(M,) nats a token on `held_out` (V, T) after `steps` steps on the rows of `train` (N, T) in `masks` (M, N)."""
    if int((held_out[:, 1:] != _PAD).sum()) == 0:
        raise InputError("the validation documents hold no text")
    length = train.shape[1]

    def loss(model: Callable[..., Any], ids: Tensor) -> Tensor:
        found: Tensor = model(ids).sum(0)
        return found[0] / found[1].clamp(min=1)

    many = train_many(
        lambda: TinyGPT(length=length, width=width),
        loss,
        train,
        masks,
        steps=steps,
        lr=lr,
        batch_size=batch,
        seed=list(seeds),
        warmup=min(20, steps // 5),
        schedule="cosine",
    )
    total = predict_many(many, held_out, rows_at_once=64).double().sum(1)
    return (total[:, 0] / total[:, 1]).numpy()
