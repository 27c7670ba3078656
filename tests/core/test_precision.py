from __future__ import annotations

import pytest
import torch
from torch import nn

from palimpsest.core import precision
from palimpsest.core.errors import InputError
from palimpsest.core.precision import masters, resolve, typical_width

CPU = torch.device("cpu")


def network(width: int) -> nn.Sequential:
    return nn.Sequential(nn.Embedding(1000, width), nn.Linear(width, width), nn.LayerNorm(width))


@pytest.mark.parametrize(
    ("width", "fast", "expected"), [(64, True, "fp32"), (192, True, "bf16"), (256, True, "bf16"), (256, False, "fp32")]
)
def test_auto_goes_by_width_and_machine(width, fast, expected, monkeypatch):
    monkeypatch.setattr(precision, "has_fast_bf16", lambda device: fast)
    assert resolve(network(width), "auto", CPU) == expected


def test_what_is_asked_for_is_taken():
    assert resolve(network(8), "bf16", CPU) == "bf16"
    assert resolve(network(512), "fp32", CPU) == "fp32"
    with pytest.raises(InputError, match="unknown precision 'bf61': did you mean bf16"):
        resolve(network(8), "bf61", CPU)


def test_width_is_that_of_the_matrices():
    assert typical_width(network(48)) == 48
    assert typical_width(nn.Conv2d(16, 64, 3)) == 64
    assert typical_width(network(48).double()) == 0
    assert typical_width(nn.LayerNorm(8)) == 0


@pytest.mark.parametrize(("kind", "frozen_inside"), [("bf16", torch.bfloat16), ("fp32", torch.float32)])
def test_masters_are_fp32_inside_and_gone_after(kind, frozen_inside):
    model = network(8).bfloat16()
    model[0].requires_grad_(False)
    seen = []

    def fail_inside() -> None:
        with masters(model, kind):
            seen.extend([model[0].weight.dtype, model[1].weight.dtype])
            raise RuntimeError

    with pytest.raises(RuntimeError):
        fail_inside()
    assert seen == [frozen_inside, torch.float32]
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
