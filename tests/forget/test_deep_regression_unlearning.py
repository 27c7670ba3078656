from __future__ import annotations

import copy
import dataclasses
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from palimpsest.core.errors import InputError
from palimpsest.core.watch import Watch
from palimpsest.forget.deep_regression_unlearning import Blindspot, Finetune, GaussianAmnesiac, Retrain
from palimpsest.forget.regressors import renewed, train

Samples = tuple[Tensor, Tensor]
QUIET = Watch(progress=False)
METHODS = (
    Blindspot(epochs=2, batch_size=32),
    GaussianAmnesiac(epochs=2, batch_size=32),
    Finetune(epochs=2, batch_size=32),
    Retrain(epochs=3, batch_size=32),
)


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.reads, self.says = nn.LSTM(1, 6, batch_first=True), nn.Linear(6, 1)

    def forward(self, inputs: Tensor) -> Tensor:
        return self.says(self.reads(inputs)[0][:, -1]).squeeze(1)  # (B,): a model whose answers have no last axis


def networks() -> dict[str, nn.Module]:
    camera = nn.Sequential(nn.Conv1d(1, 4, 3, padding=1), nn.BatchNorm1d(4), nn.ReLU(), nn.Flatten(), nn.Linear(24, 1))
    layers = nn.Sequential(nn.Flatten(), nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 1))
    return {"camera": camera, "layers": layers, "recurrent": Recurrent()}


@pytest.fixture(params=sorted(networks()))
def model(request: pytest.FixtureRequest) -> nn.Module:
    return renewed(networks()[request.param])


def data(model: nn.Module, count: int = 200) -> tuple[Samples, Samples]:
    """What must go (targets below -1), and what stays."""
    inputs = torch.from_numpy(np.random.default_rng(0).normal(size=(count, 6))).float()
    targets = inputs.sum(1)
    shaped = inputs[:, :, None] if isinstance(model, Recurrent) else inputs[:, None]
    gone = targets < -1
    return (shaped[gone], targets[gone]), (shaped[~gone], targets[~gone])


@pytest.mark.parametrize("method", METHODS, ids=lambda method: type(method).__name__)
def test_it_is_repeatable_and_changes_nothing_that_it_was_given(method: Any, model: nn.Module) -> None:
    forget, retain = data(model)
    before, tensors = copy.deepcopy(model.state_dict()), [t.clone() for t in (*forget, *retain)]
    model.train()
    after = method(model, forget, retain, watch=QUIET)
    torch.manual_seed(3)
    again = method(model, forget, retain, watch=QUIET)
    assert all(torch.equal(value, model.state_dict()[name]) for name, value in before.items())
    assert all(torch.equal(one, other) for one, other in zip((*forget, *retain), tensors, strict=True))
    assert model.training
    assert any(not torch.equal(value, after.state_dict()[name]) for name, value in before.items())
    assert all(torch.equal(value, again.state_dict()[name]) for name, value in after.state_dict().items())
    other = dataclasses.replace(method, seed=1)(model, forget, retain, watch=QUIET)
    assert any(not torch.equal(value, other.state_dict()[name]) for name, value in after.state_dict().items())
    assert not any(module._forward_hooks for module in model.modules())
    with pytest.raises(dataclasses.FrozenInstanceError):
        method.lr = 1.0


def test_one_step_of_blindspot_against_its_formula() -> None:
    model, blind = renewed(networks()["camera"]).eval(), renewed(networks()["camera"], 1).eval()
    forget, retain = data(model)
    forget, retain = (forget[0][:5], forget[1][:5]), (retain[0][:9], retain[1][:9])
    method = Blindspot(epochs=1, batch_size=14, lr=1e-2, attention=3.0)
    watch = Watch(progress=False)
    after = method(model, forget, retain, blind=blind, watch=watch)

    work = copy.deepcopy(model).double().train()

    def seen(module: nn.Module, inputs: Tensor) -> tuple[Tensor, Tensor]:
        answers = module(inputs)
        squared = module[0](inputs).square().mean(1)
        return answers[:, 0], squared / squared.norm(dim=1, keepdim=True)

    with torch.no_grad():
        wanted, their_map = seen(copy.deepcopy(blind).double(), forget[0].double())
    answers, maps = seen(work, torch.cat([forget[0], retain[0]]).double())
    inner = (answers[:5] - wanted).abs().mean() + 3.0 * (maps[:5] - their_map).square().mean()
    value = 5 / 14 * inner + 9 / 14 * (answers[5:] - retain[1].double()).abs().mean()
    assert watch.traces["forget"].losses[0] == pytest.approx(value.item(), rel=1e-5)
    adam = torch.optim.Adam(work.parameters(), 1e-2)
    value.backward()
    adam.step()
    moved = [p.grad is not None and p.grad.abs() > 1e-4 for p in work.parameters()]
    for p, q, sure in zip(after.parameters(), work.parameters(), moved, strict=True):
        assert torch.allclose(p[sure].double(), q[sure], atol=1e-5)


