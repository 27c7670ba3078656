"""KGA: the gaps by hand, the sign of the whole, and helpers that are asked once."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from palimpsest.core import losses
from palimpsest.core.errors import InputError
from palimpsest.core.reference import reference
from palimpsest.core.watch import Watch
from palimpsest.data.request import ForgetRequest
from palimpsest.data.world import World
from palimpsest.forget import KGA
from palimpsest.forget.kga import _alignment, row_divergences
from palimpsest.models.lm import LM
from palimpsest.models.train import fresh

QUICK = {"steps": 2, "batch_size": 8, "lr": 1e-3, "helper_steps": 3}


def test_row_divergences_are_those_of_each_row_alone(llama: LM, records: ForgetRequest) -> None:
    encoded = llama.encode(records.forget)
    other = fresh(llama, 5)
    states = reference(llama.model, encoded, llama.sha256)
    found = row_divergences(other.model, encoded, states)
    for row in (0, 6, len(encoded) - 1):
        batch = encoded.batch([row])
        alone = losses.kl(other.model, batch, states).item() * batch.total_tokens
        assert found[row] == pytest.approx(alone, rel=1e-4)


@pytest.mark.parametrize("gap", [0.0, 100.0])
def test_the_alignment_is_an_absolute_difference(llama: LM, records: ForgetRequest, gap: float) -> None:
    encoded = llama.encode(records.forget)
    states = reference(fresh(llama, 5).model, encoded, "other")
    batch = encoded.batch([0, 7, 8, 9])
    own = losses.kl(llama.model, batch, states)
    loss = _alignment(states)
    value = loss(llama.model, {"forget": batch, "gap": gap})  # type: ignore[dict-item]
    assert value.item() == pytest.approx(abs(own.item() - gap), rel=1e-5)
    weights = list(llama.model.parameters())
    ours, theirs = torch.autograd.grad(value, weights)[1], torch.autograd.grad(own, weights)[1]
    torch.testing.assert_close(ours, theirs if gap == 0 else -theirs)


def test_the_wanted_gap_is_that_of_unseen_rows(llama: LM, records: ForgetRequest) -> None:
    """At the first step L_a = | KL_F(A_f || A_D) - KL_N(A_D || A_n) |, each a mean over the tokens of a batch."""
    method = KGA(steps=1, batch_size=1000, lr=1e-3, helper_steps=3)
    watch = Watch(progress=False)
    method(llama, records, watch=watch)
    forget, unseen = llama.encode(records.forget), llama.encode(records.holdout)  # type: ignore[arg-type]
    helper_f = method._helper(llama, records.forget, "f", Watch(progress=False))
    helper_n = method._helper(llama, records.holdout, "n", Watch(progress=False))  # type: ignore[arg-type]
    whole_f, whole_n = forget.batch(range(len(forget))), unseen.batch(range(len(unseen)))
    own = losses.kl(llama.model, whole_f, reference(helper_f.model, forget, helper_f.sha256)).item()
    gap = losses.kl(helper_n.model, whole_n, reference(llama.model, unseen, llama.sha256)).item()
    assert watch.traces["forget"].logs["forget"][0] == pytest.approx(abs(own - gap), rel=1e-3)
    assert set(watch.traces) == {"helper-forget", "helper-holdout", "forget"}


def test_helpers_may_start_from_a_model(llama: LM, records: ForgetRequest, tmp_path: Path, watch: Watch) -> None:
    llama.save(tmp_path / "base")
    from_base = KGA(base=str(tmp_path / "base"), **QUICK)(llama, records, watch=watch)  # type: ignore[arg-type]
    assert from_base.sha256 != KGA(**QUICK)(llama, records, watch=watch).sha256  # type: ignore[arg-type]


def test_helpers_must_read_the_same_tokens(llama: LM, records: ForgetRequest, tmp_path: Path, watch: Watch) -> None:
    other = LM.build(World(people=5, facts=1, seed=9).train, "llama-tiny", vocab_size=290)
    other.save(tmp_path / "other")
    with pytest.raises(InputError, match="different vocabularies"):
        KGA(base=str(tmp_path / "other"), **QUICK)(llama, records, watch=watch)  # type: ignore[arg-type]


def test_what_it_needs_and_what_it_refuses(llama: LM, records: ForgetRequest) -> None:
    with pytest.raises(InputError, match="needs holdout records"):
        KGA()(llama, replace(records, holdout=None))
    with pytest.raises(InputError, match="micro-batches"):
        KGA(micro_batches=2)
    with pytest.raises(InputError, match="helper_steps"):
        KGA(helper_steps=0)
