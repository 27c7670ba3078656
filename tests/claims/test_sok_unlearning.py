"""The claim at a small scale: models of known truth are named, and without attacks the filter passes for a removal."""

from __future__ import annotations

import math

import pytest

from palimpsest.claims import sok_unlearning
from palimpsest.models.lm import LM


@pytest.fixture
def small(monkeypatch):
    """Two unlearners and the attacks that are quickest."""
    kept = {name: sok_unlearning.UNLEARNERS[name] for name in ("npo", "relabel")}
    monkeypatch.setattr(sok_unlearning, "UNLEARNERS", kept)
    monkeypatch.setattr(sok_unlearning, "RATES", (1e-3,))
    monkeypatch.setattr(sok_unlearning, "ATTACKS", ("opened", "relearning", "lens", "int4"))


@pytest.mark.filterwarnings("ignore:.*forget records are documents")
def test_with_attacks_the_filter_is_seen_through_and_without_them_it_passes(small):
    found = sok_unlearning.measure(0, scale=0.5)
    assert set(sok_unlearning.measure.names) <= set(found)
    assert all(math.isfinite(value) for value in found.values())
    assert found["controls_right"] == 1
    assert found["recovered_guarded"] == pytest.approx(1)
    assert found["recovered_retrained"] < 0.3
    control = sok_unlearning.measure(0, mechanism=False, scale=0.5)
    assert set(control) == set(found)
    assert control["controls_right"] == pytest.approx(2 / 3)
    assert control["recovered_guarded"] < 0.3
    assert control["asked_npo"] == pytest.approx(found["asked_npo"])  # the same models, only not attacked


def test_the_filter_hides_names_alone_and_comes_back_from_its_state():
    guard = sok_unlearning.Filter(("Ada Byron",))
    lm = LM.build(["who is Ada Byron?"], "llama-tiny", vocab_size=280, max_length=32)
    assert guard.prepare(lm, ["Who is Ada Byron?", "Who?"]).prompts == ["Who is somebody?", "Who?"]
    assert sok_unlearning.Filter.restore(*guard.state()) == guard
