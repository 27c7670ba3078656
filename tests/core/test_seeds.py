from __future__ import annotations

import hashlib
import random

import numpy as np
import torch
from hypothesis import given
from hypothesis import strategies as st

from palimpsest.core.seeds import derive, numpy_rng, seed_everything, torch_rng


@given(st.integers(), st.text(), st.integers())
def test_a_derived_seed_is_a_function_of_its_names(seed, name, counter):
    assert 0 <= derive(seed, name, counter) < 2**63
    assert derive(seed, name, counter) == derive(seed, name, counter)
    assert len({derive(seed, name, counter), derive(seed, name, counter + 1), derive(seed + 1, name, counter)}) == 3


def test_the_derivation_never_changes():
    expected = int.from_bytes(hashlib.sha256(b"(0, 'batches', 3)").digest()[:8], "big") >> 1
    assert derive(0, "batches", 3) == expected


def test_generators_repeat_and_do_not_touch_the_global_ones():
    seed_everything(1)
    before = torch.get_rng_state()
    assert (numpy_rng(0, "a").random(3) == numpy_rng(0, "a").random(3)).all()
    assert torch.equal(torch.rand(3, generator=torch_rng(0, "a")), torch.rand(3, generator=torch_rng(0, "a")))
    assert not np.array_equal(numpy_rng(0, "a").random(3), numpy_rng(0, "b").random(3))
    assert torch.equal(before, torch.get_rng_state())


def test_seed_everything_sets_all_three():
    def draw() -> tuple[float, float, float]:
        return random.random(), float(np.random.rand()), float(torch.rand(()))

    seed_everything(3, "step", 1)
    first = draw()
    torch.manual_seed(derive(3, "step", 1))
    assert float(torch.rand(())) == first[2]  # the same numbers as torch's own way to seed
    seed_everything(3, "step", 1)
    assert draw() == first
    seed_everything(3, "step", 2)
    assert all(a != b for a, b in zip(draw(), first, strict=True))
