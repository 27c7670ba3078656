"""STORM's rescaler: a tiny network that reads how a model behaves on a sample and says how much its loss should count.

What it reads are signals that training gives away for nothing or for a few more forward passes: a sample's loss and
confidence over dropout passes, whether the model believes its label, and how all this compares with the samples of the
same class that are believed, or not believed, as it is (arXiv:2412.12955).
Shapes: B samples, K passes, F signals or features.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from palimpsest.curate.samples import Outcome

Features = Literal["all", "loss"]
WIDTHS = {"all": 19, "loss": 2}

_SPREAD = 1e-8  # the least standard deviation of a group or a density
_MOST_KL = 50.0  # the divergence of two narrow normals explodes


@dataclass(frozen=True)
class Signals:
    """What K passes over a batch say of each sample; nothing carries a gradient."""

    values: Tensor  # (B, 4) float64: mean and standard deviation of the loss, and of the confidence
    agrees: Tensor  # (B,) bool, by majority


def observe(passes: Sequence[Outcome]) -> Signals:
    """The signals of several passes; a tie of beliefs is decided by the first pass."""
    losses = torch.stack([outcome.loss.detach().double() for outcome in passes])
    confidences = torch.stack([outcome.confidence.detach().double() for outcome in passes])
    believed = 2 * torch.stack([outcome.agrees for outcome in passes]).sum(0)
    agrees = torch.where(believed == len(passes), passes[0].agrees, believed > len(passes))
    parts = [losses.mean(0), _spread(losses), confidences.mean(0), _spread(confidences)]
    return Signals(torch.stack(parts, dim=1), agrees)


def _spread(values: Tensor) -> Tensor:
    return values.std(0) if len(values) > 1 else torch.zeros_like(values[0])


class Memory:
    """The signals of the last `window` batches (0: of all), and the features of a batch among them."""

    def __init__(self, window: int = 1, by_agreement: bool = True, features: Features = "all"):
        self.by_agreement, self.features = by_agreement, features
        self.kept: deque[tuple[Tensor, Tensor]] = deque(maxlen=window or None)

    def __call__(self, signals: Signals, classes: Tensor) -> Tensor:
        """Take in a batch and return its features, (B, 19) or (B, 2) float32."""
        groups = 2 * classes + (~signals.agrees if self.by_agreement else 0)
        agrees = signals.agrees[:, None].double()
        if self.features == "loss":
            return torch.cat([signals.values[:, :1], agrees], 1).float()
        own = signals.values
        mean, _ = group_statistics(*self._with(own, groups), groups)
        loss, spread, usual, usual_spread = own[:, 0], own[:, 1], mean[:, 0], mean[:, 1]
        distances = [divergence(loss, spread, usual, usual_spread), overlap(loss, spread, usual, usual_spread)]
        whole = torch.cat([own, torch.stack(distances, 1)], 1)
        self.kept.append((whole, groups))
        mean, deviation = group_statistics(*self._all(), groups)
        return torch.cat([torch.stack([whole, mean, deviation], 2).flatten(1), agrees], 1).float()

    def _with(self, values: Tensor, groups: Tensor) -> tuple[Tensor, Tensor]:
        """The base signals of the remembered batches and of a new one."""
        before = list(self.kept)
        if self.kept.maxlen is not None:
            before = before[len(before) - min(len(before), self.kept.maxlen - 1) :]
        return torch.cat([*(old[:, :4] for old, _ in before), values]), torch.cat([*(g for _, g in before), groups])

    def _all(self) -> tuple[Tensor, Tensor]:
        return torch.cat([values for values, _ in self.kept]), torch.cat([groups for _, groups in self.kept])


def group_statistics(values: Tensor, groups: Tensor, wanted: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation, (B, F) each, over the rows (R, F) whose group (R,) is that of each of `wanted` (B,).

    A group must have a row; the deviation of one alone is 1e-8.
    """
    count = int(torch.cat([groups, wanted]).max()) + 1
    sizes = torch.zeros(count, dtype=values.dtype, device=values.device).index_add_(
        0, groups, torch.ones_like(values[:, 0])
    )
    zeros = torch.zeros(count, values.shape[1], dtype=values.dtype, device=values.device)
    mean = zeros.index_add(0, groups, values) / sizes.clamp_min(1)[:, None]
    squares = zeros.index_add(0, groups, (values - mean[groups]).square())
    deviation = (squares / (sizes - 1).clamp_min(1)[:, None]).sqrt().clamp_min(_SPREAD)
    return mean[wanted], deviation[wanted]


