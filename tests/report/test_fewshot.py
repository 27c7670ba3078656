from __future__ import annotations

import re

import pytest

from palimpsest.core.errors import InputError
from palimpsest.core.records import Evidence, Measurement
from palimpsest.report import fewshot


def evidence(**extras):
    values = tuple(float(v) for v in (70, 80, 90))
    measurement = Measurement("few_shot_accuracy", "few-shot", 60.0, 80.0, None, 68.7, 91.3, 3, "higher", values=values)
    queries = [
        {"at": [1.0, 0.0], "label": 0, "answer": 0},
        {"at": [-1.0, 0.5], "label": 1, "answer": 0},
        {"at": [0.0, 2.0], "label": 2, "answer": 2},
    ]
    shown = {
        "episode": {"way": 2, "shot": 1, "queries": 1, "nota": 0.0, "count": 3},
        "training": {"way": 8, "shot": 1, "queries": 1, "nota": 0.0},
        "curves": {"meta-training": [2.0, 1.0]},
        "confusions": [{"class": "b", "taken_for": "a", "share": 0.25}],
        "embedding": {
            "names": ["a <b>", "b"],
            "prototypes": [[1.0, 0.2], [-1.0, -0.2]],
            "queries": queries,
            "share": 1.0,
        },
    }
    parts = {"rows": 10, "classes": 2, "sha256": "0" * 64}
    return Evidence(
        kind="learn",
        measurements=(measurement,),
        method={"name": "protonet", "paper": "susana_distancia", "config": {"steps": 5}},
        model={"after": {"source": "learner", "sha256": "a" * 64}},
        data={"train_classes": parts, "test_classes": parts},
        seconds=3.0,
        extras={**shown, **extras},
    )


def test_the_page_says_what_the_numbers_say(tmp_path):
    page = fewshot.write(evidence(), tmp_path).read_text(encoding="utf-8")
    assert "80.0% of the queries answered right." in page
    assert "Guessing would be right in 50 percent." in page
    assert "Meta-training adds 20.0 points: without it the same comparison reaches 60.0." in page
    assert "a &lt;b&gt;" in page
    assert "a <b>" not in page
    assert "b, taken for a" in page
    assert "none of them, answered right" in page
    assert "2 of these 3 queries were answered right" in page
    assert not re.search(r'(src|href)="(?!#|data:)', page)


def test_the_picture_keeps_distances():
    found = fewshot._map(evidence().extras["embedding"])
    (a, b), _ = found["prototypes"], found["queries"]
    query = found["queries"][2]
    first = ((a["x"] - b["x"]) ** 2 + (a["y"] - b["y"]) ** 2) ** 0.5 / (4 + 0.16) ** 0.5
    second = ((a["x"] - query["x"]) ** 2 + (a["y"] - query["y"]) ** 2) ** 0.5 / (1 + 1.8**2) ** 0.5
    assert first == pytest.approx(second, rel=0.01)
    assert all(0 <= spot["x"] <= 720 and 0 <= spot["y"] <= 460 for spot in (*found["prototypes"], *found["queries"]))
    assert len({(p["colour"], p["shape"]) for p in found["prototypes"]}) == 2


def test_other_evidence_is_refused(tmp_path):
    plain = evidence()
    with pytest.raises(InputError, match="not of a few-shot learner"):
        fewshot.write(Evidence("audit", plain.measurements, plain.method, plain.model, plain.data), tmp_path)
