"""The battery at work: a request's facts, the sides that are attacked, and their readings, kept in the cache.

Knows the attacks only by what an attack is.  What readings mean is for `audit.findings`.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np

from palimpsest.audit.attack import Access, Attack, Reading, Side
from palimpsest.audit.facts import Facts
from palimpsest.audit.findings import Findings
from palimpsest.audit.prompting import Asked
from palimpsest.core.cache import cached
from palimpsest.core.errors import InputError
from palimpsest.core.files import write_json

if TYPE_CHECKING:
    from palimpsest.audit.sok_unlearning import RemovalOrSuppression
    from palimpsest.data.request import ForgetRequest
    from palimpsest.models.lm import LM

_VERSION = 1  # changes when the same attack would read the same model otherwise


@dataclass(frozen=True)
class Battery:
    """What a battery asks about one request, and the readings of the models before and reference."""

    method: RemovalOrSuppression
    before: LM
    reference: LM | None
    request: ForgetRequest
    facts: Facts
    kept: Facts | None
    utility: Facts | None
    control: Facts | None  # holdout facts that the model before is asked, where there is no reference

    def attack(self, after: LM) -> Findings:
        """Run every attack on a model and decide."""
        if after.tokenizer.get_vocab() != self.before.tokenizer.get_vocab():
            raise InputError("before and after have different vocabularies: they cannot be compared")
        attacks = self.method.chosen()
        if after.guard is None:
            attacks.pop("opened", None)
        return self._read(after, {"asked": Asked(), **attacks})

    def ask(self, after: LM) -> Findings:
        """What plain asking says, without any attack: the forget score that the battery looks behind."""
        return self._read(after, {"asked": Asked()})

    def _read(self, after: LM, attacks: dict[str, Attack]) -> Findings:
        sides = {"before": self._before, "after": Reader(Side(after, self.facts, self.kept, self.method.seed))}
        if self._ignorant is not None:
            sides["reference"] = self._ignorant
        readings: dict[str, dict[str, Reading]] = {}
        skipped: dict[str, str] = {}
        for name, attack in attacks.items():
            if self._ignorant is None and attack.teaches:
                skipped[name] = "teaches what it scores: needs a reference or holdout records to be held against"
                continue
            try:
                readings[name] = {model: side.read(name, attack, self.method.access) for model, side in sides.items()}
            except InputError as error:
                skipped[name] = str(error)
        return Findings(self, after, readings, skipped)

    @cached_property
    def _before(self) -> Reader:
        return Reader(Side(self.before, self.facts, self.kept, self.method.seed))

    @cached_property
    def _ignorant(self) -> Reader | None:
        if self.reference is not None:
            return Reader(Side(self.reference, self.facts, self.kept, self.method.seed))
        if self.control is not None:
            return Reader(Side(self.before, self.control, self.kept, self.method.seed))
        return None

    @property
    def held_against(self) -> str:
        if self.reference is not None:
            return "a reference that never knew"
        if self.control is not None:
            return "the model before, asked about holdout records"
        return "chance: there is neither a reference nor enough holdout records"


@dataclass(frozen=True)
class Reader:
    """A side whose readings are kept in the cache."""

    side: Side

    def read(self, name: str, attack: Attack, access: Access) -> Reading:
        opened = name == "opened" or (access == "open-weights" and attack.access != "api")
        side = self.side.opened if opened and self.side.lm.guard is not None else self.side
        settings: Any = attack
        key = [_VERSION, type(attack).__name__, asdict(settings), self._who, side.lm.guard is not self.side.lm.guard]

        def build(folder: Any) -> None:
            found = attack(side)
            curve = None if found.curve is None else found.curve.tolist()
            values = [None if np.isnan(value) else float(value) for value in found.values]
            write_json(folder / "reading.json", {"values": values, "trace": found.trace, "curve": curve})

        def fetch(folder: Any) -> Reading:
            told = json.loads((folder / "reading.json").read_text(encoding="utf-8"))
            values = np.array([np.nan if value is None else value for value in told["values"]], dtype=np.float64)
            return Reading(values, told["trace"], None if told["curve"] is None else np.array(told["curve"]))

        return cached("attacks", key, build, fetch)

    @cached_property
    def _who(self) -> list[Any]:
        side = self.side
        kept = side.kept.sha256 if side.kept else ""
        return [side.lm.sha256, side.lm.device.type, side.facts.sha256, kept, side.seed]
