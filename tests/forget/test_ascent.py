"""Gradient ascent and its relatives: the loss they say they minimise, and where it leads."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from datasets import Dataset

from palimpsest.core.errors import InputError
from palimpsest.core.watch import Watch
from palimpsest.data.request import ForgetRequest
from palimpsest.forget import LLMU, FinetuneRetain, GradDiff, GradientAscent, KLMin
from palimpsest.models.lm import LM

FULL = {"steps": 1, "batch_size": 1000, "lr": 1e-3}  # one step on the whole set: its loss can be computed apart


def mean_nll(lm: LM, table: Dataset) -> float:
    return -float(np.concatenate(lm.token_logprobs(table)).mean())


def test_the_first_loss_is_minus_the_mean_over_all_tokens(lm: LM, records: ForgetRequest, watch: Watch) -> None:
    GradientAscent(**FULL)(lm, records, watch=watch)  # type: ignore[arg-type]
    assert watch.traces["forget"].losses == pytest.approx([-mean_nll(lm, records.forget)], rel=1e-5)


def test_all_forget_and_a_retain_term_keeps_the_rest(taught: LM, records: ForgetRequest, watch: Watch) -> None:
    assert records.retain is not None
    budget = {"steps": 12, "batch_size": 8, "lr": 1e-2, "warmup_epochs": 0.0}
    kept = {}
    for method in (GradientAscent, GradDiff, KLMin, LLMU):
        after = method(**budget)(taught, records, watch=watch)  # type: ignore[arg-type]
        assert mean_nll(after, records.forget) > mean_nll(taught, records.forget) + 0.3
        kept[method] = mean_nll(after, records.retain)
    assert max(kept[GradDiff], kept[KLMin], kept[LLMU]) < kept[GradientAscent] - 0.5


def test_llmu_adds_unrelated_answers(llama: LM, asked: ForgetRequest, watch: Watch) -> None:
    method = LLMU(gamma=0.25, mislead=0.5, alpha=3.0, **FULL)  # type: ignore[arg-type]
    method(llama, asked, watch=watch)
    pairs = method._unrelated(llama, asked)
    n = len(asked.forget)
    assert len(pairs) == 8 * n
    prompts = [prompt for prompt, _ in llama.pairs(asked.forget)]
    assert [prompt for prompt, _ in pairs] == prompts * 8
    retain_answers = {completion for _, completion in llama.pairs(asked.retain)}  # type: ignore[arg-type]
    assert {completion for _, completion in pairs} <= retain_answers
    assert pairs[:n] != pairs[n : 2 * n]
    misled = -float(np.concatenate(llama.token_logprobs(pairs[:n])).mean())
    wanted = -0.25 * mean_nll(llama, asked.forget) + 0.5 * misled  # the KL term is 0 at the start
    assert watch.traces["forget"].losses[0] == pytest.approx(wanted, rel=1e-4)


def test_llmu_stops_at_the_largest_loss_and_where_the_watch_says(taught: LM, records: ForgetRequest) -> None:
    budget = {"steps": 20, "batch_size": 8, "lr": 1e-2, "warmup_epochs": 0.0}
    watch = Watch(progress=False)
    largest = mean_nll(taught, records.forget) + 2.0
    LLMU(largest_loss=largest, micro_batches=2, **budget)(taught, records, watch=watch)  # type: ignore[arg-type]
    trace = watch.traces["forget"]
    assert trace.stopped == "until"
    assert 1 < trace.steps < 20
    watch = Watch(progress=False, until=lambda step, model: step == 2)
    LLMU(**budget)(taught, records, watch=watch)  # type: ignore[arg-type]
    assert watch.traces["forget"].steps == 2


@pytest.mark.parametrize("wrong", [{"largest_loss": 0.0}, {"mislead": -1.0}])
def test_llmu_refuses_what_cannot_be(wrong: dict[str, float]) -> None:
    with pytest.raises(InputError, match=next(iter(wrong))):
        LLMU(**wrong)  # type: ignore[arg-type]


def test_finetuning_sees_the_retain_set_alone(llama: LM, records: ForgetRequest, watch: Watch) -> None:
    budget = {"steps": 3, "batch_size": 16, "lr": 1e-3}
    one = FinetuneRetain(**budget)(llama, records, watch=watch)  # type: ignore[arg-type]
    other = replace(records, forget=records.forget.select([0]), train=None)
    assert FinetuneRetain(**budget)(llama, other, watch=watch).sha256 == one.sha256  # type: ignore[arg-type]
    assert records.retain is not None
    assert mean_nll(one, records.retain) < mean_nll(llama, records.retain)


def test_ascent_needs_no_retain_set(llama: LM, records: ForgetRequest, watch: Watch) -> None:
    bare = ForgetRequest(records.forget)
    with_retain = GradientAscent(**FULL)(llama, records, watch=watch)  # type: ignore[arg-type]
    assert GradientAscent(**FULL)(llama, bare, watch=watch).sha256 == with_retain.sha256  # type: ignore[arg-type]
    assert torch.isfinite(torch.tensor(watch.traces["forget"].losses)).all()
