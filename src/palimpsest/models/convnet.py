"""The small networks of few-shot learning: the four-block ConvNet for images, a square map for given features.

ConvNet-4 is the backbone of Vinyals et al. 2016 and Snell et al. 2017: 3x3 convolution, normalisation, ReLU, pooling
by 2, four times, 64 channels; 28x28 grey images give 64 numbers, 84x84 colour images 1600.
Knows nothing of episodes.  Shapes: B inputs, D dimensions; images (B, channels, height, width).
"""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from palimpsest.core.errors import InputError, unknown
from palimpsest.core.precision import PRECISIONS, has_fast_bf16

NORMS = ("batch", "group")
SPREAD = (
    20.0  # mean squared distance between two given features after scaling: a softmax over distances can learn there
)


class ConvNet(nn.Module):
    """Images, uint8 or float, to (B, `dimensions`).

    `norm`: "batch" is the papers'; its running statistics make an answer in eval mode independent of the other inputs.
    "group" keeps no statistics, so the network can be stacked (`torch.func`) and adapted step by step.
    Images smaller than 16 pixels skip the last poolings.
    """

    mean: Tensor
    deviation: Tensor

    def __init__(self, shape: tuple[int, int, int], *, width: int = 64, blocks: int = 4, norm: str = "batch"):
        super().__init__()
        if norm not in NORMS:
            raise unknown("norm", norm, NORMS)
        channels, height, wide = shape
        self.pooled: list[bool] = []
        layers: list[nn.Module] = []
        for block in range(blocks):
            layers.append(nn.Conv2d(channels if block == 0 else width, width, 3, padding=1, bias=norm == "group"))
            layers.append(nn.BatchNorm2d(width) if norm == "batch" else nn.GroupNorm(max(1, width // 8), width))
            self.pooled.append(min(height, wide) >= 2)
            if self.pooled[-1]:
                height, wide = height // 2, wide // 2
        self.layers = nn.ModuleList(layers)
        self.dimensions = width * height * wide
        self.register_buffer("mean", torch.zeros(channels, 1, 1))
        self.register_buffer("deviation", torch.ones(channels, 1, 1))
        self.channels_last = norm == "batch"  # `torch.func.vmap` knows the other layout only
        self.bf16 = False  # train in bf16 (weights stay fp32); answers are always fp32
        if self.channels_last:
            for weight in self.parameters():
                if weight.ndim == 4:
                    weight.data = weight.data.contiguous(memory_format=torch.channels_last)

    def standardise_by(self, x: Any) -> None:
        """Take the mean and deviation of each channel from these images (at most 2000, evenly spread)."""
        some = _floats(torch.as_tensor(x[:: max(1, len(x) // 2000)]))
        self.mean.copy_(some.mean((0, 2, 3))[:, None, None])
        self.deviation.copy_(some.std((0, 2, 3))[:, None, None].clamp_min(1e-3))

    def forward(self, x: Tensor) -> Tensor:
        x = (_floats(x) - self.mean) / self.deviation
        if self.channels_last:
            x = x.contiguous(memory_format=torch.channels_last)
        with torch.autocast(x.device.type, torch.bfloat16) if self.bf16 and self.training else nullcontext():
            z = self._blocks(x).flatten(1)
        return z.float() if z.dtype == torch.bfloat16 else z

    def _blocks(self, x: Tensor) -> Tensor:
        for block, pooled in enumerate(self.pooled):
            x = self.layers[2 * block + 1](self.layers[2 * block](x))
            # the larger of two, then ReLU: the same numbers as the other way round, with a quarter of the work
            x = F.relu(F.max_pool2d(x, 2) if pooled else x)
        return x


def halves(precision: str, shape: tuple[int, ...], width: int) -> bool:
    """Whether to train a ConvNet in bf16: "auto" does where the machine is quick at it and the images are not tiny.

    1.8 times the speed of fp32 on AMX for 64 channels, at 28x28 and at 84x84.
    """
    if precision not in PRECISIONS:
        raise unknown("precision", precision, PRECISIONS)
    if precision != "auto":
        return precision == "bf16"
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return len(shape) == 3 and min(shape[1:]) >= 20 and width >= 32 and has_fast_bf16(device)


class FeatureMap(nn.Module):
    """Given features (B, D) to (B, D): moved, scaled by one number and multiplied by a matrix that starts as identity.

    Untrained it leaves every nearest neighbour where it was.
    """

    mean: Tensor
    gain: Tensor

    def __init__(self, dimensions: int):
        super().__init__()
        self.dimensions = dimensions
        self.weight = nn.Parameter(torch.eye(dimensions))
        self.register_buffer("mean", torch.zeros(dimensions))
        self.register_buffer("gain", torch.ones(()))

    def standardise_by(self, x: Any) -> None:
        """Take the mean and the gain from these features: two of them are then `SPREAD` apart, squared, on average."""
        features = torch.as_tensor(x).float().flatten(0, -2)
        self.mean.copy_(features.mean(0))
        variance = float(features.var(0).sum())
        self.gain.copy_(torch.tensor((SPREAD / (2 * variance)) ** 0.5 if variance > 0 else 1.0))

    def forward(self, x: Tensor) -> Tensor:
        return ((x.to(self.weight.dtype) - self.mean) * self.gain) @ self.weight


def network_for(x: Any, *, width: int = 64, norm: str = "batch") -> ConvNet | FeatureMap:
    """The network for inputs like `x`, (M, channels, height, width) or (M, [views,] D), standardised by them.

    Weights come from torch's global generator.  Raises InputError for inputs of any other kind.
    """
    kind = np.asarray(x[:1]) if isinstance(x, list | tuple) else x
    shape = tuple(getattr(kind, "shape", ()))
    network: ConvNet | FeatureMap
    if len(shape) == 4:
        network = ConvNet((shape[1], shape[2], shape[3]), width=width, norm=norm)
    elif len(shape) in (2, 3) and np.asarray(x[:1]).dtype.kind in "fiu":
        network = FeatureMap(shape[-1])
    else:
        found = f"{type(x[0]).__name__}s" if not shape or shape[-1:] == () else f"an array of shape {shape}"
        raise InputError(f"wanted images (M, channels, height, width) or features (M, D), got {found}")
    network.standardise_by(x)
    return network


def _floats(x: Tensor) -> Tensor:
    return x.float() / 255 if x.dtype == torch.uint8 else x if x.is_floating_point() else x.float()
