"""SCRUB on language models: the divergence by hand, the two parts of its course, and that the student moves."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from palimpsest.core import losses
from palimpsest.core.errors import InputError
from palimpsest.core.reference import reference
from palimpsest.core.watch import Watch
from palimpsest.data.batches import IGNORE
from palimpsest.data.request import ForgetRequest
from palimpsest.forget.scrub import Scrub, distilled
from palimpsest.models.lm import LM

QUICK = {"steps": 6, "batch_size": 8, "lr": 1e-3, "warmup_epochs": 0.0}


def test_the_divergence_by_hand(lm: LM, llama: LM, asked: ForgetRequest) -> None:
    encoded = lm.encode(asked.forget)
    batch = encoded.batch([0, 3])
    student = lm.copy().model
    with torch.no_grad():
        for parameter in student.parameters():
            parameter.mul_(1.1)
    found = distilled(student, batch, reference(lm.model, encoded, lm.sha256), 4.0)
    with torch.no_grad():
        start, now = (
            model(**losses.inputs_of(batch)).logits[:, :-1][batch.targets != IGNORE].double().numpy()
            for model in (lm.model, student)
        )
    p, q = (np.exp(v / 4 - (v / 4).max(1, keepdims=True)) for v in (start, now))
    p, q = p / p.sum(1, keepdims=True), q / q.sum(1, keepdims=True)
    assert found.item() == pytest.approx(16 * (p * np.log(p / q)).sum(1).mean(), rel=1e-3)


@pytest.mark.parametrize("lora_rank", [0, 4])
def test_it_goes_away_first_and_comes_near_then(taught: LM, asked: ForgetRequest, lora_rank: int) -> None:
    sha256 = taught.sha256
    watch = Watch(progress=False)
    after = Scrub(lora_rank=lora_rank, **QUICK)(taught, asked, watch=watch)  # type: ignore[arg-type]
    assert taught.sha256 == sha256
    assert after.sha256 != sha256
    assert after.nll(asked.forget).mean() > taught.nll(asked.forget).mean()
    pushed = watch.traces["forget"].losses
    watch = Watch(progress=False)
    Scrub(lora_rank=lora_rank, ascending=1.0, **QUICK)(taught, asked, watch=watch)  # type: ignore[arg-type]
    assert pushed[:2] == watch.traces["forget"].losses[:2]  # 0.3 of six steps
    assert pushed[2:] != watch.traces["forget"].losses[2:]


def test_shares_of_a_batch_add_up(taught: LM, asked: ForgetRequest) -> None:
    found = []
    for pieces in (1, 2):
        watch = Watch(progress=False)
        Scrub(micro_batches=pieces, **QUICK)(taught, asked, watch=watch)  # type: ignore[arg-type]
        found.append(watch.traces["forget"].losses)
    np.testing.assert_allclose(found[0], found[1], rtol=1e-3, atol=1e-4)


def test_what_cannot_be_is_refused(taught: LM, asked: ForgetRequest) -> None:
    with pytest.raises(InputError, match="ascending is a share"):
        Scrub(ascending=0.0)
    with pytest.raises(InputError, match="temperature must be above 0"):
        Scrub(temperature=0.0)
    with pytest.raises(InputError, match="needs retain records"):
        Scrub()(taught, replace(asked, retain=None))
