"""Removed, suppressed or not forgotten?  A battery of attacks on a model that was made to forget, and a stated rule.

After "SoK: Machine Unlearning for Large Language Models" (2025, arXiv:2506.09227), which finds that methods meant to
remove often only suppress, and that the usual scores do not see it; battery, shares and rule are of our own making on
that ground (sheet `sok_unlearning`).  Each attack is run in the same way on the model before, on the one after and on a
reference that never knew; without a reference, on the model before about holdout records; without these, ignorance is
taken to score chance and nothing can be shown to be removed.
Needs: forget questions (or texts), at least 20 about at least 8 subjects; retain questions for probes, steering and
benign relearning.  A verdict holds for what the attacker may do (`access`) and for these attacks: others may get more.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from palimpsest.audit import outsider, sequence
from palimpsest.audit.attack import ACCESS, Access, Attack
from palimpsest.audit.battery import Battery
from palimpsest.audit.facts import Facts, enough, facts_of
from palimpsest.audit.probes import LinearProbe, LogitLens
from palimpsest.audit.prompting import Asked, Avoided, Demonstrations, Framed, Paraphrase, Samples
from palimpsest.audit.quantisation import Quantisation
from palimpsest.audit.recovery import Rule
from palimpsest.audit.relearning import Relearning
from palimpsest.audit.steering import Steering
from palimpsest.core.errors import InputError, unknown
from palimpsest.core.methods import config_of, info_of, method
from palimpsest.core.records import Evidence, Measurement

if TYPE_CHECKING:
    from palimpsest.data.request import ForgetRequest
    from palimpsest.models.lm import LM


@method(verb="audit", paper="sok_unlearning")
@dataclass(frozen=True, kw_only=True)
class RemovalOrSuppression:
    """Removal or suppression: what attackers get back from a model that was made to forget, and a verdict by rule."""

    access: Access = "open-weights"  # what the attacker has; "api" leaves out all that touches weights
    attacks: tuple[str, ...] = ()  # names of attacks; none: all that the access allows
    facts: int = 160  # forget facts that are asked, at most
    options: int = 8  # answers that a fact is chosen from, at most
    relearn_steps: int = 40
    relearn_lr: float = 1e-3  # for small models, about a third of their training's; 1e-5 for models of billions
    few: int = 8  # facts of few-shot relearning
    samples: int = 8  # answers drawn for each fact
    requests: int = 3  # successive requests, where the unlearner is given to run again
    limit: float = 0.25  # the share brought back from which knowledge counts as still there
    seed: int = 0

    def __post_init__(self) -> None:
        if self.access not in ACCESS:
            raise unknown("access", self.access, ACCESS)
        for name in self.attacks:
            if name not in self._all:
                raise unknown("attack", name, self._all)
        if self.facts < 1 or self.options < 2 or self.requests < 1 or self.relearn_steps < 4:
            raise InputError("facts and requests must be at least 1, options 2, relearn_steps 4")
        if not 0 < self.limit < 1:
            raise InputError(f"limit must lie between 0 and 1, not {self.limit}")

    def __call__(
        self,
        before: LM,
        after: LM,
        request: ForgetRequest,
        reference: LM | None = None,
        *,
        method: dict[str, Any] | None = None,
        unlearner: Callable[[LM, ForgetRequest], LM] | None = None,
    ) -> Evidence:
        """Run the battery.  With `unlearner` it is also run on successive parts of the request.

        `InputError` if there are too few facts for an interval (it says how many are needed), or the models read
        different tokens.
        """
        began = time.monotonic()
        battery = self.prepare(before, request, reference)
        found = battery.attack(after)
        measurements = [*found.measurements(), *self._outside(battery, after)]
        extras = found.described()
        if unlearner is not None:
            measured, told = self._stream(unlearner, battery)
            measurements += measured
            extras["sequence"] = told
        extras["membership"] = {m.name: m.note for m in measurements if m.name == "membership"}
        info = info_of(self)
        models = {"before": before, "after": after, **({} if reference is None else {"reference": reference})}
        return Evidence(
            kind="forget",
            measurements=tuple(measurements),
            method=method or {},
            model={name: {"source": lm.source, "sha256": lm.sha256} for name, lm in models.items()},
            data=request.describe(),
            seconds=time.monotonic() - began,
            extras={
                "audit": {"name": info.name, "paper": info.paper, "config": config_of(self)},
                "attacks": extras,
                "verdict": f"{found.verdict.word.capitalize()}: {found.verdict.why}.",
            },
        )

    def prepare(self, before: LM, request: ForgetRequest, reference: LM | None = None) -> Battery:
        """The battery for a request: what is asked, and what the models before and reference give away.

        Made once, it judges any number of models (`Battery.attack`); readings are kept in the cache.
        """
        if reference is not None and reference.tokenizer.get_vocab() != before.tokenizer.get_vocab():
            raise InputError("before and reference have different vocabularies: they cannot be compared")
        tables = (request.forget, request.retain, request.utility, request.holdout)
        sizes = {"options": self.options, "seed": self.seed}
        facts = enough(facts_of(request.forget, tables, most=self.facts, **sizes))
        kept = _maybe(request.retain, tables, most=4 * self.facts, **sizes)
        utility = _maybe(request.utility, tables, most=self.facts, **sizes) or kept
        control = None
        if reference is None and (control := _maybe(request.holdout, tables, most=self.facts, **sizes)) is not None:
            try:
                enough(control, "holdout")
            except InputError:
                control = None
            else:
                if len(control.options[0]) != len(facts.options[0]):  # a guess must be as hard
                    control = None
        return Battery(self, before, reference, request, facts, kept, utility, control)

    @property
    def rule(self) -> Rule:
        return Rule(limit=self.limit)

    @property
    def _all(self) -> dict[str, Attack]:
        return {
            "opened": Asked(),
            "avoided": Avoided(),
            "paraphrase": Paraphrase(),
            "framed": Framed(),
            "demonstrations": Demonstrations(),
            "samples": Samples(self.samples),
            "relearning": self._relearning("disjoint"),
            "few_shot_relearning": self._relearning("few"),
            "benign_relearning": self._relearning("benign"),
            "speed": self._relearning("same"),
            "int8": Quantisation(8),
            "int4": Quantisation(4),
            "probe": LinearProbe(),
            "lens": LogitLens(),
            "steering": Steering(),
        }

    def _relearning(self, records: Any) -> Relearning:
        looks = tuple(sorted({max(1, self.relearn_steps // part) for part in (8, 4, 2, 1)}))
        return Relearning(records, looks, self.relearn_lr, few=self.few)

    def chosen(self) -> dict[str, Attack]:
        """The attacks that are asked for and that the access allows."""
        reach = ACCESS.index(self.access)
        return {
            name: attack
            for name, attack in self._all.items()
            if (not self.attacks or name in self.attacks)
            and ACCESS.index("open-weights" if name == "opened" else attack.access) <= reach
        }

    def _outside(self, battery: Battery, after: LM) -> list[Measurement]:
        """Membership: the AUC of the loss against a model's own calibration, and every other attack in the note."""
        sides = outsider.members(battery.request, seed=self.seed)
        if not sides:
            note = "Needs holdout records of the same kind as the forget records."
            return [Measurement("membership", "attack", None, None, better="reference", note=note)]
        models = {"before": battery.before, "after": after}
        found = {name: outsider.aucs(lm, sides, battery.reference) for name, lm in models.items()}
        if battery.reference is not None:
            found["reference"] = outsider.aucs(battery.reference, sides)
        told = "; ".join(
            f"{attack} {interval.value:.2f} ({interval.low:.2f} to {interval.high:.2f})"
            for attack, interval in found["after"].items()
        )
        main = {name: aucs.get("min-20%++", aucs["loss"]) for name, aucs in found.items()}
        return [
            Measurement(
                "membership",
                "attack",
                main["before"].value,
                main["after"].value,
                main["reference"].value if "reference" in main else None,
                main["after"].low,
                main["after"].high,
                n=sum(map(len, sides.values())),
                better="reference",
                note=f"AUC after forgetting, by attack: {told}",
            )
        ]

    def _stream(self, unlearner: Any, battery: Battery) -> tuple[list[Measurement], dict[str, Any]]:
        found = sequence.stream(
            unlearner,
            battery.before,
            battery.request,
            battery.utility,
            requests=self.requests,
            options=self.options,
            most=self.facts,
            seed=self.seed,
        )
        note = "one number from one order of requests: no interval"
        revival = Measurement(
            "revival", "attack", 0.0, 100 * found.revival, 0.0, better="lower", note=note, n=self.requests
        )
        return [revival], {"known": found.known, "kept": found.kept, "slope": found.slope}


def _maybe(table: Any, beside: Any, **sizes: Any) -> Facts | None:
    """The facts of a table; None if there is none, or nothing in it can be asked."""
    if table is None:
        return None
    try:
        return facts_of(table, beside, **sizes)
    except InputError:
        return None