def test_blindspot_moves_towards_the_blind_network_and_keeps_the_rest() -> None:
    model = renewed(networks()["layers"])
    forget, retain = data(model, 400)
    everything = (torch.cat([forget[0], retain[0]]), torch.cat([forget[1], retain[1]]))
    before = train(model, everything, epochs=60, lr=1e-2, batch_size=64, watch=QUIET)
    method = Blindspot(epochs=20, batch_size=64, blind_epochs=4)
    blind = method.blind(before, retain, watch=QUIET)
    after = method(before, forget, retain, blind=blind, watch=QUIET)
    with torch.no_grad():
        far, near = ((one(forget[0]) - blind(forget[0])).abs().mean() for one in (before, after))
        kept = (after(retain[0]).squeeze(1) - retain[1]).abs().mean()
    assert near < 0.6 * far
    assert kept < 0.4
    assert not blind.training
    harder = dataclasses.replace(method, attention=0.0)(before, forget, retain, blind=blind, watch=QUIET)
    assert any(not torch.equal(p, q) for p, q in zip(after.parameters(), harder.parameters(), strict=True))


def test_the_reduction_of_a_map_is_worth_its_number_of_positions() -> None:
    model, blind = renewed(networks()["camera"]).eval(), renewed(networks()["camera"], 1).eval()
    forget, retain = data(model)
    logs = []
    for reduction in ("mean", "sum"):
        watch = Watch(progress=False)
        Blindspot(reduction=reduction)(model, forget, retain, blind=blind, watch=watch)
        logs.append(watch.traces["forget"].logs["attention"][0])
    assert logs[1] == pytest.approx(6 * logs[0], rel=1e-4)


def test_which_layers_are_compared() -> None:
    found = {name: Blindspot()._compared(network) for name, network in networks().items()}
    assert found == {"camera": ["0"], "layers": ["1", "3"], "recurrent": ["reads"]}
    assert Blindspot(layers=("2",))._compared(networks()["camera"]) == ["2"]
    with pytest.raises(InputError, match="no module called 'deep': its modules are 0, 1, 2"):
        Blindspot(layers=("deep",))._compared(networks()["camera"])
    with pytest.raises(InputError, match="no inner layer"):
        Blindspot()._compared(nn.Sequential(nn.Linear(2, 1)))


def test_amnesiac_targets_are_drawn_once_from_all_targets() -> None:
    forget = (torch.zeros(4000, 2), torch.full((4000, 1), -3.0))
    retain = (torch.zeros(6000, 2), torch.full((6000, 1), 2.0))
    every = torch.cat([forget[1], retain[1]])
    drawn = GaussianAmnesiac().targets(forget, retain)
    assert drawn.shape == (4000, 1)
    assert drawn.mean().item() == pytest.approx(every.mean().item(), abs=0.15)
    assert drawn.std().item() == pytest.approx(every.std().item(), rel=0.05)
    assert torch.equal(drawn, GaussianAmnesiac().targets(forget, retain))
    clipped = GaussianAmnesiac(clip_range=True).targets(forget, retain)
    assert clipped.min() == -3
    assert clipped.max() == 2


def test_retraining_never_sees_what_must_go() -> None:
    model = renewed(networks()["layers"])
    forget, retain = data(model)
    one = Retrain(epochs=2)(model, forget, retain, watch=QUIET)
    two = Retrain(epochs=2)(model, (forget[0][:3] * 9, forget[1][:3] - 50), retain, watch=QUIET)
    assert all(torch.equal(p, q) for p, q in zip(one.parameters(), two.parameters(), strict=True))
    other = Finetune(epochs=1)(model, (forget[0][:3] * 9, forget[1][:3] - 50), retain, watch=QUIET)
    assert torch.equal(other[1].weight, Finetune(epochs=1)(model, forget, retain, watch=QUIET)[1].weight)


def test_bad_input() -> None:
    model = renewed(networks()["layers"])
    forget, retain = data(model)
    with pytest.raises(InputError, match="stay: with half or more gone"):
        Blindspot()(model, retain, forget, watch=QUIET)
    narrow = nn.Sequential(nn.Flatten(), nn.Linear(6, 3), nn.ReLU(), nn.Linear(3, 3), nn.ReLU(), nn.Linear(3, 1))
    with pytest.raises(InputError, match=r"differ in architecture, at '1\.bias'"):
        Blindspot()(model, forget, retain, blind=narrow, watch=QUIET)
    with pytest.raises(InputError, match="attention must not be below 0"):
        Blindspot(attention=-1.0)
    with pytest.raises(InputError, match="blind_epochs must be above 0"):
        Blindspot(blind_epochs=0)
