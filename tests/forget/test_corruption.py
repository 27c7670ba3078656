from __future__ import annotations

import math

import pytest
import torch

from palimpsest.core.errors import InputError
from palimpsest.core.seeds import torch_rng
from palimpsest.forget.corruption import Corruption, zeroth_order

UNIT = 0.05


@pytest.fixture
def embedded() -> torch.Tensor:
    return torch.randn(5, 12, generator=torch.Generator().manual_seed(0)) * UNIT


@pytest.mark.parametrize("kind", ["noise", "shift", "set"])
@pytest.mark.parametrize("dims", [1, 4, 0])
def test_strong_kinds_against_float64(embedded: torch.Tensor, kind: str, dims: int) -> None:
    found = Corruption(kind, dims, strength=30.0, seed=7)(embedded, UNIT, "Who?")  # type: ignore[arg-type]
    draws = torch.randn(embedded.shape, generator=torch_rng(7, "corruption", "Who?")).double()
    expected = embedded.double().clone()
    for token in range(5):
        for place in range(dims or 12):
            draw = float(draws[token, place])
            added = 30.0 * UNIT * (math.copysign(1, draw) if kind == "shift" else draw)
            expected[token, place] = added + (0.0 if kind == "set" else float(embedded[token, place]))
    assert torch.allclose(found.double(), expected, atol=1e-6)
    assert torch.equal(found[:, dims or 12 :], embedded[:, dims or 12 :])


def test_where(embedded: torch.Tensor) -> None:
    order = embedded.abs().argsort(1)
    top, least = (Corruption("zero", 3, where)(embedded, UNIT, "") for where in ("top", "least"))  # type: ignore[arg-type]
    for token in range(5):
        assert {p for p in range(12) if top[token, p] == 0} == set(order[token, -3:].tolist())
        assert {p for p in range(12) if least[token, p] == 0} == set(order[token, :3].tolist())
    drawn = Corruption("flip", 3, "random", seed=1)(embedded, UNIT, "a")
    turned = (drawn == -embedded) & (embedded != 0)
    assert (turned == turned[0]).all(), "the same coordinates for every token"
    assert turned[0].sum() == 3
    assert torch.equal(Corruption("flip", 3, "random", seed=1)(embedded, UNIT, "b"), drawn)


def test_whole_tokens_are_reordered(embedded: torch.Tensor) -> None:
    assert torch.equal(Corruption("reverse")(embedded, UNIT, ""), embedded.flip(0))
    shuffled = Corruption("shuffle", seed=3)(embedded, UNIT, "a")
    assert not torch.equal(shuffled, embedded)
    assert torch.equal(shuffled.sort(0).values, embedded.sort(0).values)


def test_draws_depend_on_seed_and_prompt_alone(embedded: torch.Tensor) -> None:
    noise = Corruption("noise", 0, strength=1.0)
    assert torch.equal(noise(embedded, UNIT, "a"), noise(embedded.clone(), UNIT, "a"))
    assert not torch.equal(noise(embedded, UNIT, "a"), noise(embedded, UNIT, "b"))
    assert not torch.equal(
        noise(embedded, UNIT, "a"), Corruption("noise", 0, strength=1.0, seed=1)(embedded, UNIT, "a")
    )


def test_no_strength_changes_nothing(embedded: torch.Tensor) -> None:
    assert torch.equal(Corruption("noise", 0, strength=0.0)(embedded, UNIT, "a"), embedded)


def test_zeroth_order_follows_the_sheets_formula() -> None:
    asked: list[float] = []

    def loss(x: float) -> float:
        asked.append(x)
        return (x - 3) ** 2

    search = zeroth_order(loss, 1.0, probe=0.5, rate=0.25, steps=3, enough=0.0)
    expected, x = [], 1.0
    for _ in range(3):
        expected += [x + 0.5, x - 0.5]
        x -= 0.25 * ((x + 0.5 - 3) ** 2 - (x - 0.5 - 3) ** 2) / 1.0
    assert asked == pytest.approx(list(dict.fromkeys(expected))), "each point is looked at once"
    assert [point for point, _ in search.tried] == asked
    assert search.loss == min(value for _, value in search.tried) == pytest.approx((search.point - 3) ** 2)


def test_it_ends_when_it_is_good_enough_and_never_leaves_its_bounds() -> None:
    search = zeroth_order(lambda x: abs(x - 4), 1.0, probe=0.5, rate=2.0, steps=20, enough=0.6)
    assert search.loss <= 0.6
    assert len(search.tried) < 10
    bounded = zeroth_order(lambda x: -x, 1.0, highest=2.0, steps=5, enough=-10)
    assert max(point for point, _ in bounded.tried) == 2.0
    assert min(point for point, _ in zeroth_order(lambda x: x, 1.0, steps=5, enough=-1).tried) == 0.0


def test_a_plateau_is_left_by_a_wider_probe() -> None:
    assert zeroth_order(lambda x: float(x < 4), 1.0, probe=0.5, rate=4.0, steps=10).loss == 0.0


def test_bad_input() -> None:
    with pytest.raises(InputError, match="must not be below 0"):
        Corruption(strength=-1.0)
    with pytest.raises(InputError, match="must not be below 0"):
        Corruption(dims=-1)
    with pytest.raises(InputError, match="cannot be made"):
        zeroth_order(lambda x: x, 5.0, highest=2.0)
