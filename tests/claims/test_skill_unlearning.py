"""Skill unlearning's claim at a small scale: every value is there, and the control mixes the probes."""

from __future__ import annotations

from palimpsest import claims
from palimpsest.claims.skill_unlearning import PHRASINGS, Skills
from palimpsest.data.records import pairs


def test_all_values_are_measured_and_the_control_differs() -> None:
    claim = claims.get("skill_unlearning")
    measured, control = (claim(0, mechanism=mechanism, scale=0.15) for mechanism in (True, False))
    assert measured.keys() == control.keys()
    assert all(measured[f"before_{skill}"] == control[f"before_{skill}"] for skill in PHRASINGS)
    assert measured["gap"] > control["gap"]  # what tells the skill is switched off
    assert measured["detection_forget"] < control["detection_forget"] or measured["box_right"] > control["box_right"]


def test_probes_and_their_mixture_are_the_same_records() -> None:
    skills = Skills(0)
    plain, mixed = (skills.request("reverse", mixed=value) for value in (False, True))
    assert plain.retain is not None
    assert mixed.retain is not None
    assert all(prompt.startswith(("reverse", "flip")) for prompt, _ in pairs(plain.forget))
    assert not any(prompt.startswith(("reverse", "flip")) for prompt, _ in pairs(plain.retain))
    assert len(mixed.forget) == len(plain.forget)
    both = [sorted(pairs(one.forget) + pairs(one.retain)) for one in (plain, mixed)]
    assert both[0] == both[1]
    assert any(prompt.startswith(("reverse", "flip")) for prompt, _ in pairs(mixed.retain))
