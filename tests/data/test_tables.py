"""Synthetic tables: what they promise, their classes against a plain count, and their independence of order."""

from __future__ import annotations

import threading

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from palimpsest.core.errors import InputError
from palimpsest.data import causal
from palimpsest.data.ahead import ahead
from palimpsest.data.tables import IGNORE, TablePrior, Tables, classes_of, seen, with_categories


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 10_000), st.sampled_from([(8, 8), (8, 40), (2, 3)]), st.sampled_from([(2, 2), (3, 6), (2, 10)]))
def test_every_table_keeps_what_the_stream_promises(seed, shots, classes):
    stream = Tables(TablePrior((1, 5), classes), shots, queries=7, batch_size=6, seed=seed, block=2)
    batch = stream(seed % 5)
    x, y, present, count = batch["x"], batch["y"], batch["present"], batch["shots"]
    assert shots[0] <= count <= shots[1]
    assert x.shape == (6, count + 7, 5)
    assert x.dtype == torch.float32
    assert torch.isfinite(x).all()
    assert torch.equal((x != 0).any(1), present)
    assert present.any(1).all()
    mean, spread = x.mean(1)[present], x.std(1, correction=0)[present]
    torch.testing.assert_close(mean, torch.zeros_like(mean), atol=1e-3, rtol=0)
    torch.testing.assert_close(spread, torch.ones_like(spread), atol=1e-3, rtol=0)
    for labels in y.tolist():
        context = set(labels[:count])
        assert len(context) >= 2
        assert context <= set(range(classes[1]))
        assert set(labels[count:]) <= context | {IGNORE}


def test_a_batch_is_a_function_of_seed_and_step_alone():
    first, again = (Tables(batch_size=4, block=2, seed=3) for _ in range(2))
    order = [first(step) for step in (0, 1, 9, 2)]
    back = {step: again(step) for step in (2, 9, 1, 0)}
    for batch, step in zip(order, (0, 1, 9, 2), strict=True):
        assert batch["shots"] == back[step]["shots"]
        for name in ("x", "y", "present"):
            assert torch.equal(batch[name], back[step][name])
    assert not torch.equal(first(0)["x"], first(1)["x"])
    assert first.sha256 == again.sha256
    assert first.sha256 != Tables(batch_size=4, block=2, seed=4).sha256


def test_classes_are_counts_of_boundaries_below_and_numbered_at_random():
    rng = np.random.default_rng(0)
    target = rng.normal(size=(200, 30)).astype(np.float32)
    y = classes_of(rng, target, (2, 5))
    for values, labels in zip(target, y, strict=True):
        in_order = labels[values.argsort()]
        changes = int((np.diff(in_order) != 0).sum())
        assert changes == len(set(labels.tolist())) - 1  # a class is one stretch of the target
    assert set(y[:, 0].tolist()) == set(range(5))
    two = np.mean([labels.max() < 2 for labels in y])
    assert 0.4 < two < 0.9  # one half, one in four of the others, and those of which few classes are met
    lowest = y[np.arange(200), target.argmin(1)]
    assert 0.2 < np.mean(lowest == 0) < 0.6  # the lowest stretch is no particular class


def test_categories_are_coarser_copies_of_a_column_in_no_order():
    rng = np.random.default_rng(1)
    x = rng.normal(size=(300, 40, 4)).astype(np.float32)
    made = with_categories(rng, x, 1.0)
    changed = (made != x).any(1)
    assert 0.3 < changed.mean() < 0.7
    ordered = 0
    for table, column in zip(*np.nonzero(changed), strict=True):
        codes = made[table, :, column]
        levels = len(set(codes.tolist()))
        assert 1 <= levels <= 20
        in_order = codes[x[table, :, column].argsort()]
        assert (np.diff(in_order) != 0).sum() == levels - 1
        ordered += levels > 2 and bool((np.diff(in_order) >= 0).all())
    assert ordered < 0.2 * changed.sum()
    np.testing.assert_array_equal(with_categories(rng, x, 0.0), x)


def test_labels_of_the_control_do_not_depend_on_the_columns():
    """Its labels are those of the real stream, in another order."""
    real, control = Tables(seed=5, shots=(40, 40)), Tables(seed=5, shots=(40, 40), shuffled=True)

    def agreement(stream):
        """Of the nearest labelled row."""
        right = []
        for step in range(0, 40, 8):
            batch = stream(step)
            x, y = batch["x"].double(), batch["y"]
            nearest = torch.cdist(x[:, 40:], x[:, :40]).argmin(2)
            asked = y[:, 40:] != IGNORE
            right.append((y[:, :40].gather(1, nearest) == y[:, 40:])[asked].double())
        return torch.cat(right).mean().item()

    assert agreement(real) > agreement(control) + 0.1
    assert torch.equal(real(0)["x"], control(0)["x"])


@pytest.mark.parametrize("trees", [False, True])
@pytest.mark.parametrize("causes_are_columns", [False, True])
def test_a_causal_model_gives_each_model_rows_of_its_own(trees, causes_are_columns):
    form = causal.Shape(3, 2, 9, 3, causal=not (trees or causes_are_columns), trees=trees)
    x, target = causal.run(np.random.default_rng(0), form, 5, 50)
    assert x.shape == (5, 50, 3)
    assert target.shape == (5, 50)
    assert x.dtype == target.dtype == np.float32
    assert np.isfinite(x).all()
    assert np.isfinite(target).all()
    assert len(np.unique(target.std(1))) == 5


def test_every_activation_stays_finite_where_values_are_far_apart():
    wide = np.array([-1e4, -30, -1, 0, 1, 30, 1e4], dtype=np.float32)
    for activation in causal.ACTIVATIONS:
        with np.errstate(all="raise", under="ignore"):
            assert np.isfinite(activation(wide)).all()
    assert np.abs(causal.activated(np.random.default_rng(0), wide[None, :, None])).max() <= 1e4


def test_rows_are_marked_whose_class_no_shot_shows():
    found = seen(np.array([[0, 1, 1, 2, 0], [3, 0, 0, 0, 3]]), 2)
    np.testing.assert_array_equal(found, [[True, False, True], [True, True, True]])


def test_what_cannot_be_made_is_refused():
    with pytest.raises(InputError, match="classes must be two numbers from 2 up"):
        TablePrior(classes=(1, 3))
    with pytest.raises(InputError, match="columns must be two numbers from 1 up, the smaller first, not 4 and 2"):
        TablePrior(columns=(4, 2))
    with pytest.raises(InputError, match="shots must be two numbers from 2 up"):
        Tables(shots=(1, 8))
    with pytest.raises(InputError, match="must be at least 1"):
        Tables(queries=0)


def test_batches_made_ahead_are_those_of_the_source_in_any_order():
    stream = Tables(batch_size=2, block=1)
    made_in = set()

    def noted(step):
        made_in.add(threading.current_thread().name)
        return stream(step)

    with ahead(noted, depth=2) as batches:
        for step in (0, 1, 5, 2):
            assert torch.equal(batches(step)["x"], Tables(batch_size=2, block=1)(step)["x"])
    assert len(made_in) == 1
    assert threading.current_thread().name not in made_in
    with ahead(stream) as batches:
        assert batches.sha256 != batches.of.sha256
        with ahead(Tables(batch_size=2, block=1)) as same:
            assert batches.sha256 == same.sha256


def test_a_failure_of_the_source_reaches_the_one_who_asks():
    def broken(step):
        raise InputError(f"step {step}")

    with ahead(broken) as batches, pytest.raises(InputError, match="step 3"):
        batches(3)
