import dataclasses
import json
import os
import shutil
import signal
import subprocess
import sys
import time

import pyarrow.parquet
import pytest
from tests.curate.conftest import captions, files_of, rows_of, write_lines, write_parquet

from palimpsest import cli
from palimpsest.core.errors import InputError
from palimpsest.curate import MetaCLIP, engine, pool, run


def keep_short(frame):
    """A method of one pass, as a user would write it."""
    short = pool.require_daft().functions.length(frame["text"]) < 15
    return frame.with_columns({"keep": short, "score_length": pool.require_daft().functions.length(frame["text"])})


@dataclasses.dataclass(frozen=True)
class Dropping:
    def __call__(self, frame):
        return keep_short(frame).select("text", "keep")


def test_any_function_of_a_frame_is_a_method(write_pool, tmp_path):
    result = run(keep_short, write_pool(), tmp_path / "out", workers=1, progress="")
    found = rows_of(tmp_path / "out")
    assert [row["size"] for row in found] == list(range(1200))
    assert all(row["keep"] == (len(row["text"]) < 15) == (row["score_length"] < 15) for row in found)
    assert result.kept == sum(row["keep"] for row in found)
    assert result.sums["score_length"] == sum(row["score_length"] for row in found)
    assert result.method == {"name": "keep_short", "paper": "", "config": {}}
    assert "of 1,200 rows kept" in str(result)
    assert json.loads((tmp_path / "out" / "curation.json").read_text())["rows"] == 1200


def test_a_method_may_not_drop_columns_or_add_nothing(write_pool, tmp_path):
    with pytest.raises(RuntimeError, match="dropped the user's columns url, size"):
        run(Dropping(), write_pool(), tmp_path / "out", workers=1, progress="")
    with pytest.raises(RuntimeError, match="added no keep, weight or score_"):
        run(lambda frame: frame, tmp_path / "pool", tmp_path / "out", workers=1, progress="")


class Half:
    def survey(self, frame):
        return frame

    def __call__(self, frame):
        return keep_short(frame)


def test_a_surveyor_that_lacks_a_part_is_refused(write_pool, tmp_path):
    with pytest.raises(TypeError, match="Half has survey, but no gather, judge, review, notes"):
        run(Half(), write_pool(), tmp_path / "out", workers=1, progress="")


def test_only_kept_rows(entries, write_pool, tmp_path):
    method = MetaCLIP(metadata=entries, threshold=20)
    run(method, write_pool(), tmp_path / "all", workers=1, progress="")
    run(method, tmp_path / "pool", tmp_path / "kept", workers=1, only_kept=True, progress="")
    assert [row for row in rows_of(tmp_path / "all") if row["keep"]] == rows_of(tmp_path / "kept")


def test_processes_and_row_groups_do_not_change_the_result(entries, write_pool, tmp_path):
    method = MetaCLIP(metadata=entries, threshold=20)
    where = write_pool(shards=3)
    write_parquet(where / "large.parquet", captions(900, 200), group=60)
    run(method, where, tmp_path / "one", workers=1, progress="")
    run(method, where, tmp_path / "two", workers=2, progress="")
    assert files_of(tmp_path / "one") == files_of(tmp_path / "two")
    run(method, where, tmp_path / "cut", workers=1, shard_rows=100, progress="")
    kept = [{row["url"] for row in rows_of(tmp_path / out) if row["keep"]} for out in ("one", "cut")]
    assert kept[0] == kept[1]


def test_what_is_unchanged_is_not_done_again(entries, write_pool, tmp_path):
    where, out, method = write_pool(), tmp_path / "out", MetaCLIP(metadata=entries, threshold=20)

    def done():
        return run(method, where, out, workers=1, progress="").done

    assert [done(), done()] == [4, 0]
    first = files_of(out)
    shutil.rmtree(out / ".work" / "survey")
    next((out / "data").glob("part2*")).unlink()
    assert done() == 1
    assert files_of(out) == first
    write_parquet(where / "part1.parquet", captions(5000, 10))  # counts change, and with them every row's probability
    assert [done(), done()] == [4, 0]
    (where / "part3.parquet").unlink()
    done()
    assert len(list((out / "data").iterdir())) == 3
    method = dataclasses.replace(method, threshold=21)
    assert [done(), done()] == [3, 0]
    with open(entries, "a") as handle:
        handle.write("party\n")
    assert [done(), done()] == [3, 0]


SCRIPT = """
import sys
from palimpsest.curate import MetaCLIP, run
run(MetaCLIP(metadata=sys.argv[1], threshold=20), sys.argv[2], sys.argv[3], workers=int(sys.argv[4]), progress="")
"""


@pytest.mark.parametrize("workers", [1, 2])
@pytest.mark.parametrize("after", ["survey", "records"])
def test_killed_at_any_moment_it_goes_on(entries, write_pool, tmp_path, workers, after):
    where, out, method = write_pool(shards=6), tmp_path / "out", MetaCLIP(metadata=entries, threshold=20)
    process = subprocess.Popen([sys.executable, "-c", SCRIPT, entries, str(where), str(out), str(workers)])
    watched = out / ".work" / after
    while process.poll() is None and len(list(watched.glob("[!.]*")) if watched.exists() else []) < 2:
        time.sleep(0.001)
    process.send_signal(signal.SIGKILL)
    process.wait()
    finished = {path: path.stat().st_mtime_ns for path in watched.glob("[!.]*")}
    assert finished
    result = run(method, where, out, workers=1, progress="")
    assert result.done <= 6 - (after == "records") * len(finished)
    assert finished == {path: path.stat().st_mtime_ns for path in finished}
    run(method, where, tmp_path / "whole", workers=1, progress="")
    assert files_of(out) == files_of(tmp_path / "whole")
    assert not list(out.rglob("*.part"))


