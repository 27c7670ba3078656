"""What distilling a prompt is made of: modules that write vectors, a frozen model around them, distances to a teacher.

Knows nothing of tasks, texts or training.  Shapes: B rows, R tokens that are read, T tokens of the query, m vectors,
D hidden units of the model, N tokens that count.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from palimpsest.core.losses import head_of, in_chunks
from palimpsest.core.seeds import torch_rng
from palimpsest.models.prefix import states

Match = Literal["kl", "hidden"]

_FIRST_WORD = 100  # vocabularies begin with special tokens and bytes


class Distiller(nn.Module):
    """A decoder that reads demonstrations and then m places of its own; their last states are the vectors.

    Where the model is of another width, ``tanh(A s + b)`` brings the states to it.
    """

    def __init__(self, body: Any, vectors: int, width: int, seed: int):
        super().__init__()
        self.body = body
        table = body.get_input_embeddings().weight
        self.places = nn.Parameter(first_vectors(table, vectors, seed))
        self.projection: nn.Linear | None = None
        if table.shape[1] != width:
            self.projection = nn.Linear(table.shape[1], width)
            bound = table.shape[1] ** -0.5
            for parameter in self.projection.parameters():
                nn.init.uniform_(parameter, -bound, bound, generator=torch_rng(seed, "projection", parameter.ndim))

    def forward(self, read: Tensor, mask: Tensor) -> Tensor:
        """(B, R) tokens, padded on the left, and their mask -> (B, m, D)."""
        places = self.places.expand(len(read), -1, -1)
        embedded = torch.cat([self.body.get_input_embeddings()(read).to(places.dtype), places], dim=1)
        found = states(self.body, embedded, F.pad(mask, (0, len(self.places)), value=1))[:, -len(self.places) :]
        return found if self.projection is None else torch.tanh(self.projection(found))


class StaticVectors(nn.Module):
    """m vectors that are the same whatever is read."""

    def __init__(self, vectors: Tensor):
        super().__init__()
        self.vectors = nn.Parameter(vectors)

    def forward(self, read: Tensor, mask: Tensor) -> Tensor:
        return self.vectors.expand(len(read), -1, -1)


def first_vectors(table: Tensor, vectors: int, seed: int) -> Tensor:
    """(m, width) to begin with: rows drawn from a table of embeddings, past the first hundred if there are enough."""
    first = _FIRST_WORD if len(table) >= _FIRST_WORD + vectors else 0
    rows = torch.randint(first, len(table), (vectors,), generator=torch_rng(seed, "vectors"))
    return table.detach()[rows].float().clone()


@contextmanager
def frozen(model: nn.Module) -> Iterator[None]:
    """Inside, no weight records a gradient and nothing is dropped, yet inputs may; afterwards all is as it was."""
    flags = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    modes = [(module, module.training) for module in model.modules()]
    model.requires_grad_(False).eval()
    try:
        yield
    finally:
        for parameter, flag in flags:
            parameter.requires_grad_(flag)
        for module, training in modes:
            module.training = training


def distances(
    model: nn.Module,
    student: Tensor,
    teacher: Tensor,
    counts: Tensor,
    match: Match = "kl",
    temperature: float = 1.0,
) -> Tensor:
    """(B, T): KL(teacher || student) of the next word in nats at each token that counts, 0 elsewhere.

    `student`, `teacher`: (B, T, D) as `models.prefix.hidden` gives them.  "hidden": their mean squared difference.
    """
    head = head_of(model)

    def divergence(student_ND: Tensor, teacher_ND: Tensor) -> Tensor:
        if match == "hidden":
            return (student_ND - teacher_ND).float().square().mean(-1)
        wanted, found = ((head(part).float() / temperature).log_softmax(-1) for part in (teacher_ND, student_ND))
        return F.kl_div(found, wanted, reduction="none", log_target=True).sum(-1)

    return _scattered(divergence, head, counts, student, teacher)


def negative_log_likelihoods(model: nn.Module, before: Tensor, words: Tensor, counts: Tensor) -> Tensor:
    """(B, T): in nats, of each of the `words` (B, T) that counts, given the states (B, T, D) before it; 0 elsewhere."""
    head = head_of(model)

    def nll(before_ND: Tensor, words_N: Tensor) -> Tensor:
        return F.cross_entropy(head(before_ND).float(), words_N, reduction="none")

    return _scattered(nll, head, counts, before, words)


def _scattered(values: Any, head: nn.Module, counts: Tensor, *parts: Tensor) -> Tensor:
    kept = [part[counts] for part in parts]
    found = in_chunks(values, kept, int(getattr(head, "out_features", None) or kept[0].shape[-1]))
    return torch.zeros(counts.shape, dtype=found.dtype, device=found.device).masked_scatter(counts, found)


def mean_over(values: Tensor, where: Tensor) -> Tensor:
    return values.detach()[where].sum() / where.sum().clamp(min=1)
