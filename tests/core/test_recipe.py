from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from palimpsest.core.recipe import SCHEDULES, Recipe, learning_rate


def rates(**settings) -> list[float]:
    return [learning_rate(step, steps=10, lr=1.0, **settings) for step in range(10)]


def test_the_schedules_by_hand():
    assert rates() == [1.0] * 10
    assert rates(warmup=4)[:5] == [0.25, 0.5, 0.75, 1.0, 1.0]
    assert rates(schedule="linear") == pytest.approx([1 - step / 10 for step in range(10)])
    assert rates(schedule="cosine")[5] == pytest.approx(0.5)
    assert rates(warmup=5, schedule="linear")[5:] == pytest.approx([1.0, 0.8, 0.6, 0.4, 0.2])


@given(st.integers(1, 50), st.data(), st.sampled_from(SCHEDULES))
def test_every_step_learns_and_none_more_than_asked(steps, data, schedule):
    warmup = data.draw(st.integers(0, steps))
    for step in range(steps):
        assert 0 < learning_rate(step, steps=steps, lr=0.3, warmup=warmup, schedule=schedule) <= 0.3 + 1e-12


def test_steps_belong_to_the_fingerprint_only_of_a_falling_schedule():
    def fingerprint(steps: int, schedule: str) -> dict:
        return Recipe(steps, 0.1, (0.9, 0.999), 0.0, 0, schedule, 1.0, 1, 0).fingerprint()

    assert fingerprint(5, "constant") == fingerprint(9, "constant")
    assert fingerprint(5, "cosine") != fingerprint(9, "cosine")
    assert math.isclose(fingerprint(5, "cosine")["lr"], 0.1)
