"""What a watch hands to each training loop of a method, and what it keeps of it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from palimpsest.core.watch import Watch


def run(watch: Watch, name: str, **arguments: object) -> nn.Module:
    torch.manual_seed(0)
    model = nn.Linear(3, 1)
    data = torch.ones(4, 3)

    def loss(model: nn.Module, batch: torch.Tensor) -> torch.Tensor:
        return model(batch).square().mean()

    watch.fit(name, model, loss, lambda step: data, steps=4, lr=1e-2, **arguments)  # type: ignore[arg-type]
    return model


def test_traces_are_kept_by_name_without_the_weights() -> None:
    watch = Watch(progress=False)
    run(watch, "first")
    run(watch, "second")
    assert list(watch.traces) == ["first", "second"]
    assert [trace.steps for trace in watch.traces.values()] == [4, 4]
    assert len(watch.traces["first"].losses) == 4
    assert not list(watch.traces["first"].model.parameters())


def test_only_the_main_loop_may_be_stopped() -> None:
    asked: list[int] = []

    def until(step: int, model: nn.Module) -> bool:
        asked.append(step)
        return step == 2

    watch = Watch(until=until, progress=False)
    run(watch, "preparation", main=False)
    assert asked == []
    assert watch.traces["preparation"].stopped == ""
    run(watch, "forget")
    assert asked == [1, 2]
    assert (watch.traces["forget"].steps, watch.traces["forget"].stopped) == (2, "until")


def test_each_loop_has_a_checkpoint_folder_of_its_own(tmp_path: Path) -> None:
    watch = Watch(checkpoint=tmp_path, progress=False)
    run(watch, "first")
    run(watch, "second", seed=1)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["first", "second"]
    assert all(list((tmp_path / name).glob("step-*")) for name in ("first", "second"))


def test_the_default_leaves_nothing_and_says_what_it_does(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    run(Watch(progress=False), "quiet")
    assert capsys.readouterr() == ("", "")
    assert not list(tmp_path.iterdir())


def test_two_watches_share_no_traces() -> None:
    one, other = Watch(progress=False), Watch(progress=False)
    run(one, "forget")
    assert other.traces == {}
