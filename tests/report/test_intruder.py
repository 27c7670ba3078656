"""The section "What an attacker still gets": there when a battery was run, with its pictures, and signed with it."""

from __future__ import annotations

import json
import math

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from palimpsest.core.records import Evidence, Measurement
from palimpsest.report import certificate, html
from palimpsest.report.intruder import intruder


def _row(attack, share, power=True):
    bounds = {"low": share - 0.1, "high": share + 0.1, "floor": share - 0.1, "ceiling": share + 0.1}
    return {"attack": attack, "before": 0.9, "after": 0.5, "reference": 0.1, "share": share, **bounds, "power": power}


def _curve(*known):
    return {"steps": [0, 5, 10], "known": list(known)}


ATTACKS = {
    "verdict": "suppressed",
    "why": "rounding to 4 bits <b>brings</b> back 60%",
    "decided_by": "int4",
    "over_forgotten": True,
    "access": "open-weights",
    "held_against": "a reference that never knew",
    "rule": ["Suppressed: some attack brings it back."],
    "facts": 60,
    "subjects": 12,
    "table": [_row("asked", 0.0), _row("int4", 0.6), _row("probe", 0.1, power=False)],
    "traces": {
        "relearning": {
            "before": _curve(0.9, 0.9, 0.9),
            "after": _curve(0.1, 0.4, 0.6),
            "reference": _curve(0.1, 0.1, 0.2),
        },
        "probe": {"before": {"layers": [0.1, 0.9]}, "after": {"layers": [0.1, 0.5]}},
        "framed": {"after": {"frames": {}}},
    },
    "skipped": {"steering": "no layers that can be addressed"},
}
MEASURED = Measurement("recognition", "forget", 90.0, 12.0, 11.0, 8.0, 16.0, 60, "reference")


def evidence(**extras):
    return Evidence("forget", (MEASURED,), {"name": "npo"}, {}, {}, environment={}, extras=extras)


def test_the_section_says_what_was_found_and_shows_it(tmp_path):
    page = html.write(evidence(attacks=ATTACKS), tmp_path).read_text()
    assert "What an attacker still gets" in page
    assert "Suppressed, not removed" in page
    assert "&lt;b&gt;brings&lt;/b&gt;" in page
    found = intruder(evidence(attacks=ATTACKS))
    assert [figure["title"] for figure in found["figures"]] == ["Relearning on other forgotten facts", "Linear probe"]
    assert found["figures"][0]["rows"][-1] == ["10", "90.0", "60.0", "20.0"]
    assert found["table"]["rows"][0] == ["Rounded to 4 bits", "90%", "50%", "10%", "60%", "50% to 70%"]
    assert found["table"]["rows"][1][-2:] == ["no power", ""]
    for figure in found["figures"]:
        assert str(figure["svg"]) in page
        assert "reference" in figure["svg"] or len(figure["heads"]) == 3


def test_without_a_battery_there_is_no_section(tmp_path):
    assert intruder(evidence()) is None
    assert "attacker" not in html.write(evidence(), tmp_path).read_text()


def test_numbers_that_are_missing_are_dashes():
    lost = _row("lens", 0.2) | {"after": None, "share": math.nan, "low": None}
    assert intruder(evidence(attacks=ATTACKS | {"table": [lost]}))["table"]["rows"][0][2:] == [
        "\u2014",
        "10%",
        "\u2014",
        "",
    ]


def test_the_certificate_carries_the_verdict_and_notices_a_change(tmp_path):
    evidence(attacks=ATTACKS).write(tmp_path)
    path = certificate.sign(tmp_path, key=Ed25519PrivateKey.generate())
    signed = json.loads(path.read_text())
    assert signed["removal"]["verdict"] == "suppressed"
    assert signed["removal"]["rule"] == ATTACKS["rule"]
    assert all(check.ok for check in certificate.verify(tmp_path))
    changed = json.loads((tmp_path / "evidence.json").read_text())
    changed["extras"]["attacks"]["verdict"] = "removed"
    (tmp_path / "evidence.json").write_text(json.dumps(changed))
    failed = {check.name: check.detail for check in certificate.verify(tmp_path) if not check.ok}
    assert "removal" in failed["evidence"]


def test_without_a_battery_the_certificate_is_as_before(tmp_path):
    evidence().write(tmp_path)
    signed = json.loads(certificate.sign(tmp_path, key=Ed25519PrivateKey.generate()).read_text())
    assert "removal" not in signed
    assert all(check.ok for check in certificate.verify(tmp_path))
