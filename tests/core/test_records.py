from __future__ import annotations

import csv
import json

import pytest

from palimpsest.core.errors import InputError
from palimpsest.core.records import Evidence, Measurement, environment


def evidence() -> Evidence:
    verbatim = Measurement(
        "verbatim",
        "forget",
        0.9,
        0.1,
        0.2,
        0.05,
        0.15,
        3,
        "reference",
        values=(0.1, 0.2, 0.0),
        before_values=(0.9, 1.0),
    )
    privacy = Measurement("privacy_leakage", "privacy", None, None, better="zero", note="needs a retrained reference")
    return Evidence(
        kind="forget",
        measurements=(verbatim, privacy),
        method={"name": "npo", "paper": "knowledge_unlearning", "config": {"beta": 0.1}},
        model={"before": {"source": "a", "sha256": "0"}},
        data={"forget": {"rows": 3, "sha256": "1"}},
        seconds=1.25,
        extras={"verdict": "forgotten"},
    )


def test_evidence_survives_the_disk_with_its_records(tmp_path):
    written = evidence()
    written.write(tmp_path)
    read = Evidence.read(tmp_path)
    assert read == written
    assert read["verbatim"].values == (0.1, 0.2, 0.0)
    assert read["verbatim"].before_values == (0.9, 1.0)
    assert read["privacy_leakage"].values == ()
    with pytest.raises(KeyError):
        read["utility"]


def test_the_tables_hold_a_line_a_measurement_and_a_line_a_record(tmp_path):
    evidence().write(tmp_path)
    with (tmp_path / "measurements.csv").open() as handle:
        rows = list(csv.DictReader(handle))
    assert [(row["name"], row["after"]) for row in rows] == [("verbatim", "0.1"), ("privacy_leakage", "")]
    with (tmp_path / "records.csv").open() as handle:
        assert len(list(csv.DictReader(handle))) == 3


def test_evidence_without_records_is_read_too(tmp_path):
    evidence().write(tmp_path)
    (tmp_path / "records.csv").unlink()
    assert Evidence.read(tmp_path)["verbatim"].values == ()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "no such file"),
        ("{", "not valid JSON"),
        ("{}", "not an evidence file"),
        ('{"measurements": [{"n": 1}]}', "not an evidence file"),
    ],
)
def test_what_is_no_evidence_is_an_input_error(content, message, tmp_path):
    if content is not None:
        (tmp_path / "evidence.json").write_text(content)
    with pytest.raises(InputError, match=message):
        Evidence.read(tmp_path)


def test_a_number_that_is_not_finite_is_not_written(tmp_path):
    broken = Evidence("forget", (Measurement("x", "g", 0.0, float("nan")),), {}, {}, {})
    with pytest.raises(ValueError):
        broken.write(tmp_path)
    assert not (tmp_path / "evidence.json").exists()


def test_the_environment_is_plain_json():
    assert json.loads(json.dumps(environment()))["packages"]["torch"]
