import random

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.curate.conftest import ENTRIES, captions, rows_of

from palimpsest.core.errors import InputError
from palimpsest.curate import MetaCLIP, metaclip, pool
from palimpsest.curate.matching import pattern, spaced


def frame(rows):
    return pool.require_daft().from_pylist(rows)


def test_counts_probabilities_and_reasons_by_the_definition(entries):
    rows = [*captions(0, 400), {"text": None, "url": "u", "size": 1}]
    found = MetaCLIP(metadata=entries, threshold=30)(frame(rows)).to_pylist()
    matched = [[e for e, entry in enumerate(ENTRIES) if pattern(entry) in spaced(row["text"] or "")] for row in rows]
    counts = np.bincount([e for row in matched for e in row], minlength=len(ENTRIES))
    for row, old, entries_of in zip(found, rows, matched, strict=True):
        assert {name: row[name] for name in old} == old
        assert row["matched"] == entries_of
        missed = np.prod([1 - 30 / max(counts[e], 30) for e in entries_of])
        assert row["probability"] == pytest.approx(1 - missed, abs=1e-12)
        assert row["keep"] or row["probability"] < 1
        assert not (row["keep"] and row["probability"] == 0)
    reasons = {row["reason"]: row["probability"] for row in found}
    assert reasons["no text"] == reasons["no entry matches"] == 0
    assert reasons["names a rare concept"] == 1
    assert 0 < reasons["names frequent concepts only"] < 1


def test_the_published_loop_has_the_same_distribution():
    """Visit the entries in turn and keep at the first success (the official code) against the closed form."""
    rng = np.random.default_rng(0)
    chance = np.array([0.1, 0.5, 0.02, 1.0])
    rows = [[0], [0, 1], [2, 0, 1], [3, 0], []]
    loop = np.array([[any(rng.random() < chance[e] for e in row) for row in rows] for _ in range(20_000)])
    closed = metaclip.keep_probability(pa.array(rows, pa.list_(pa.uint32())), chance)
    assert closed == pytest.approx([0.1, 0.55, 1 - 0.98 * 0.9 * 0.5, 1, 0])
    assert loop.mean(0) == pytest.approx(closed, abs=4 * 0.5 / np.sqrt(20_000))


def test_what_is_kept_is_what_was_expected(entries):
    rows = captions(0, 20_000)
    method = MetaCLIP(metadata=entries, threshold=400)
    found = method(frame(rows)).to_pylist()
    probability = np.array([row["probability"] for row in found])
    kept = np.array([row["keep"] for row in found])
    sigma = np.sqrt((probability * (1 - probability)).sum())
    assert abs(kept.sum() - probability.sum()) < 4 * sigma
    for entry in range(4):
        inside = np.array([entry in row["matched"] for row in found])
        sigma = np.sqrt((probability[inside] * (1 - probability[inside])).sum())
        assert abs(kept[inside].sum() - probability[inside].sum()) <= 4 * sigma
        assert probability[inside].sum() <= inside.sum()
    other = np.array(
        [row["keep"] for row in MetaCLIP(metadata=entries, threshold=400, seed=1)(frame(rows)).to_pylist()]
    )
    both = (kept & other).sum()  # another seed draws independently
    assert abs(both - (probability**2).sum()) < 5 * np.sqrt((probability**2 * (1 - probability**2)).sum())


def test_draws_follow_the_row_not_its_place(entries):
    rows = captions(0, 800)
    method = MetaCLIP(metadata=entries, threshold=20)
    kept = {row["url"] for row in method(frame(rows)).to_pylist() if row["keep"]}
    random.Random(0).shuffle(rows)
    assert {row["url"] for row in method(frame(rows)).to_pylist() if row["keep"]} == kept
    same = [{**row, "size": 0} for row in rows]  # under an ID other columns may change
    by_id = MetaCLIP(metadata=entries, threshold=20, id="url")
    kept = {row["url"] for row in by_id(frame(rows)).to_pylist() if row["keep"]}
    assert {row["url"] for row in by_id(frame(same)).to_pylist() if row["keep"]} == kept


def test_rows_with_nested_and_missing_values_can_be_told_apart(entries):
    rows = [{"text": "dog", "tags": [str(n)] if n % 2 else None, "more": {"n": n}} for n in range(400)]
    found = MetaCLIP(metadata=entries, threshold=200)(frame(rows)).to_pylist()
    assert 140 < sum(row["keep"] for row in found) < 260


