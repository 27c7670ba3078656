"""A results file as `palimpsest reproduce` writes it, with a note that would be markup if it were not escaped."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

FRONTIER = "<script>alert(1)</script>"


def line(paper: str = "muse", verdict: str = "holds", date: str = "2026-11-20T10:00:00+00:00", **more: Any) -> dict:
    def outcome(expect: str, mean: float | None, verdict: str) -> dict[str, Any]:
        low, high = (None, None) if mean is None else (mean - 1, mean + 1)
        return {"expect": expect, "mean": mean, "low": low, "high": high, "interval": "BCa", "verdict": verdict} | {
            "control": [0.5, 0.0, 1.0],
            "control_verdict": "fails",
        }

    return {
        "paper": paper,
        "statement": "What is said.",
        "paper_says": {"score": 40.5},
        "seeds": [0, 1, 2, 3, 4],
        "measured": {"a": [3, 2, 4]},
        "expectations": [
            outcome("a - b >= 2", 3.0, verdict),
            outcome("c <= -1", -3.0, "holds"),
            outcome("d within 0 to 5", None, "fails"),
        ],
        "verdict": verdict,
        "control": "fails",
        "note": FRONTIER,
        "seconds": 12.0,
        "version": "0.1.0",
        "machine": {"processor": "x"},
        "date": date,
    } | more


@pytest.fixture
def results(tmp_path: Path) -> Path:
    """MUSE held, then failed; WHP was measured once, long ago."""
    path = tmp_path / "claims.jsonl"
    lines = [
        line(paper="whp", date="2026-09-01T00:00:00+00:00"),
        line(),
        line(verdict="fails", date="2026-11-24T09:00:00+00:00"),
    ]
    path.write_text("".join(json.dumps(one) + "\n" for one in lines), encoding="utf-8")
    return path