def divergence(mean: Tensor, spread: Tensor, usual: Tensor, usual_spread: Tensor) -> Tensor:
    """KL(N(mean, spread) || N(usual, usual_spread)), at most 50; 0 where either has no spread."""
    flat = (spread <= 0) | (usual_spread <= 0)
    own, other = spread.masked_fill(flat, 1), usual_spread.masked_fill(flat, 1)
    value = (other / own).log() + (own**2 + (mean - usual) ** 2) / (2 * other**2) - 0.5
    return value.clamp(-_MOST_KL, _MOST_KL).masked_fill(flat, 0)


def overlap(mean: Tensor, spread: Tensor, usual: Tensor, usual_spread: Tensor) -> Tensor:
    """The area under both densities of N(mean, spread) and N(usual, usual_spread); spreads are at least 1e-8."""
    narrow, wide = spread.clamp_min(_SPREAD), usual_spread.clamp_min(_SPREAD)
    swap = narrow > wide
    at_narrow, at_wide = torch.where(swap, usual, mean), torch.where(swap, mean, usual)
    narrow, wide = torch.minimum(narrow, wide), torch.maximum(narrow, wide)
    distance = (at_narrow - at_wide).abs()
    equal = 2 * _below(-distance / (2 * narrow))
    # densities cross where x, measured from the wide one's mean in its spreads, solves a quadratic equation
    ratio, shift = wide / narrow, distance / wide
    bend = ratio**2 - 1
    bent = bend > 1e-9
    bend = bend.masked_fill(~bent, 1)
    root = (ratio**2 * shift**2 + bend * 2 * ratio.log()).sqrt()
    low, high = ((ratio**2 * shift - root) / bend, (ratio**2 * shift + root) / bend)
    # between the crossings the wide density is the lower one, beyond them the narrow one
    inside = _below(high) - _below(low)
    outside = _below((low - shift) * ratio) + _below((shift - high) * ratio)
    return torch.where(bent, inside + outside, equal).clamp(0, 1)


def _below(value: Tensor) -> Tensor:
    return 0.5 * torch.erfc(-value / math.sqrt(2))


class Rescaler(nn.Module):
    """Features (B, F) to weights (B,) in (0, 1): one small network for each group of samples, or one for all.

    Both layers are standardised over the group's samples in the batch.  At the output this is what keeps the mean
    weight near a half: without it the meta loss is lowest where nobody counts.  A sample alone in its group gets 0.5.
    """

    def __init__(self, width: int, groups: int = 1):
        super().__init__()
        self.first = nn.ModuleList(nn.Linear(width, width) for _ in range(groups))
        self.second = nn.ModuleList(nn.Linear(width, 2) for _ in range(groups))

    def forward(self, features: Tensor, groups: Tensor) -> Tensor:
        weights = features.new_zeros(len(features))
        for group in groups.unique().tolist():
            inside = groups == group
            hidden = standardised(self.first[group](features[inside])).relu()
            logits = standardised(self.second[group](hidden))
            weights = weights.masked_scatter(inside, logits.softmax(-1)[:, 1])
        return weights


def standardised(values: Tensor) -> Tensor:
    """Each column with mean 0 and variance 1 over the rows: batch norm without parameters, always in training mode."""
    centred = values - values.mean(0)
    return centred / (centred.square().mean(0) + 1e-5).sqrt()


class _Binary(torch.autograd.Function):
    """Weights above a threshold as 1, others as 0; the gradient passes, clipped to [-1, 1]."""

    @staticmethod
    def forward(context: object, weights: Tensor, threshold: float) -> Tensor:
        return (weights > threshold).to(weights.dtype)

    @staticmethod
    def backward(context: object, *gradients: Tensor) -> tuple[Tensor, None]:
        return gradients[0].clamp(-1, 1), None


def binary(weights: Tensor, threshold: float) -> Tensor:
    found: Tensor = _Binary.apply(weights, threshold)
    return found
