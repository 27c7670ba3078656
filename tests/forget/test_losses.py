"""The losses in a loop that is not ours: plain torch, a model and a batch."""

from __future__ import annotations

import math
import re

import pytest
import torch

import palimpsest
from palimpsest.core import losses as core
from palimpsest.data.request import ForgetRequest
from palimpsest.forget import losses
from palimpsest.models.lm import LM


def test_every_loss_is_there_by_name() -> None:
    assert palimpsest.forget.losses is losses
    assert all(hasattr(losses, name) for name in losses.__all__)
    assert losses.npo is core.npo


def test_the_example_in_the_docstring_runs(llama: LM, records: ForgetRequest) -> None:
    assert losses.__doc__ is not None
    code = "\n".join(line[4:] for line in losses.__doc__.splitlines() if line.startswith("    "))
    model = llama.copy().model
    exec(code, {"lm": llama, "model": model, "forget_records": records.forget})
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    assert gradients
    assert any(gradient.abs().max() > 0 for gradient in gradients)
    assert re.search(r"losses\.npo", code)


def test_npo_with_a_kl_term_in_a_plain_loop(taught: LM, records: ForgetRequest) -> None:
    assert records.retain is not None
    forget, retain = taught.encode(records.forget), taught.encode(records.retain)
    start, start_retain = losses.start_logprobs(taught, forget), losses.reference(taught.model, retain, taught.sha256)
    model = taught.copy().model
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    seen = []
    for step in range(10):
        rows, kept = forget.batch(range(8)), retain.batch(range(8 * step, 8 * step + 8))
        push = losses.npo(losses.sequence_logprobs(model, rows), start(rows), beta=0.1).mean()
        loss = push + losses.kl(model, kept, start_retain)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        seen.append(loss.item())
    assert seen[0] == pytest.approx(20 * math.log(2), rel=1e-3)
    assert seen[-1] < seen[0] - 1
