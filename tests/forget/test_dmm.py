"""DMM on language models: log-odds, targets and their scale by hand, and the whole of it on two architectures."""

from __future__ import annotations

import logging
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from palimpsest.core.errors import InputError
from palimpsest.core.watch import Watch
from palimpsest.data.batches import Encoded
from palimpsest.data.records import concat
from palimpsest.data.request import ForgetRequest
from palimpsest.data.world import World
from palimpsest.forget.dmm import DMM, Gradients, _rows_of, layers_by_row, log_odds, log_odds_of, match
from palimpsest.forget.unlearn import encode
from palimpsest.models.lm import LM
from palimpsest.models.train import fresh

QUICK = {"steps": 4, "batch_size": 8, "lr": 1e-3, "projection": 64, "warmup_epochs": 0.0}


def answer_odds(lm: LM, encoded: Encoded) -> np.ndarray:
    """log p / (1 - p) in float64 from the model's token log-probabilities."""
    logp = np.array([row.sum(dtype=np.float64) for row in lm.token_logprobs(encoded)])
    return logp - np.log(-np.expm1(np.minimum(logp, -1e-6)))


def test_log_odds_are_those_of_the_answer(lm: LM, taught: LM, records: ForgetRequest) -> None:
    for model in (lm, taught):
        encoded = model.encode(records.forget)
        np.testing.assert_allclose(log_odds_of(model, encoded), answer_odds(model, encoded), rtol=1e-4, atol=1e-4)
    batch = lm.encode(records.forget).batch([0, 1])
    log_odds(lm.model.train(), batch).sum().backward()
    assert all(torch.isfinite(p.grad).all() for p in lm.model.parameters() if p.grad is not None)
    lm.model.zero_grad()
    lm.model.eval()


def test_projected_gradients_are_kept_in_the_order_of_the_table(lm: LM, asked: ForgetRequest) -> None:
    encoded = lm.encode(asked.forget)
    ((values, features),) = Gradients((lm,), 32, 0)(encoded)
    np.testing.assert_allclose(values, log_odds_of(lm, encoded), rtol=1e-4, atol=1e-4)
    assert features.shape == (len(encoded), 32)
    alone = encoded.select([3])
    ((_, single),) = Gradients((lm,), 32, 0)(alone)
    torch.testing.assert_close(single[0], features[3], rtol=1e-3, atol=1e-3 * float(features[3].abs().max()))
    ((_, other),) = Gradients((lm,), 32, 1)(encoded)
    assert not torch.equal(other, features)


def test_targets_are_the_models_odds_less_the_scaled_effects(taught: LM, asked: ForgetRequest) -> None:
    method = DMM(projection=64, retain_effect=0.5, ridge=0.2)
    forget, retain = (taught.encode(table) for table in (asked.forget, asked.retain))  # type: ignore[arg-type]
    wanted = method._targets(taught, asked, forget, retain)
    table = asked.trained_on()
    gradients = Gradients((taught,), 64, 0)
    ((values, phi),) = gradients(taught.encode(table))
    phi, values = phi.double(), values.double()
    inverse = torch.linalg.inv(phi.T @ phi + 0.2 * (phi**2).sum() / 64 * torch.eye(64))
    q = 1 - values.exp() / (1 + values.exp())
    rows = _rows_of(asked.forget, table)
    queries = [gradients(part)[0][1].double() for part in (forget, retain)]
    start = fresh(taught, 0)
    did = np.concatenate([answer_odds(taught, part) - answer_odds(start, part) for part in (forget, retain)])
    every = torch.cat([query @ inverse @ phi.T @ q for query in queries]).numpy()
    scale = (every * did).sum() / (every**2).sum()
    assert scale > 0
    for found, query, encoded, share in zip(wanted, queries, (forget, retain), (1.0, 0.5), strict=True):
        effect = scale * (query @ inverse @ phi[rows].T @ q[rows]).numpy()
        np.testing.assert_allclose(found, answer_odds(taught, encoded) - share * effect, rtol=1e-2, atol=1e-2)
    fixed = replace(method, scale=2.0, retain_effect=0.0)._targets(taught, asked, forget, retain)
    effect = 2.0 * (queries[0] @ inverse @ phi[rows].T @ q[rows]).numpy()
    np.testing.assert_allclose(fixed[0], answer_odds(taught, forget) - effect, rtol=1e-2, atol=1e-2)
    np.testing.assert_allclose(fixed[1], answer_odds(taught, retain), rtol=1e-4, atol=1e-4)
    told = replace(method, scale=2.0).predict(taught, asked, asked.forget)
    np.testing.assert_allclose(told, fixed[0], rtol=1e-3, atol=1e-3)


def test_the_model_moves_towards_its_targets(taught: LM, asked: ForgetRequest) -> None:
    method = DMM(**(QUICK | {"steps": 40}))  # type: ignore[arg-type]
    wanted = method.predict(taught, asked, asked.forget)
    before = log_odds_of(taught, taught.encode(asked.forget)).numpy()
    assert wanted.mean() < before.mean() - 1
    watch = Watch(progress=False)
    after = method(taught, asked, watch=watch)
    now = log_odds_of(after, after.encode(asked.forget)).numpy()
    assert np.square(now - wanted).mean() < 0.5 * np.square(before - wanted).mean()
    assert watch.traces["forget"].losses[-1] < 0.5 * watch.traces["forget"].losses[0]
    assert abs(after.nll(asked.utility).mean() - taught.nll(asked.utility).mean()) < 0.5  # type: ignore[arg-type]


