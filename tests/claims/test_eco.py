from __future__ import annotations

from palimpsest import claims


def test_the_claim_runs_small() -> None:
    claim = claims.get("eco")
    values = claim(0, scale=0.25)
    assert values["forget_before"] > values["forget_eco"] + 0.1
    assert values["change_of_prompts_let_through"] == 0.0
    assert values["looks"] <= 40
    assert 0 <= values["distance_eco"] <= 1
    control = claim(0, mechanism=False, scale=0.25)
    assert control["forget_eco"] == values["forget_before"], "without corruption the gate alone changes nothing"
    assert control["forget_npo"] == values["forget_npo"], "the control leaves the baselines alone"
