"""Exact retraining: the very reference that training without the forget set makes."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from palimpsest.core.errors import InputError
from palimpsest.core.watch import Watch
from palimpsest.data.request import ForgetRequest
from palimpsest.data.world import World
from palimpsest.forget import Retrain
from palimpsest.models.lm import LM
from palimpsest.models.train import Recipe, train

RECIPE = {"steps": 5, "lr": 1e-3, "batch_size": 8, "seed": 2}


def test_it_is_the_reference(llama: LM, world: World, records: ForgetRequest, watch: Watch) -> None:
    from palimpsest.models.train import fresh

    retrained = Retrain(**RECIPE)(llama, records, watch=watch)  # type: ignore[arg-type]
    start = fresh(llama, 2)
    reference = train(start, records.without_forget(), Recipe(**RECIPE), watch=watch)  # type: ignore[arg-type]
    assert retrained.sha256 == reference.sha256
    assert retrained.source == llama.source
    everything = train(start, world.train, Recipe(**RECIPE), watch=watch)  # type: ignore[arg-type]
    assert retrained.sha256 != everything.sha256


def test_it_may_start_from_a_model(llama: LM, records: ForgetRequest, tmp_path: Path, watch: Watch) -> None:
    llama.save(tmp_path / "base")
    retrained = Retrain(base=str(tmp_path / "base"), **RECIPE)(llama, records, watch=watch)  # type: ignore[arg-type]
    wanted = train(llama, records.without_forget(), Recipe(**RECIPE), watch=watch)  # type: ignore[arg-type]
    assert retrained.sha256 == wanted.sha256


def test_what_it_needs(llama: LM, records: ForgetRequest) -> None:
    with pytest.raises(InputError, match="needs train records"):
        Retrain()(llama, replace(records, train=None))