@pytest.mark.parametrize("lora_rank", [0, 4])
def test_it_changes_a_copy_by_full_weights_and_by_lora(lm: LM, asked: ForgetRequest, lora_rank: int) -> None:
    sha256 = lm.sha256
    method = DMM(lora_rank=lora_rank, scale=3.0, **QUICK)  # type: ignore[arg-type]
    after, again = (method(lm, asked, watch=Watch(progress=False)) for _ in range(2))
    assert lm.sha256 == sha256
    assert after.sha256 == again.sha256 != sha256
    assert not any(module._forward_hooks for module in lm.model.modules())


def test_oracle_matching_needs_only_an_oracles_odds(taught: LM, llama: LM, asked: ForgetRequest) -> None:
    method = DMM(**(QUICK | {"steps": 60, "lr": 3e-3}))  # type: ignore[arg-type]
    forget, retain = (encode(method, taught, table) for table in (asked.forget, asked.retain))  # type: ignore[arg-type]
    oracle = [log_odds_of(llama, part) for part in (forget, retain)]
    after = match(method, taught, asked, (forget, oracle[0]), (retain, oracle[1]), watch=Watch(progress=False))
    start, end = ((log_odds_of(one, forget) - oracle[0]).square().mean() for one in (taught, after))
    assert end < 0.2 * start


def test_shares_of_a_batch_add_up(taught: LM, asked: ForgetRequest) -> None:
    found = []
    for pieces in (1, 2):
        watch = Watch(progress=False)
        DMM(micro_batches=pieces, **QUICK)(taught, asked, watch=watch)  # type: ignore[arg-type]
        found.append(watch.traces["forget"].losses)
    np.testing.assert_allclose(found[0], found[1], rtol=1e-3)


def test_further_models_are_averaged_and_must_read_the_same_tokens(
    taught: LM, llama: LM, asked: ForgetRequest, tmp_path: Path
) -> None:
    taught.save(tmp_path / "same")
    alone = DMM(scale=1.0, **QUICK).predict(taught, asked, asked.forget)  # type: ignore[arg-type]
    both = DMM(scale=1.0, checkpoints=(str(tmp_path / "same"),), **QUICK)  # type: ignore[arg-type]
    found = both.predict(taught, asked, asked.forget)
    assert not np.allclose(found, alone)  # the same model through another projection
    assert np.corrcoef(found, alone)[0, 1] > 0.5
    other = World(people=4, facts=3, seed=9)
    LM.build(other.train, "gpt2-tiny", vocab_size=280, max_length=192).save(tmp_path / "other")
    with pytest.raises(InputError, match="different vocabularies"):
        replace(both, checkpoints=(str(tmp_path / "other"),)).predict(taught, asked, asked.forget)


def test_experts_and_the_head_are_left_out_of_the_gradients(llama: LM, world: World) -> None:
    assert all("lm_head" not in name for name in layers_by_row(llama.model))
    assert len(layers_by_row(llama.model)) == 2 * 7
    config = {"model_type": "qwen2_moe", "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
    config |= {"shared_expert_intermediate_size": 16, "hidden_size": 32, "num_hidden_layers": 1}
    moe = LM.build(world.train, config | {"num_attention_heads": 4, "num_key_value_heads": 4}, vocab_size=300)
    assert {name.rpartition(".")[2] for name in layers_by_row(moe.model)} == {"q_proj", "k_proj", "v_proj", "o_proj"}
    assert Gradients((moe,), 8, 0)(moe.encode(world.train.select(range(5))))[0][1].shape == (5, 8)


def test_a_model_that_was_not_trained_has_no_scale_of_its_own(
    llama: LM, asked: ForgetRequest, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    llama.save(tmp_path / "start")  # nothing was done between the start and now
    with caplog.at_level(logging.WARNING):
        found = DMM(base=str(tmp_path / "start"), projection=64).predict(llama, asked, asked.forget)
    assert "TRAK's raw scale is used" in caplog.text
    np.testing.assert_allclose(found, DMM(scale=1.0, projection=64).predict(llama, asked, asked.forget), rtol=1e-5)


def test_what_cannot_be_forgotten_is_refused(taught: LM, asked: ForgetRequest) -> None:
    few = asked.forget.select(range(2))
    with pytest.raises(InputError, match="half or more") as caught:
        DMM()(taught, replace(asked, train=concat(asked.forget, asked.retain.select(range(3))), holdout=None))  # type: ignore[union-attr]
    assert "\n" not in str(caught.value)
    with pytest.raises(InputError, match=r"forget record 1 of 2 is not among the \d+ training records"):
        DMM()(taught, replace(asked, forget=few, train=asked.retain, holdout=None))
    with pytest.raises(InputError, match="needs retain records"):
        DMM()(taught, replace(asked, retain=None))


def test_copies_among_the_forget_records_are_said_and_used_once(taught: LM, asked: ForgetRequest) -> None:
    twice = replace(asked, forget=concat(asked.forget, asked.forget.select([0])))
    with pytest.warns(UserWarning, match=r"1 of \d+ forget records are duplicates"):
        found = DMM(**QUICK).predict(taught, twice, asked.forget)  # type: ignore[arg-type]
    np.testing.assert_allclose(found, DMM(**QUICK).predict(taught, asked, asked.forget), rtol=1e-5)  # type: ignore[arg-type]


@pytest.mark.parametrize("wrong", [{"projection": 0}, {"ridge": 0.0}, {"scale": -1.0}, {"retain_effect": -0.1}])
def test_settings_that_cannot_be_are_refused(wrong: dict) -> None:
    with pytest.raises(InputError, match=next(iter(wrong))):
        DMM(**wrong)
