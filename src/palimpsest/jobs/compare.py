"""``palimpsest compare``: several methods on the same request, reference and budget, in one table."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from palimpsest.core import methods
from palimpsest.core.errors import InputError, TrainingDiverged, unknown
from palimpsest.core.records import Evidence
from palimpsest.jobs.attempt import Attempt, attempt
from palimpsest.jobs.learn import CompareLearners, compare_learners
from palimpsest.jobs.material import Material, Source, prepare

KEPT = 0.9  # of the utility before: what a method must keep to be preferred


@dataclass(frozen=True, kw_only=True)
class Compare(Source):
    """Try several methods on the same request, with the same reference and budget, and show them side by side."""

    methods: str = "all"  # names separated by commas, or "all"
    out: str = "palimpsest-compare"  # folder for the page and the table
    steps: int | None = None  # the most optimiser steps a method may take; default: each method's own
    lr: float | None = None  # one learning rate for all; default: each is tuned on a practice request
    lora_rank: int | None = None  # train LoRA factors of this rank instead of all weights
    folds: int = 0  # also run the methods on so many growing and successive parts of the request


def compare_forget(options: Compare) -> int:
    """Write ``OUT/compare.html``, ``OUT/compare.csv`` and one evidence folder a method."""
    from palimpsest.report import compare as page

    infos = chosen_methods("forget", options.methods)
    if len(infos) < 2:
        raise InputError(f"a comparison needs at least two methods, got {infos[0].name}")
    material = prepare(options)
    attempts = attempt_all(infos, overrides(options), material, folds=options.folds)
    out = Path(options.out)
    for one in attempts:
        one.evidence.write(out / one.info.name)
    page.write([one.evidence for one in attempts], out)
    best = choose(attempts)
    print(
        f"{out}: {len(attempts)} methods compared; nearest to the reference at kept utility: {best.info.name}",
        file=sys.stderr,
    )
    return 0


VERBS: dict[str, tuple[Callable[[Any], int], type]] = {
    "forget": (compare_forget, Compare),
    "learn": (compare_learners, CompareLearners),
}


def chosen_methods(verb: str, names: str) -> list[methods.MethodInfo]:
    """The methods named in a comma-separated list; "all" are those that take nothing but a model and a request."""
    if names == "all":
        return methods.all_methods(verb)
    found = [methods.get(verb, name.strip()) for name in names.split(",") if name.strip()]
    if not found:
        raise InputError(f"no {verb} method named in '{names}'")
    return list(dict.fromkeys(found))


def overrides(options: Any) -> dict[str, Any]:
    """The hyper-parameters that the user set for all methods."""
    names = ("steps", "lr", "lora_rank")
    return {name: value for name in names if (value := getattr(options, name)) is not None} | {"seed": options.seed}


def settings(infos: Sequence[methods.MethodInfo], given: Sequence[str]) -> dict[str, Any]:
    """The hyper-parameters given as ``NAME=VALUE``, each of the type of its default.

    `InputError` for a name that the method does not have, a value of another type, and where there is not one method.
    """
    if not given:
        return {}
    if len(infos) != 1:
        raise InputError(f"--set is for one method, not for {len(infos)}: name one with --method")
    defaults = methods.config_of(infos[0]())
    found = {}
    for one in given:
        name, equals, text = one.partition("=")
        if not equals:
            raise InputError(f"--set {one}: wanted NAME=VALUE, e.g. beta=0.5")
        if name not in defaults:
            raise unknown(f"hyper-parameter of {infos[0].name}", name, defaults)
        found[name] = _typed(one, text, defaults[name])
    return found


def _typed(given: str, text: str, default: Any) -> Any:
    if isinstance(default, str):
        return text
    words = {"true": True, "false": False, "none": None}
    if isinstance(default, bool) or default is None:
        wanted = "True or False" if isinstance(default, bool) else "a number, True, False or None"
        if text.lower() in words and not (isinstance(default, bool) and text.lower() == "none"):
            return words[text.lower()]
    else:
        wanted = "a whole number" if isinstance(default, int) else "a number"
    if not isinstance(default, bool):
        try:
            return int(text) if isinstance(default, int) else float(text)
        except ValueError:
            pass
    raise InputError(f"--set {given}: wanted {wanted}")


def attempt_all(
    infos: Sequence[methods.MethodInfo],
    chosen: dict[str, Any],
    material: Material,
    *,
    folds: int = 0,
    progress: bool = True,
) -> list[Attempt]:
    """Every method in turn.  One that cannot serve this request is left out with a line that says why.

    Raises `InputError` when none can, or when two methods yield the very same weights.
    """
    attempts: list[Attempt] = []
    for info in infos:
        try:
            attempts.append(attempt(info, chosen, material, folds=folds, progress=progress))
        except (InputError, TrainingDiverged) as error:
            if len(infos) == 1:
                raise
            print(f"{info.name} left out: {error}", file=sys.stderr)
    if not attempts:
        raise InputError("none of the methods can serve this request")
    seen: dict[str, str] = {}
    for one in attempts:
        digest = one.lm.sha256
        if digest in seen:
            raise InputError(
                f"{one.info.name} and {seen[digest]} yield the very same model: one of them is not doing its work"
            )
        seen[digest] = one.info.name
    return attempts


def choose(attempts: Sequence[Attempt]) -> Attempt:
    """The attempt whose forget scores are nearest to the reference's among those that keep 90% of the utility.

    Where none keeps it, the one that keeps most.  Without a reference "nearest" means lowest.
    """
    useful = [one for one in attempts if _kept(one.evidence) >= KEPT]
    if not useful:
        return max(attempts, key=lambda one: _kept(one.evidence))
    return min(useful, key=lambda one: _distance(one.evidence))


def _kept(evidence: Evidence) -> float:
    """The share of the utility before that is left: of the answers, or of the likelihood a token without questions."""
    found = {m.name: m for m in evidence.measurements}
    for name in ("utility", "retain_knowledge"):
        m = found.get(name)
        if m and m.before and m.after is not None:
            return m.after / m.before
    m = found.get("utility_nll")
    return math.exp(m.before - m.after) if m and m.before is not None and m.after is not None else 1.0


def _distance(evidence: Evidence) -> float:
    """How far the forget scores are from the reference's, summed over knowledge and verbatim memorisation."""
    found = [m for m in evidence.measurements if m.name in ("knowledge", "verbatim") and m.after is not None]
    return sum(abs(m.after - (m.reference or 0.0)) for m in found if m.after is not None)


def table_row(evidence: Evidence) -> dict[str, Any]:
    """A method's row of the table that the report shows: its name, time and measurements."""
    row: dict[str, Any] = {"method": evidence.method["name"], "seconds": round(evidence.seconds, 1)}
    row |= {name: value for name, value in evidence.extras.get("cost", {}).items() if name in ("steps", "changed")}
    return row | {m.name: m.after for m in evidence.measurements}


def as_one(best: Attempt, attempts: Sequence[Attempt]) -> Evidence:
    """The best attempt's evidence, with the table of all of them."""
    table = [table_row(one.evidence) for one in attempts]
    return replace(best.evidence, extras={**best.evidence.extras, "table": table})
