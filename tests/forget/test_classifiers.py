"""Unlearners of plain classifiers: their losses by hand, a stack against single models, and what they leave alone."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from palimpsest.core.errors import InputError, TrainingDiverged
from palimpsest.core.many import Many, train_many
from palimpsest.forget.classifiers import (
    Ascent,
    AscentDescent,
    Examples,
    Finetune,
    Matching,
    Scrub,
    Seen,
    datamodel_matching,
    logits_of,
    split,
    unlearn,
    with_outputs,
)

RULES = {"matching": Matching(), "finetune": Finetune(), "ascent": Ascent(), "both": AscentDescent(), "scrub": Scrub()}
ROWS, CLASSES = 24, 3


def points(shape: tuple[int, ...] = (5,)) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(ROWS, *shape, generator=generator), torch.arange(ROWS) % CLASSES


def dense() -> nn.Module:
    return nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Dropout(0.5), nn.Linear(8, CLASSES))


def convolutional() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 9, CLASSES)
    ).train()


def stack(models: int = 3) -> Many:
    masks = np.ones((models, ROWS), bool)
    data = points()
    make = lambda: nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, CLASSES))  # noqa: E731
    loss = lambda model, batch: F.cross_entropy(model(batch[0]), batch[1])  # noqa: E731
    return train_many(make, loss, data, masks, steps=20, lr=0.05, batch_size=8)


def seen(rows: int = 4, seed: int = 0) -> Seen:
    generator = torch.Generator().manual_seed(seed)
    logits, outputs = torch.randn(2, rows, CLASSES, generator=generator, dtype=torch.float64)
    return Seen(logits, torch.arange(rows) % CLASSES, outputs)


def cross_entropy(one: Seen) -> float:
    logits = one.logits.numpy()
    logs = logits - np.log(np.exp(logits).sum(1, keepdims=True))
    return float(-logs[np.arange(len(logits)), one.labels.numpy()].mean())


def distilled(one: Seen, temperature: float) -> float:
    start, now = (np.exp(np.asarray(v) / temperature) for v in (one.outputs, one.logits))
    start, now = start / start.sum(1, keepdims=True), now / now.sum(1, keepdims=True)
    return float(temperature**2 * (start * np.log(start / now)).sum(1).mean())


def test_the_losses_by_hand() -> None:
    forget, retain = seen(seed=0), seen(seed=1)
    squares = [((one.logits - one.outputs) ** 2).numpy() for one in (forget, retain)]  # type: ignore[operator]
    assert Matching().loss(forget, retain, 0.9).item() == pytest.approx(np.concatenate(squares).mean())
    assert Finetune().loss(forget, retain, 0.0).item() == pytest.approx(cross_entropy(retain))
    assert Ascent().loss(forget, retain, 0.0).item() == pytest.approx(-cross_entropy(forget))
    rule = AscentDescent(ascending=0.5)
    assert rule.loss(forget, retain, 0.49).item() == pytest.approx(cross_entropy(retain) - cross_entropy(forget))
    assert rule.loss(forget, retain, 0.5).item() == pytest.approx(cross_entropy(retain))
    near = 0.99 * cross_entropy(retain) + 0.1 * distilled(retain, 4.0)
    assert Scrub().loss(forget, retain, 0.2).item() == pytest.approx(near - distilled(forget, 4.0))
    assert Scrub().loss(forget, retain, 0.3).item() == pytest.approx(near)
    assert [Scrub().rate(phase) for phase in (0.0, 0.3, 0.5, 0.9)] == pytest.approx([1, 0.1, 0.01, 0.001])


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize(("make", "shape"), [(dense, (5,)), (convolutional, (1, 5, 5))], ids=["dense", "convolutional"])
def test_every_rule_changes_a_copy_and_nothing_else(rule: str, make, shape: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    model = make()
    kept = {name: value.clone() for name, value in model.state_dict().items()}
    modes = [module.training for module in model.modules()]
    forget, retain = (with_outputs(model, part) for part in split(*points(shape), [1, 5, 7], 10))
    if rule == "matching":
        forget = Examples(forget.inputs, forget.labels, forget.outputs - 1.0)  # type: ignore[operator]
    torch.manual_seed(1)
    after = unlearn(model, RULES[rule], forget, retain, steps=5, lr=1e-2, batch_size=8)
    torch.manual_seed(2)
    again = unlearn(model, RULES[rule], forget, retain, steps=5, lr=1e-2, batch_size=8)
    other = unlearn(model, RULES[rule], forget, retain, steps=5, lr=1e-2, batch_size=8, seed=1)
    assert all(torch.equal(value, kept[name]) for name, value in model.state_dict().items())
    assert all(p.grad is None for p in (*model.parameters(), *after.parameters()))
    assert [m.training for m in model.modules()] == [m.training for m in after.modules()] == modes
    for name, value in after.state_dict().items():
        trained = name in dict(model.named_parameters())
        assert torch.equal(value, kept[name]) != trained, "all weights move, running statistics do not"
        assert torch.equal(value, again.state_dict()[name])
    assert any(not torch.equal(v, other.state_dict()[n]) for n, v in after.state_dict().items())


@pytest.mark.parametrize("rule", RULES)
def test_a_stack_is_its_models_one_by_one(rule: str) -> None:
    many = stack()
    forget, retain = (with_outputs(many, part) for part in split(*points(), [2, 3], 9))
    assert forget.outputs is not None
    assert forget.outputs.shape == (3, 2, CLASSES)
    forget = Examples(forget.inputs, forget.labels, forget.outputs - 0.5)
    before = {name: value.clone() for name, value in many.parameters.items()}
    after = unlearn(many, RULES[rule], forget, retain, steps=7, lr=1e-2, batch_size=6)
    assert all(torch.equal(many.parameters[name], value) for name, value in before.items())
    assert not any(value.requires_grad for value in after.parameters.values())
    model = many.module
    model.load_state_dict(many.state(0))  # the first of a stack draws its rows as a single model does
    single = [Examples(part.inputs, part.labels, part.outputs[0]) for part in (forget, retain)]  # type: ignore[index]
    alone = unlearn(model, RULES[rule], single[0], single[1], steps=7, lr=1e-2, batch_size=6)
    for name, value in alone.state_dict().items():
        torch.testing.assert_close(after.state(0)[name], value, rtol=1e-4, atol=1e-5)


def test_matching_an_oracle_reaches_it() -> None:
    """In a linear model exact targets make every gradient vanish at the oracle, so there is no floor of noise."""
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(40, 4, generator=generator, dtype=torch.float64)
    model, oracle = (nn.Linear(4, CLASSES).double() for _ in range(2))
    labels = torch.zeros(40, dtype=torch.int64)
    forget, retain = (with_outputs(oracle, part) for part in split(inputs, labels, range(6), 12))
    after = unlearn(model, Matching(), forget, retain, steps=600, lr=0.2, batch_size=8)
    torch.testing.assert_close(after.state_dict(), oracle.state_dict(), rtol=0, atol=1e-6)


def test_datamodel_matching_takes_the_effects_off_its_own_logits() -> None:
    torch.manual_seed(0)
    model = nn.Linear(5, CLASSES)
    forget, retain = split(*points(), [1, 2], 5)
    shift = torch.tensor([1.0, -2.0, 0.5])
    after = datamodel_matching(
        model, forget, retain, shift.expand(2, -1), shift.expand(5, -1), steps=400, lr=0.1, batch_size=6
    )
    wanted = logits_of(model, retain.inputs) - shift
    torch.testing.assert_close(logits_of(after, retain.inputs), wanted, rtol=0, atol=1e-3)
    held = datamodel_matching(model, forget, retain, torch.zeros(2, CLASSES), steps=3, lr=0.1, batch_size=6)
    torch.testing.assert_close(held.state_dict(), model.state_dict())  # nothing to move: nothing moves


def test_the_split_is_drawn_from_the_others() -> None:
    inputs, labels = points()
    forget, retain = split(inputs, labels, [4, 9], 6, seed=1)
    assert torch.equal(forget.inputs, inputs[[4, 9]])
    assert len(retain) == 6
    assert not (retain.inputs[:, None] == inputs[[4, 9]]).all(-1).any()
    assert len(split(inputs, labels, [4, 9], 100)[1]) == ROWS - 2
    assert not torch.equal(split(inputs, labels, [4, 9], 6, seed=2)[1].inputs, retain.inputs)


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (range(12), "12 of 24 training rows must go, half or more"),
        ([3, 3], "row 3 is named 2 times"),
        ([24], "row 24 is not among the 24"),
    ],
)
def test_rows_that_cannot_go_are_refused(rows, message: str) -> None:
    with pytest.raises(InputError, match=message):
        split(*points(), rows, 5)


def test_what_cannot_be_trained_is_refused() -> None:
    torch.manual_seed(0)
    model = dense()
    forget, retain = split(*points(), [1, 5], 6)
    with pytest.raises(InputError, match="held against logits, and the examples have none"):
        unlearn(model, Matching(), forget, retain)
    with pytest.raises(InputError, match="wanted at least 1, at least 2, above 0"):
        unlearn(model, Finetune(), forget, retain, lr=0.0)
    with pytest.raises(InputError, match="at least 1 retained row"):
        split(*points(), [1, 5], 0)
    far = [Examples(part.inputs, part.labels, torch.full((len(part), CLASSES), 1e30)) for part in (forget, retain)]
    with pytest.raises(TrainingDiverged, match="diverged at step 1 of 60: the loss is inf"):
        unlearn(model, Matching(), far[0], far[1], steps=60, batch_size=4)
