import json

import pytest

from palimpsest.core.errors import InputError
from palimpsest.report import curation


def result(**changes):
    samples = [
        {"probability": n / 40, "keep": n > 20, "reason": "rare" if n > 30 else "frequent", "text": f"row <{n}>"}
        for n in range(40)
    ]
    series = {"before": [1000, 50, 1], "kept": [90, 45, 0]}
    return {
        "method": {"name": "metaclip", "paper": "metaclip", "config": {"tail": 0.06}},
        "rows": 4000,
        "kept": 1900,
        "shards": 3,
        "done": 3,
        "seconds": 61.0,
        "reasons": {"rare": {"kept": 900}, "frequent": {"kept": 1000, "left out": 2100}},
        "sums": {},
        "samples": samples,
        "broken": [{"source": "/x/b.jsonl", "error": "/x/b.jsonl:17: not valid JSON"}],
        "notes": {
            "sentences": ["t is 5."],
            "warnings": ["Rows are identical."],
            "curves": [{"title": "Along the list", "x": [1, 10, 100], "series": series}],
            "tables": [{"caption": "Most frequent", "columns": ["entry", "texts"], "rows": [["<dog>", 1000]]}],
        },
        **changes,
    }


def page(tmp_path, **changes):
    (tmp_path / "curation.json").write_text(json.dumps(result(**changes)))
    return curation.write(tmp_path).read_text()


def test_the_page_says_what_was_kept_and_why(tmp_path):
    text = page(tmp_path)
    assert "1,900 of 4,000 rows kept (47.5%)." in text
    for wanted in ("t is 5.", "Rows are identical.", "2,100", "&lt;dog&gt;", "probability", "Along the list"):
        assert wanted in text
    assert "1 shard could not be used and was skipped" in text
    assert "/x/b.jsonl:17: not valid JSON" in text
    assert "<script" not in text
    assert "http" not in text.replace("http://www.w3.org", "")


def test_examples_are_those_nearest_the_line(tmp_path):
    text = page(tmp_path)
    kept, left = text.split("<h3>Left out</h3>")[0].split("<h3>Kept</h3>")[1], text.split("<h3>Left out</h3>")[1]
    assert "row &lt;21&gt;" in kept
    assert "row &lt;30&gt;" not in kept
    assert "row &lt;20&gt;" in left
    assert "row &lt;0&gt;" not in left


def test_a_method_that_only_weighs_has_no_sides(tmp_path):
    samples = [{"weight": n / 7, "text": "x"} for n in range(20)]
    text = page(tmp_path, reasons={"": {"kept": 4000}}, kept=4000, samples=samples, notes={}, broken=[])
    assert "4,000 rows weighed." in text
    assert "On both sides" not in text
    assert "Histogram of weight" in text


def test_curves_and_bars_stay_in_their_picture():
    drawn = curation._curve(result()["notes"]["curves"][0])
    assert drawn["lines"]["before"].split()[0] == "0.0,0.0"
    assert drawn["lines"]["kept"].split()[-1] == f"{curation._WIDTH}.0,{curation._HEIGHT}.0"
    (histogram,) = curation._histograms(result()["samples"])
    assert sum(bar["kept"] > 0 for bar in histogram["bars"]) == 12
    assert max(bar["kept"] + bar["left"] for bar in histogram["bars"]) == curation._HEIGHT


def test_bad_folders(tmp_path):
    with pytest.raises(InputError, match="no such file; wanted a folder written by curate"):
        curation.write(tmp_path)
    (tmp_path / "curation.json").write_text("{}")
    with pytest.raises(InputError, match="not the result of a curation"):
        curation.write(tmp_path)