@settings(max_examples=50, deadline=None)
@given(st.lists(st.integers(0, 10**12), min_size=1, max_size=60).filter(any), st.floats(0.001, 0.999))
def test_the_threshold_is_the_count_whose_cumulated_share_is_nearest(counts, share):
    found = metaclip.tail_threshold(np.array(counts, np.uint64), share)
    ordered = sorted(counts)
    distance = [abs(sum(ordered[: n + 1]) / sum(counts) - share) for n in range(len(ordered))]
    assert any(
        max(1, count) == found and gap <= min(distance) + 1e-12 for count, gap in zip(ordered, distance, strict=True)
    )


def test_extreme_thresholds():
    counts = np.array([0, 1, 10, 2**40], np.uint64)
    assert metaclip.chances(counts, 2**50).tolist() == [1, 1, 1, 1]
    assert metaclip.chances(counts, 1).tolist() == [1, 1, 0.1, 2.0**-40]
    assert counts.tolist() == [0, 1, 10, 2**40]
    with pytest.raises(InputError, match="at least 1"):
        metaclip.chances(counts, 0)


def test_online_balancing_draws_afresh_every_epoch():
    probability = np.full(10_000, 0.3)
    first, again, second = (metaclip.resample(probability, 0, epoch) for epoch in (0, 0, 1))
    assert (first == again).all()
    assert abs((first & second).mean() - 0.09) < 0.02
    assert abs(first.mean() - 0.3) < 0.02


def test_a_run_tells_what_came_of_it(entries, write_pool, tmp_path):
    from palimpsest.curate import run

    result = run(MetaCLIP(metadata=entries), write_pool(), tmp_path / "out", workers=1, progress="")
    notes = result.notes
    found = rows_of(tmp_path / "out")
    assert (result.rows, result.kept) == (1200, sum(row["keep"] for row in found))
    assert notes["numbers"]["never"] == 1
    assert notes["numbers"]["expected"] == pytest.approx(sum(row["probability"] for row in found))
    dogs = [row for row in found if 0 in row["matched"]]
    assert ["dog", len(dogs), sum(row["keep"] for row in dogs)] in notes["tables"][0]["rows"]
    assert notes["warnings"] == []
    (curve,) = notes["curves"]
    assert curve["series"]["before"] == sorted(curve["series"]["before"], reverse=True)
    assert all(before >= kept for before, kept in zip(*curve["series"].values(), strict=True))
    facts = pa.parquet.read_table(tmp_path / "out" / "facts.parquet")
    assert facts["count"].type == pa.uint64()


def test_identical_rows_are_told(entries):
    method = MetaCLIP(metadata=entries, threshold=10)
    rows = [{"text": "dog"}] * 500
    found = method(frame(rows)).to_pylist()
    assert len({row["keep"] for row in found}) == 1
    facts = method.gather([method.survey(frame(rows)).to_arrow()])
    totals = {
        "rows": 500,
        "kept": sum(row["keep"] for row in found),
        "probability": sum(row["probability"] for row in found),
    }
    assert "many rows of the pool are identical" in method.notes(facts, [], {**totals, "kept": 500})["warnings"][0]
    assert method.notes(facts, [], {**totals, "kept": 12})["warnings"] == []


def test_without_a_list_the_pools_own_words_serve(write_pool, tmp_path):
    from palimpsest.curate import run

    result = run(MetaCLIP(), write_pool(), tmp_path / "out", workers=1, progress="")
    entries = {entry for entry, *_ in result.notes["tables"][0]["rows"]}
    assert {"dog", "party", "sleeps"} <= entries
    assert "IMG_2" not in entries
    assert result.kept > 0


def test_bad_input(entries):
    with pytest.raises(InputError, match="no column 'caption'; found 'text', 'url', 'size'"):
        MetaCLIP(metadata=entries, text="caption")(frame(captions(0, 3)))
    with pytest.raises(InputError, match="the column 'size' holds Int64; wanted strings"):
        MetaCLIP(metadata=entries, text="size")(frame(captions(0, 3)))
    with pytest.raises(InputError, match="no column 'uid' to tell rows apart"):
        MetaCLIP(metadata=entries, id="uid")(frame(captions(0, 40)))
    with pytest.raises(InputError, match="already has a column 'keep'"):
        MetaCLIP(metadata=entries)(frame([{"text": "dog", "keep": 1}]))
    with pytest.raises(InputError, match="no text of the pool names any entry"):
        MetaCLIP(metadata=entries)(frame([{"text": "nothing"}]))
    with pytest.raises(InputError, match="no such file; wanted a list"):
        MetaCLIP(metadata="nowhere.txt")(frame(captions(0, 3)))
    with pytest.raises(InputError, match="wanted metadata"):
        MetaCLIP()(frame(captions(0, 3)))
    with pytest.raises(InputError, match="tail must lie between"):
        MetaCLIP(tail=1.0)
    with pytest.raises(InputError, match="threshold must be at least 1"):
        MetaCLIP(threshold=-1)