def test_a_broken_shard_is_named_and_stops_or_is_skipped(entries, write_pool, tmp_path):
    where, method = write_pool(), MetaCLIP(metadata=entries, threshold=20)
    write_lines(where / "part2a.jsonl", captions(0, 5))
    with open(where / "part2a.jsonl", "a") as handle:
        handle.write('{"text": \n')
    whole = (where / "part1.parquet").read_bytes()
    (where / "part1b.parquet").write_bytes(whole[: len(whole) // 2])
    write_lines(where / "part4.jsonl", [{"caption": "a dog"}])
    with pytest.raises(InputError, match=r"part1b.parquet: not a readable parquet file"):
        run(method, where, tmp_path / "out", workers=1, progress="")
    result = run(method, where, tmp_path / "out", workers=1, broken="skip", progress="")
    assert [fault["source"].rsplit("/")[-1] for fault in result.broken] == [
        "part1b.parquet",
        "part2a.jsonl",
        "part4.jsonl",
    ]
    assert "part2a.jsonl:6: not valid JSON" in result.broken[1]["error"]
    assert "no column 'text'; found 'caption'" in result.broken[2]["error"]
    assert str(result).count("skipped: ") == 3
    assert result.rows == 1200
    with pytest.raises(InputError, match=r"part2a.jsonl:6: not valid JSON"):
        run(method, where / "part2a.jsonl", tmp_path / "none", workers=1, broken="skip", progress="")


def test_the_command_stops_at_a_broken_shard_or_skips_it(entries, write_pool, tmp_path, capsys):
    write_lines(write_pool(shards=1) / "odd.jsonl", [{"caption": "a dog"}])
    files, out = sorted(map(str, (tmp_path / "pool").iterdir())), tmp_path / "out"
    command = ["curate", "metaclip", *files, "--out", str(out), "--metadata", entries, "--workers", "1"]
    assert cli.main(command) == 2
    assert "odd.jsonl: no column 'text'; found 'caption'" in capsys.readouterr().err
    assert not (out / "curation.json").exists()
    assert cli.main([*command, "--broken", "skip"]) == 0
    assert "skipped: " in capsys.readouterr().err
    assert "odd.jsonl: no column" in (out / "report.html").read_text()
    assert len(rows_of(out)) == 300


def test_data_that_is_damaged_inside_is_found_when_it_is_read(entries, write_pool, tmp_path):
    where = write_pool()
    raw = bytearray((where / "part1.parquet").read_bytes())
    raw[4:60] = os.urandom(56)
    (where / "part1.parquet").write_bytes(raw)
    with pytest.raises(InputError, match=r"part1.parquet: not a readable parquet file"):
        run(MetaCLIP(metadata=entries, threshold=20), where, tmp_path / "out", workers=1, progress="")


def test_small_and_odd_pools(entries, tmp_path):
    write_lines(tmp_path / "one.jsonl", [{"text": "a dog"}])
    assert run(MetaCLIP(metadata=entries), tmp_path / "one.jsonl", tmp_path / "out", progress="").kept == 1
    write_parquet(tmp_path / "two.parquet", captions(0, 100))
    empty = pyarrow.parquet.read_table(tmp_path / "two.parquet").slice(0, 0)
    pyarrow.parquet.write_table(empty, tmp_path / "empty.parquet")
    result = run(MetaCLIP(metadata=entries), tmp_path / "*.parquet", tmp_path / "out", workers=1, progress="")
    assert (result.rows, result.shards) == (100, 2)


def test_bad_input(entries, write_pool, tmp_path):
    where, method = write_pool(), MetaCLIP(metadata=entries)
    with pytest.raises(InputError, match="'stop' or 'skip'"):
        run(method, where, tmp_path / "out", broken="ignore")  # type: ignore[arg-type]
    with pytest.raises(InputError, match="holds some of the sources"):
        run(method, where, where)
    with pytest.raises(InputError, match="there is a file of this name"):
        run(method, where, entries)
    with pytest.raises(InputError, match="workers must be at least 1"):
        run(method, where, tmp_path / "out", workers=0, progress="")


def test_an_unknown_method_file_and_version_change_the_key(entries, monkeypatch):
    method = MetaCLIP(metadata=entries)
    before = engine.method_key(method)
    assert engine.method_key(MetaCLIP(metadata=entries)) == before
    assert engine.method_key(MetaCLIP(metadata=entries, seed=1)) != before
    monkeypatch.setattr("palimpsest.__version__", "9.9")
    assert engine.method_key(method) != before


def test_a_ray_cluster_keeps_the_same_rows(entries, write_pool, tmp_path):
    pytest.importorskip("ray")
    where = write_pool(shards=3)
    method = MetaCLIP(metadata=entries, threshold=20)
    run(method, where, tmp_path / "here", workers=1, progress="")
    run(method, where, tmp_path / "there", ray="local", progress="")
    assert files_of(tmp_path / "here") == files_of(tmp_path / "there")
