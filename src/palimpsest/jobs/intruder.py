"""Attacks on the result of a job: the battery's measurements and verdict join the evidence that is there."""

from __future__ import annotations

import sys
from dataclasses import replace
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from palimpsest.core.records import Evidence
    from palimpsest.jobs.material import Material
    from palimpsest.models.lm import LM

_SHARE_OF_TRAINING = 1 / 3  # the rate at which an attacker relearns, of the rate that the model was trained with


def enough_to_attack(material: Material) -> None:
    """`InputError` if the forget set has too few facts for the battery; asked before time is spent on forgetting."""
    from palimpsest.audit.facts import enough, facts_of

    request = material.request
    enough(facts_of(request.forget, (request.retain, request.utility, request.holdout)))


def attacked(evidence: Evidence, after: LM, material: Material) -> Evidence:
    """The evidence with what attackers get: group "attack" among the measurements, ``extras["attacks"]``.

    `InputError` where the forget set has too few facts; it says how many are needed.
    """
    from palimpsest.audit.sok_unlearning import RemovalOrSuppression

    battery = RemovalOrSuppression()
    if material.train_lr is not None:
        battery = replace(battery, relearn_lr=material.train_lr * _SHARE_OF_TRAINING)
    found = battery(material.before, after, material.request, material.reference)
    told = found.extras["attacks"]
    print(f"attacked for {found.seconds:.0f} s: {told['verdict']}; {told['why']}", file=sys.stderr)
    names = {m.name for m in evidence.measurements}
    return replace(
        evidence,
        measurements=(*evidence.measurements, *(m for m in found.measurements if m.name not in names)),
        seconds=evidence.seconds + found.seconds,
        extras={**evidence.extras, "attacks": told},
    )
