"""Low-rank factors (LoRA) beside frozen weights: added by hooks only while they are wanted, and row by row as strongly.

Nothing is merged and no weight is touched, so one batch may hold rows that see the factors whole, in part, or not at
all.  Knows nothing of how the factors are trained.  Shapes: B rows, T positions, R rank.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from palimpsest.core.errors import InputError
from palimpsest.core.seeds import torch_rng
from palimpsest.models.anatomy import hooked, layers, value_vectors


def layer_matrices(model: nn.Module) -> dict[str, nn.Module]:
    """The matrices in a decoder's layers by name: not those of experts, which see parts of a batch, nor a router's."""
    wanted = {id(matrix) for layer in layers(model) for matrix in _matrices(layer)}
    return {name: module for name, module in model.named_modules() if id(module) in wanted}


def _matrices(module: nn.Module) -> Iterator[nn.Module]:
    from transformers.pytorch_utils import Conv1D

    for child in module.children():
        if isinstance(child, nn.Linear | Conv1D):
            yield child
        elif not isinstance(child, nn.ModuleList):
            yield from _matrices(child)


Factors = Mapping[str, Tensor]  # by the matrices' names: ".down" (A, R x inputs) and ".up" (B, outputs x R)


class LowRank(nn.Module):
    """Adds (alpha / R) B A x to what some matrices of a model make of x; nothing while every B is zero."""

    def __init__(self, down: Mapping[str, Tensor], up: Mapping[str, Tensor], *, alpha: float, dropout: float = 0.0):
        """`down` (A, R x inputs) and `up` (B, outputs x R) by the matrices' names; `dropout` acts while training."""
        super().__init__()
        self.names = tuple(sorted(down))  # so that a loaded one is trained on in the same order
        self.down = nn.ParameterList(down[name].clone() for name in self.names)
        self.up = nn.ParameterList(up[name].clone() for name in self.names)
        self.alpha, self.dropout = alpha, dropout
        self.scale = alpha / len(self.down[0])

    @staticmethod
    def fresh(
        matrices: Mapping[str, nn.Module], *, rank: int, alpha: float, dropout: float = 0.0, seed: int = 0
    ) -> LowRank:
        """A uniform in +-1 / sqrt(inputs), as LoRA draws it, and B zero."""
        down, up = {}, {}
        for name, matrix in matrices.items():
            inputs, outputs = value_vectors(matrix).shape
            draws = torch.rand(rank, inputs, generator=torch_rng(seed, "low rank", name))
            down[name], up[name] = (2 * draws - 1) / inputs**0.5, torch.zeros(outputs, rank)
        return LowRank(down, up, alpha=alpha, dropout=dropout)

    def attached(self, model: nn.Module, strength: Tensor | None = None) -> AbstractContextManager[None]:
        """Inside, the factors act in `model`: in each row times its `strength`, or everywhere in full.

        `strength`: (B,), or (B, R) where each of the R directions has its own.

        `InputError` if the model lacks one of the matrices or has it in another size.
        """
        pairs = []
        for name, down, up in zip(self.names, self.down, self.up, strict=True):
            try:
                matrix = model.get_submodule(name)
            except AttributeError:
                raise InputError(f"these low-rank factors are of another model: this one has no {name}") from None
            if tuple(value_vectors(matrix).shape) != (down.shape[1], up.shape[0]):
                raise InputError(f"these low-rank factors are of another model: {name} differs in size")
            pairs.append((matrix, self._hook(down, up, strength)))
        return hooked(*pairs)

    def _hook(self, down: Tensor, up: Tensor, strength: Tensor | None) -> Any:
        def add(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
            seen = F.dropout(inputs[0], self.dropout, self.training).to(down.dtype)
            directions = F.linear(seen, down) * self.scale
            if strength is not None:
                times = len(seen) // len(strength)  # some blocks lay all positions of all rows in one line
                rows = strength.to(directions).reshape(len(strength), -1)
                rows = rows.repeat_interleave(times, 0) if times > 1 else rows
                directions = directions * rows.reshape(len(rows), *(1,) * (seen.ndim - 2), -1)
            return output + F.linear(directions, up).to(output.dtype)

        return add

    def tensors(self) -> dict[str, Tensor]:
        """The factors by name, for saving; `of` makes the same again."""
        parts = (("down", self.down), ("up", self.up))
        return {f"{name}.{part}": p.detach() for part, kept in parts for name, p in zip(self.names, kept, strict=True)}

    @staticmethod
    def of(tensors: Factors, *, alpha: float, dropout: float = 0.0) -> LowRank:
        names = [name.removesuffix(".down") for name in tensors if name.endswith(".down")]
        down, up = ({name: tensors[f"{name}.{part}"] for name in names} for part in ("down", "up"))
        return LowRank(down, up, alpha=alpha, dropout=dropout)


def side_by_side(several: Sequence[Factors], *, alpha: float) -> tuple[LowRank | None, Tensor]:
    """One adapter whose directions are those of F others, and (F, R) what of it is whose: rows of `strength`.

    Those without factors get nothing of it; None if all are so.
    """
    ranks = [next((len(value) for name, value in one.items() if name.endswith(".down")), 0) for one in several]
    if not any(ranks):
        return None, torch.zeros(len(several), 0)
    whose = torch.repeat_interleave(torch.arange(len(several)), torch.tensor(ranks))
    shares = (whose == torch.arange(len(several))[:, None]).float()
    present = [(one, alpha / rank) for one, rank in zip(several, ranks, strict=True) if rank]
    names = [name.removesuffix(".down") for name in present[0][0] if name.endswith(".down")]
    down = {name: torch.cat([one[f"{name}.down"] for one, _ in present]) for name in names}
    up = {name: torch.cat([scale * one[f"{name}.up"] for one, scale in present], dim=1) for name in names}
    return LowRank(down, up, alpha=float(sum(ranks))), shares


def overlap(low_rank: LowRank, earlier: Sequence[Mapping[str, Tensor]]) -> Tensor:
    """sum over matrices and snapshots s of ||A_s A^T||_F^2: how far the rows of A lie in what earlier ones span.

    `earlier`: each snapshot's A (R x inputs) by the matrices' names; no gradient reaches them.
    """
    total = low_rank.down[0].new_zeros(())
    for snapshot in earlier:
        for name, now in zip(low_rank.names, low_rank.down, strict=True):
            total = total + (snapshot[name].detach().to(now) @ now.T).square().sum()
    return total
