from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from palimpsest.core.errors import InputError
from palimpsest.data.batches import IGNORE, Batch, Batches, Encoded, Packed, Together, count_tokens, share, to_device


def table(lengths: list[int], starts: list[int] | None = None) -> Encoded:
    """Row r holds the tokens 100 r + 1, 100 r + 2, ...: every token says where it is from."""
    ids = tuple(np.arange(length, dtype=np.int64) + 100 * row + 1 for row, length in enumerate(lengths))
    return Encoded(ids, tuple(starts or [1] * len(lengths)), pad_id=0)


lengths = st.lists(st.integers(2, 30), min_size=1, max_size=40)


def test_a_batch_is_right_padded_and_scores_only_after_the_prompt():
    batch = table([4, 2], starts=[2, 1]).batch([0, 1])
    assert batch.input_ids.tolist() == [[1, 2, 3, 4], [101, 102, 0, 0]]
    assert batch.labels.tolist() == [[IGNORE, IGNORE, 3, 4], [IGNORE, 102, IGNORE, IGNORE]]
    assert batch.attention_mask is not None
    assert batch.attention_mask.tolist() == [[1, 1, 1, 1], [1, 1, 0, 0]]
    assert batch.targets.tolist() == [[IGNORE, 3, 4], [102, IGNORE, IGNORE]]
    assert (batch.total_rows, batch.total_tokens, batch.position_ids) == (2, 3, None)


def test_the_first_token_is_never_scored():
    assert table([3], starts=[0]).batch([0]).labels.tolist() == [[IGNORE, 2, 3]]


@given(lengths=lengths, batch_size=st.integers(1, 50), seed=st.integers(0, 3))
@settings(max_examples=60, deadline=None)
def test_after_whole_windows_every_row_has_come_equally_often(lengths: list[int], batch_size: int, seed: int):
    batches = Batches(table(lengths), batch_size, seed)
    window = min(32, max(1, len(lengths) // batch_size))
    counts = Counter(dict.fromkeys(range(len(lengths)), 0))
    for step in range(3 * window):
        rows = batches.rows(step)
        assert len(rows) == batch_size
        counts.update(rows.tolist())
    assert set(counts) == set(range(len(lengths)))
    assert max(counts.values()) - min(counts.values()) <= 1


@given(lengths=lengths, batch_size=st.integers(1, 8), order=st.permutations(range(12)))
@settings(max_examples=40, deadline=None)
def test_a_step_does_not_depend_on_the_steps_before(lengths: list[int], batch_size: int, order: list[int]):
    forward = [Batches(table(lengths), batch_size, 5).rows(step).tolist() for step in range(12)]
    batches = Batches(table(lengths), batch_size, 5)
    assert {step: batches.rows(step).tolist() for step in order} == dict(enumerate(forward))


def test_the_seed_changes_the_order():
    encoded = table([5] * 200)
    assert Batches(encoded, 10, 0).rows(0).tolist() != Batches(encoded, 10, 1).rows(0).tolist()
    assert Batches(encoded, 10, 0).rows(0).tolist() == Batches(encoded, 10, 0).rows(0).tolist()


def test_a_small_table_does_not_repeat_rows_in_a_batch():
    batches = Batches(table(list(range(2, 26))), batch_size=6)  # 4 steps an epoch, far less than 32 batches
    for step in range(40):
        assert len(set(batches.rows(step).tolist())) == 6


def test_batch_mates_change_from_epoch_to_epoch():
    batches = Batches(table(list(range(20, 44))), batch_size=6)
    assert len({frozenset(batches.rows(step).tolist()) for step in range(40)}) > 20


def test_rows_of_similar_length_come_together():
    rng = np.random.default_rng(0)
    encoded = table(rng.integers(2, 100, size=640).tolist())
    batches = Batches(encoded, batch_size=16)
    padded = sum(batches(step).input_ids.numel() for step in range(40))
    shuffled = sum(encoded.batch(rows).input_ids.numel() for rows in rng.permutation(640).reshape(40, 16))
    real = int(encoded.lengths.sum())
    assert padded - real < 0.35 * (shuffled - real)


@given(lengths=st.lists(st.integers(1, 20), min_size=4, max_size=20), shares=st.integers(1, 4), data=st.data())
@settings(max_examples=60, deadline=None)
def test_shares_sum_to_the_whole(lengths: list[int], shares: int, data: st.DataObject):
    starts = [data.draw(st.integers(0, length)) for length in lengths]
    whole = table(lengths, starts).batch(range(len(lengths)))
    parts = [whole.share(index, shares) for index in range(shares)]
    assert sorted(row for part in parts for row in part.rows.tolist()) == list(range(len(lengths)))
    for part in parts:
        assert (part.total_rows, part.total_tokens) == (whole.total_rows, whole.total_tokens)
        assert part.attention_mask is not None
        assert bool(part.attention_mask.any(0).all())  # no column of padding alone
    assert sum(int((part.labels != IGNORE).sum()) for part in parts) == whole.total_tokens
    weights = torch.arange(2500, dtype=torch.float64).sin()

    def loss(batch: Batch) -> float:
        targets = batch.targets[batch.targets != IGNORE]
        return float(weights[targets].sum()) / max(batch.total_tokens, 1)

    assert sum(map(loss, parts)) == pytest.approx(loss(whole), abs=1e-12)


def test_a_share_of_a_share_keeps_the_totals_of_the_step():
    whole = table([3, 4, 5, 6]).batch(range(4))
    assert whole.share(1, 2).share(0, 2).rows.tolist() == [1]
    assert whole.share(1, 2).share(0, 2).total_tokens == whole.total_tokens


def test_too_many_shares_are_refused():
    with pytest.raises(InputError, match="a batch of 2 rows cannot be shared among 3"):
        table([3, 3]).batch([0, 1]).share(0, 3)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Batches(table([]), 4), "no rows"),
        (lambda: Batches(table([3]), 0), "batch_size must be at least 1"),
        (lambda: Batches(table([3, 4], starts=[3, 4]), 1), "every label is masked"),
        (lambda: Packed(table([]), 1, 8), "no rows"),
        (lambda: Packed(table([3]), 0, 8), "batch_size must be at least 1"),
        (lambda: Packed(table([3]), 1, 1), "length must be at least 2"),
        (lambda: Packed(table([3, 4], starts=[3, 4]), 1, 8), "every label is masked"),
    ],
)
def test_bad_batches_are_refused(make, message: str):
    with pytest.raises(InputError, match=message):
        make()


