import gzip
import json

import pytest
from tests.curate.conftest import write_lines

from palimpsest.core.errors import InputError
from palimpsest.curate import tables


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    monkeypatch.setattr(tables, "_BLOCK", 64)  # so that every file is several blocks


def rows(path):
    frame = tables.frame(str(path))
    assert frame.schema().to_pyarrow_schema().names == frame.to_arrow().schema.names
    return frame.to_arrow().to_pylist()


def test_nothing_of_a_jsonl_is_lost(tmp_path):
    wanted = [{"text": f"row {n}", "n": n, "late": None, "mixed": str(n), "day": "2020-01-01"} for n in range(40)]
    wanted += [{"text": "é\n", "n": 0.5, "late": {"a": [1]}, "mixed": "x", "day": None}]
    written = [{key: value for key, value in row.items() if value is not None} for row in wanted]
    for row in written[:40]:
        row["mixed"] = int(row["mixed"])
    write_lines(tmp_path / "a.jsonl", written)
    assert rows(tmp_path / "a.jsonl") == wanted


def test_blank_lines_byte_order_marks_and_gzip(tmp_path):
    text = "\ufeff" + "".join(json.dumps({"text": f"row {n}"}) + "\n\n" for n in range(30)) + '{"text": "last"}'
    (tmp_path / "a.jsonl").write_text(text)
    with gzip.open(tmp_path / "a.jsonl.gz", "wt") as handle:
        handle.write(text)
    wanted = [{"text": f"row {n}"} for n in range(30)] + [{"text": "last"}]
    assert rows(tmp_path / "a.jsonl") == rows(tmp_path / "a.jsonl.gz") == wanted
    assert rows(f"file://{tmp_path}/a.jsonl.gz") == wanted


def test_csv_types_are_never_lossy(tmp_path):
    body = "".join(f'{n},0{n},{n}.5,"a, {n}\nb",\n' for n in range(30)) + "31,7,x,y,\n"
    (tmp_path / "a.csv").write_text("n,zip,mixed,text,none\n" + body)
    found = rows(tmp_path / "a.csv")
    assert found[3] == {"n": 3, "zip": "03", "mixed": "3.5", "text": "a, 3\nb", "none": None}
    assert len(found) == 31
    (tmp_path / "b.csv").write_text("a;b\n1,5;x\n")
    assert rows(tmp_path / "b.csv") == [{"a": "1,5", "b": "x"}]


def test_small_formats(tmp_path):
    (tmp_path / "a.json").write_text('[{"text": "x", "n": 1}, {"text": "y"}]')
    assert rows(tmp_path / "a.json") == [{"text": "x", "n": 1}, {"text": "y", "n": None}]
    (tmp_path / "a.txt").write_text("one\n\ntwo\n")
    assert rows(tmp_path / "a.txt") == [{"text": "one\n\ntwo"}]


def test_broken_files_are_named_with_the_line(tmp_path):
    good = '{"text": "abc"}\n'
    for name, text, message in [
        ("a.jsonl", good * 20 + '{"text": \n' + good, "a.jsonl:21: not valid JSON"),
        ("b.jsonl", good * 9 + "[1]\n", "b.jsonl:10: found list"),
        ("c.jsonl", "\n\n", "c.jsonl: the file is empty"),
        ("d.csv", "a,b\n" + "1,2\n" * 30 + "1,2,3\n", "d.csv:32: found 3 cells; wanted 2"),
        ("e.csv", "", "e.csv: the file is empty"),
        ("f.csv", "a,b\n", "f.csv: the file has no rows"),
    ]:
        (tmp_path / name).write_text(text)
        with pytest.raises(InputError, match=message.replace("[", r"\[")):
            tables.frame(str(tmp_path / name))
    (tmp_path / "g.jsonl").write_bytes(good.encode() * 9 + b'{"text": "\xff"}\n')
    with pytest.raises(InputError, match=r"g.jsonl:10: not UTF-8"):
        tables.frame(str(tmp_path / "g.jsonl"))
    (tmp_path / "h.jsonl.gz").write_bytes(gzip.compress(good.encode() * 9)[:-9])
    with pytest.raises(InputError, match=r"h.jsonl.gz: not a whole gzip file"):
        tables.frame(str(tmp_path / "h.jsonl.gz"))
    with pytest.raises(InputError, match=r"nowhere.jsonl: cannot be read \(No such file"):
        tables.frame(str(tmp_path / "nowhere.jsonl"))
