"""Where each paper stands here: the catalogue's row, the newest result of its claim, and how to run it.

The one source of the web page, the static site and the digest.  Knows nothing of HTML.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from importlib.resources import files
from pathlib import Path
from typing import Any

from palimpsest import catalog, claims
from palimpsest.catalog import Paper
from palimpsest.claims import results as lines
from palimpsest.core.errors import InputError
from palimpsest.core.methods import VERBS, MethodInfo, all_methods

RESULTS = "results/claims.jsonl"  # where `palimpsest reproduce` writes unless told otherwise
NOT_RUN, NO_CLAIM = "not run", "no claim yet"
VERDICTS = {  # strongest first
    "holds": "holds: every expectation's 95% interval lies on the right side, and the control fails",
    "unclear": "unclear: some interval straddles its bound",
    "untested": "untested: the negative control holds as well, so the experiment does not show the idea",
    "fails": "fails: some interval lies on the wrong side",
    NOT_RUN: "not run: there is a claim, and no result of it in the results file",
    NO_CLAIM: "no claim yet",
}
_BOUNDS = re.compile(r"(?P<name>.+?) (?:(?P<sign>>=|<=) (?P<bound>\S+)|within (?P<low>\S+) to (?P<high>\S+))")


@dataclass(frozen=True)
class Expected:
    """One expectation as measured, in numbers that can be drawn: (mean, low, high) of the claim and of its control."""

    words: str
    low: float  # the bounds of what was expected; infinite where open
    high: float
    measured: tuple[float, float | None, float | None]
    control: tuple[float, float | None, float | None]
    verdict: str


@dataclass(frozen=True)
class Standing:
    """A paper of the catalogue with the results of its claim, oldest first, and its methods."""

    paper: Paper
    results: tuple[Mapping[str, Any], ...]
    methods: tuple[MethodInfo, ...]
    has_claim: bool

    @property
    def result(self) -> Mapping[str, Any] | None:
        """The newest result."""
        return self.results[-1] if self.results else None

    @property
    def verdict(self) -> str:
        if self.result:
            return str(self.result["verdict"])
        return NOT_RUN if self.has_claim else NO_CLAIM

    @property
    def commands(self) -> list[str]:
        """What to type: the claim first, then each method."""
        reproduce = [f"palimpsest reproduce {self.paper.slug}"] if self.has_claim else []
        return reproduce + [f"palimpsest {verb} {info.name} --help" for info in self.methods if (verb := _verb(info))]

    @cached_property
    def expected(self) -> list[Expected]:
        return [expected(outcome) for outcome in (self.result or {}).get("expectations", ())]

    @property
    def headline(self) -> str:
        """The first expectation as measured, in one line; "" without a result."""
        if not self.expected:
            return ""
        first = self.expected[0]
        return f"{first.words}: {lines.interval_words(*first.measured)}"

    def sources(self) -> list[tuple[str, str]]:
        """(path below the package, text) of the claim and of the paper's modules that are there."""
        package = files("palimpsest")
        names = [f"claims/{self.paper.slug}.py", *self.paper.modules]
        found = []
        for name in dict.fromkeys(names):
            file = package.joinpath(*name.split("/"))
            if file.is_file():
                found.append((name, file.read_text(encoding="utf-8")))
        return found


def standings(path: str | Path | None = None) -> list[Standing]:
    """Every paper of the catalogue, in its order, with its results from the file at `path`.

    By default that is where `palimpsest reproduce` writes, which need not be there yet.  Raises `InputError` for a file
    that is named and missing, and, naming the line, for one that does not hold results.
    """
    if path is not None and not Path(path).is_file():
        raise InputError(f"{path}: no such file; wanted what 'palimpsest reproduce' wrote")
    found: dict[str, list[dict[str, Any]]] = {}
    for line in lines.read(path or RESULTS):
        found.setdefault(str(line["paper"]), []).append(line)
    methods: dict[str, list[MethodInfo]] = {}
    for verb in VERBS:
        for info in all_methods(verb):
            methods.setdefault(info.paper, []).append(info)
    with_claim = set(claims.slugs())
    return [
        Standing(
            paper,
            tuple(found.get(paper.slug, ())),
            tuple(methods.get(paper.slug, ())),
            paper.slug in with_claim,
        )
        for paper in catalog.papers()
    ]


def by_strength(found: Sequence[Standing]) -> list[Standing]:
    """Strongest verdict first, newest paper first among equals."""
    order = list(VERDICTS)
    return sorted(found, key=lambda one: (order.index(one.verdict), -one.paper.year, -one.paper.month))


def by_date(found: Sequence[Standing]) -> list[Standing]:
    """Newest paper first."""
    return sorted(found, key=lambda one: (-one.paper.year, -one.paper.month, one.paper.slug))


def expected(outcome: Mapping[str, Any]) -> Expected:
    """An expectation's line of a result, its bounds read from its words (see `claims.Expect`)."""
    words = str(outcome["expect"])
    match = _BOUNDS.fullmatch(words)
    low, high = -math.inf, math.inf
    if match and match["sign"]:
        low, high = (float(match["bound"]), high) if match["sign"] == ">=" else (low, float(match["bound"]))
    elif match:
        low, high = float(match["low"]), float(match["high"])
    measured = (_number(outcome["mean"]), outcome["low"], outcome["high"])
    mean, *interval = outcome["control"]
    control = (_number(mean), interval[0], interval[1])
    return Expected(words, low, high, measured, control, str(outcome["verdict"]))


def _verb(info: MethodInfo) -> str:
    """The words of the command line before a method's name; "" for a learner that only Python offers."""
    from palimpsest.jobs.learn import FAMILIES

    if info.verb != "learn":
        return info.verb
    family = getattr(info.cls, "family", "")
    return f"learn {family}" if family in FAMILIES else ""


def _number(value: float | None) -> float:
    return math.nan if value is None else float(value)
