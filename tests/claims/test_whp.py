from __future__ import annotations

import warnings

import pytest

from palimpsest import claims
from palimpsest.claims import whp
from palimpsest.claims.whp import PHRASINGS, Texts

SCALE = 0.2


def test_the_sagas_questions_are_held_out_and_its_names_are_its_own() -> None:
    texts = Texts.write(3, 200)
    told = " ".join(texts.saga)
    assert len(texts.asked) == 72
    assert len(texts.saga) == 72 * (len(PHRASINGS["pet"]) - 1)
    assert not any(prompt + answer + "." in texts.saga for prompt, answer in texts.asked)
    general = [text for text in texts.general if not text.startswith("words: ")]
    for _, answer in texts.asked[whp.NAMED]:
        assert answer.strip() in told
        assert not any(answer.strip() in text for text in general)
    assert Texts.write(3, 200) == texts != Texts.write(4, 200)


def test_the_claim_runs_small() -> None:
    claim = claims.get("whp")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # anchors without a stand-in left, at this scale
        values = claim(0, scale=SCALE)
        control = claim(0, mechanism=False, scale=SCALE)
    assert values["closed_oracle"] == pytest.approx(1.0)
    assert values["closed_before"] == pytest.approx(0.0)
    assert values["rise_before"] == pytest.approx(0.0)
    assert values["kl_oracle"] == pytest.approx(0.0, abs=1e-5)
    assert values["closed_whp"] > control["closed_whp"]
    assert control["closed_whp"] < whp.CLOSED, "without the generic targets nothing is forgotten"
    assert values["closed_ga"] == control["closed_ga"], "the control leaves the baselines alone"
