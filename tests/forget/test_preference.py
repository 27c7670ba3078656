"""The preference family: the first loss by hand, the reference that does not move, and refusals row by row."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
from datasets import Dataset

from palimpsest.core.errors import InputError
from palimpsest.core.watch import Watch
from palimpsest.data.lexicon import REFUSALS
from palimpsest.data.request import ForgetRequest
from palimpsest.forget import NPO, GradientAscent, IdkDPO, Relabel, SimNPO
from palimpsest.forget.preference import _with_refusals, join, only_questions
from palimpsest.models.lm import LM

FULL = {"batch_size": 1000, "lr": 1e-3, "warmup_epochs": 0.0}


def sums(lm: LM, table: Dataset) -> np.ndarray:
    return np.array([row.sum() for row in lm.token_logprobs(table)])


def test_npo_starts_at_its_constant_and_its_first_step_is_ascents(lm: LM, records: ForgetRequest, watch: Watch) -> None:
    npo = NPO(beta=0.2, retain_loss="none", steps=1, **FULL)(lm, records, watch=watch)  # type: ignore[arg-type]
    assert watch.traces["forget"].losses == pytest.approx([10 * math.log(2)], rel=1e-5)
    assert sums(npo, records.forget).mean() < sums(lm, records.forget).mean()


@pytest.mark.parametrize("beta", [0.1, 1.0])
def test_npos_reference_stays_where_training_began(llama: LM, records: ForgetRequest, beta: float) -> None:
    budget = {**FULL, "retain_loss": "none", "beta": beta}
    after_two = NPO(steps=2, **budget)(llama, records, watch=Watch(progress=False))  # type: ignore[arg-type]
    watch = Watch(progress=False)
    NPO(steps=3, **budget)(llama, records, watch=watch)  # type: ignore[arg-type]
    drift = sums(after_two, records.forget) - sums(llama, records.forget)
    wanted = np.mean(2 / beta * np.log1p(np.exp(beta * drift)))
    assert watch.traces["forget"].losses[2] == pytest.approx(wanted, rel=1e-4)


def test_npo_pushes_less_and_less_where_ascent_does_not(taught: LM, asked: ForgetRequest) -> None:
    def pushes(method: NPO | GradientAscent) -> list[float]:
        watch = Watch(progress=False)
        method(taught, asked, watch=watch)
        return watch.traces["forget"].logs["grad_norm"]

    budget = {**FULL, "steps": 15, "lr": 1e-2}
    npo = pushes(NPO(beta=1.0, retain_loss="none", **budget))  # type: ignore[arg-type]
    ascent = pushes(GradientAscent(**budget))  # type: ignore[arg-type]
    assert npo[-1] < 0.05 * npo[0]
    assert ascent[-1] > 0.2 * ascent[0]


def test_simnpo_by_hand_and_without_a_reference(llama: LM, records: ForgetRequest, watch: Watch) -> None:
    method = SimNPO(beta=2.0, delta=0.5, retain_loss="none", gamma=0.5, steps=1, **FULL)  # type: ignore[arg-type]
    method(llama, records, watch=watch)
    values = 2 / 2.0 * np.log1p(np.exp(-(2.0 * llama.nll(records.forget) - 0.5)))
    assert watch.traces["forget"].losses[0] == pytest.approx(0.5 * values.mean(), rel=1e-3)


def test_dpo_starts_at_its_constant_and_learns_to_refuse(lm: LM, asked: ForgetRequest, watch: Watch) -> None:
    method = IdkDPO(steps=10, batch_size=16, lr=3e-3, retain_loss="none")
    after = method(lm, asked, watch=watch)
    assert watch.traces["forget"].losses[0] == pytest.approx(20 * math.log(2), rel=1e-5)
    pairs = lm.pairs(asked.forget)
    refused = [join(prompt, REFUSALS[0]) for prompt, _ in pairs]

    def margin(model: LM) -> float:
        return sums(model, refused).mean() - sums(model, pairs).mean()  # type: ignore[arg-type]

    assert margin(after) > margin(lm) + 1


def test_refusals_are_seeded_and_stand_row_by_row(llama: LM, asked: ForgetRequest) -> None:
    true, refused = _with_refusals(Relabel(seed=3), llama, asked)
    assert len(true) == len(refused) == len(asked.forget)
    for ids, start, other, other_start in zip(true.ids, true.starts, refused.ids, refused.starts, strict=True):
        assert start == other_start
        assert ids[:start].tolist() == other[:start].tolist()
        assert llama.tokenizer.decode(other[start:], skip_special_tokens=True).strip() in REFUSALS
    again = _with_refusals(Relabel(seed=3), llama, asked)[1]
    assert again.sha256 == refused.sha256 != _with_refusals(Relabel(seed=4), llama, asked)[1].sha256


def test_relabelling_makes_refusals_likely(llama: LM, asked: ForgetRequest, watch: Watch) -> None:
    after = Relabel(steps=10, batch_size=8, lr=3e-3, retain_loss="none")(llama, asked, watch=watch)
    refused = [join(prompt, REFUSALS[0]) for prompt, _ in llama.pairs(asked.forget)]
    assert after.nll(refused).mean() < llama.nll(refused).mean() - 0.5


def test_documents_among_questions_are_counted_and_left_alone(llama: LM, records: ForgetRequest, watch: Watch) -> None:
    with pytest.warns(UserWarning, match=r"6 of \d+ forget records are documents"):
        Relabel(steps=1)(llama, records, watch=watch)
    documents = replace(records, forget=records.forget.select(range(6)))
    with pytest.raises(InputError, match="needs questions"):
        IdkDPO()(llama, documents)
    assert all(row["prompt"] for row in only_questions_quietly(records))


def only_questions_quietly(records: ForgetRequest) -> Dataset:
    with pytest.warns(UserWarning, match="documents"):
        return only_questions(records.forget)


def test_join_puts_one_space_between() -> None:
    assert join("Who?", "Nobody.") == ("Who?", " Nobody.")
    assert join("Who? ", "Nobody.") == ("Who? ", "Nobody.")


@pytest.mark.parametrize("method", [NPO, SimNPO, IdkDPO])
@pytest.mark.parametrize("beta", [0.0, -0.1, float("nan")])
def test_beta_must_be_above_zero(method: type, beta: float) -> None:
    with pytest.raises(InputError, match="beta must be above 0"):
        method(beta=beta)
