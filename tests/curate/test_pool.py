import os

import pytest
from tests.curate.conftest import captions, write_lines, write_parquet

from palimpsest.core.errors import InputError
from palimpsest.curate import pool


def test_one_file_is_one_shard_and_each_comes_once(tmp_path):
    write_lines(tmp_path / "b.jsonl", captions(0, 3))
    write_parquet(tmp_path / "a.parquet", captions(3, 3))
    (tmp_path / "notes.md").write_text("not data")
    shards = pool.shards([tmp_path, tmp_path / "*.parquet"])
    assert [shard.name[:2] for shard in shards] == ["a-", "b-"]
    assert pool.read(tmp_path).count_rows() == 6


def test_large_parquet_files_are_cut_at_row_groups(tmp_path):
    write_parquet(tmp_path / "a.parquet", captions(0, 100), group=15)
    shards = pool.shards(tmp_path, rows=40)
    assert [shard.row_groups for shard in shards] == [(0, 1), (2, 3), (4, 5, 6)]
    assert [row["size"] for shard in shards for row in shard.frame().to_pylist()] == list(range(100))


def test_a_shard_keeps_its_name_when_files_join_and_its_stamp_until_the_file_changes(tmp_path):
    write_lines(tmp_path / "b.jsonl", captions(0, 3))
    (before,) = pool.shards(tmp_path)
    write_lines(tmp_path / "a.jsonl", captions(3, 3))
    assert pool.shards(tmp_path)[1] == before
    write_lines(tmp_path / "b.jsonl", captions(1, 3))
    changed = pool.shards(tmp_path)[1]
    assert (changed.name, changed.stamp != before.stamp) == (before.name, True)


def test_urls_are_listed_like_paths(tmp_path):
    (tmp_path / "x").mkdir()
    write_parquet(tmp_path / "x" / "a.parquet", captions(0, 30), group=10)
    write_lines(tmp_path / "x" / "b.jsonl", captions(30, 3))
    for url, rows in [("x", 33), ("x/*.parquet", 30), ("x/b.jsonl", 3), ("*/a.*", 30)]:
        assert pool.read(f"file://{tmp_path}/{url}").count_rows() == rows, url
    assert len(pool.shards(f"file://{tmp_path}/x/a.parquet", rows=10)) == 3
    with pytest.raises(InputError, match="no file that ends in"):
        pool.shards(f"file://{tmp_path}/x/*.csv")
    with pytest.raises(InputError, match="cannot be listed"):
        pool.shards(f"file://{tmp_path}/nowhere")


def test_bad_sources(tmp_path):
    with pytest.raises(InputError, match="no source"):
        pool.shards([])
    with pytest.raises(InputError, match="no such file"):
        pool.shards(tmp_path / "a.jsonl")
    with pytest.raises(InputError, match="read from files"):
        pool.shards("hf:org/name")


def test_daft_sends_no_usage_statistics():
    pool.require_daft()
    assert os.environ["DAFT_ANALYTICS_ENABLED"] == "0"
