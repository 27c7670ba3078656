"""Ordinary training: a copy learns, the original stays, the same recipe makes the same weights."""

from __future__ import annotations

import signal
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from datasets import Dataset

from palimpsest.core.errors import InputError
from palimpsest.core.watch import Watch
from palimpsest.data.batches import Batch, Batches
from palimpsest.models.guard import PromptGuard
from palimpsest.models.lm import LM
from palimpsest.models.train import Recipe, fresh, train

RECIPE = Recipe(steps=12, lr=3e-3, batch_size=8, warmup=3)


@pytest.fixture(scope="module")
def table(texts: list[str]) -> Dataset:
    return Dataset.from_dict({"text": texts[:24]})


@pytest.fixture(scope="module")
def start(texts: list[str]) -> LM:
    return LM.build(texts, "llama-tiny", vocab_size=320, max_length=96)


def test_a_copy_learns_and_the_original_stays(start: LM, table: Dataset) -> None:
    before, modes = start.sha256, start.model.training
    watch = Watch(progress=False)
    trained = train(start, table, RECIPE, watch=watch)
    assert start.sha256 == before
    assert (start.model.training, trained.model.training) == (modes, False)
    assert trained.nll(table).mean() < start.nll(table).mean() - 0.5
    assert watch.traces["training"].steps == 12
    assert trained.source == "training"


def test_the_same_recipe_makes_the_same_weights_and_another_seed_others(start: LM, table: Dataset) -> None:
    watch = Watch(progress=False)
    one, two = (train(start, table, RECIPE, watch=watch).sha256 for _ in range(2))
    assert one == two
    assert train(start, table, replace(RECIPE, seed=1), watch=watch).sha256 != one


def test_an_interrupted_training_goes_on(
    start: LM, table: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = train(start, table, RECIPE, watch=Watch(progress=False))
    batch_of = Batches.__call__

    def interrupted(self: Batches, step: int) -> Batch:
        if step == 7:
            signal.raise_signal(signal.SIGINT)  # Ctrl-C
        return batch_of(self, step)

    watch = Watch(progress=False, checkpoint=tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(Batches, "__call__", interrupted)
        with pytest.raises(KeyboardInterrupt, match="after step 8 of 12"):
            train(start, table, RECIPE, watch=watch)
    assert train(start, table, RECIPE, watch=watch).sha256 == whole.sha256
    assert watch.traces["training"].steps == 12


def test_fewer_rows_than_a_batch_and_fewer_steps_than_the_warmup(start: LM, table: Dataset) -> None:
    recipe = Recipe(steps=2, lr=1e-3, batch_size=64)
    trained = train(start, table.select(range(3)), recipe, watch=Watch(progress=False))
    assert trained.sha256 != start.sha256


def test_fresh_weights_are_those_that_build_draws(start: LM, texts: list[str]) -> None:
    random = torch.random.get_rng_state()
    assert fresh(start, 0).sha256 == start.sha256
    assert torch.equal(torch.random.get_rng_state(), random)
    other = fresh(start, 1)
    assert other.sha256 != start.sha256
    assert other.sha256 == LM.build(texts, "llama-tiny", vocab_size=320, max_length=96, seed=1).sha256


def test_a_guarded_model_cannot_be_made_afresh(start: LM) -> None:
    with pytest.raises(InputError, match="guarded"):
        fresh(start.with_guard(PromptGuard("{prompt}")), 0)