def test_by_length_covers_every_row_once_longest_first():
    encoded = table([3, 9, 5, 9, 2])
    assert [rows.tolist() for rows in encoded.by_length(2)] == [[1, 3], [2, 0], [4]]


def test_select_keeps_rows_and_changes_the_hash():
    encoded = table([3, 4, 5], starts=[1, 2, 3])
    picked = encoded.select([2, 0])
    assert [len(row) for row in picked.ids] == [5, 3]
    assert picked.starts == (3, 1)
    assert picked.sha256 != encoded.sha256
    assert encoded.select([0, 1, 2]).sha256 == encoded.sha256


@given(lengths=lengths, batch_size=st.integers(1, 3), length=st.integers(2, 40))
@settings(max_examples=60, deadline=None)
def test_packing_restarts_positions_and_masks_what_has_no_prediction(lengths: list[int], batch_size: int, length: int):
    encoded = table(lengths, [min(3, n - 1) for n in lengths])
    batch = Packed(encoded, batch_size, length)(2)
    assert batch.input_ids.shape == (batch_size, length)
    assert batch.attention_mask is None
    assert batch.position_ids is not None
    for ids, labels, positions in zip(batch.input_ids, batch.labels, batch.position_ids, strict=True):
        assert positions[0] == 0
        for place in range(length):
            row, offset = divmod(int(ids[place]) - 1, 100)
            if positions[place] == 0:
                assert labels[place] == IGNORE
                assert place == 0 or offset == 0  # inside a block only a document's beginning restarts
            else:
                assert int(ids[place]) == int(ids[place - 1]) + 1
            scored = positions[place] > 0 and offset >= encoded.starts[row]
            assert int(labels[place]) == (int(ids[place]) if scored else IGNORE)
    assert batch.total_tokens == int((batch.targets != IGNORE).sum())


def test_an_epoch_of_packs_reads_every_token_once_but_for_the_last_batch():
    encoded = table([7, 3, 11, 5, 9, 15])
    packed = Packed(encoded, batch_size=2, length=6)
    seen = Counter(
        token for step in range(packed.steps_per_epoch) for token in packed(step).input_ids.flatten().tolist()
    )
    assert set(seen.values()) == {1}
    assert len(seen) == 48  # of 50: what does not fill a batch is left to the next epoch
    assert packed(1).rows.tolist() == Packed(encoded, 2, 6)(1).rows.tolist()


def test_trees_are_shared_moved_and_counted():
    batch = table([3, 4]).batch([0, 1])
    tree = {"forget": batch, "extra": (torch.arange(4), [batch], "label")}
    half = share(tree, 1, 2)
    assert half["forget"].rows.tolist() == [1]
    assert half["extra"][0].tolist() == [1, 3]
    assert half["extra"][1][0].rows.tolist() == [1]
    assert half["extra"][2] == "label"
    assert share(tree, 0, 1) is tree
    assert to_device(tree, "meta")["extra"][1][0].labels.device.type == "meta"
    assert count_tokens({"forget": batch, "retain": batch}) == 14
    assert count_tokens((torch.arange(4), 3)) == 4


def test_together_reads_its_sources_side_by_side():
    forget, retain = Batches(table([3] * 4), 2), Batches(table([4] * 8), 2, seed=1)
    tree = Together(forget=forget, retain=retain, utility=None)(3)
    assert set(tree) == {"forget", "retain"}
    assert tree["retain"].rows.tolist() == retain(3).rows.tolist()


def test_every_batch_field_is_moved():
    moved = table([3]).batch([0]).to("meta")
    assert {value.device.type for value in vars(moved).values() if isinstance(value, torch.Tensor)} == {"meta"}
