"""From what models answered in an exam to measurements: one function a metric, (sittings, ...) -> Measurement.

`sittings` holds the models' sittings of one exam as "before", "after" and, where there is one, "reference".  A metric
that cannot be measured comes back without numbers and with a note on what it needs.  Scores run from 0 to 100.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import numpy as np

from palimpsest.audit import membership
from palimpsest.audit.answers import is_gibberish, rouge_l
from palimpsest.audit.exam import Sitting
from palimpsest.core.records import Better, Measurement
from palimpsest.core.statistics import bootstrap_interval

Sittings = Mapping[str, Sitting]

MODELS = ("before", "after", "reference")
NEEDS = {
    "verbatim": "Needs forget records that are documents ('text') of at least 8 tokens.",
    "knowledge": "Needs forget records that are questions ('prompt' and 'completion').",
    "utility": "Needs a utility set (or a retain set to take it from) with questions ('prompt' and 'completion').",
    "retain_knowledge": "Needs a retain set with questions ('prompt' and 'completion').",
    "utility_nll": "Needs a utility set, or a retain set to take it from.",
    "forget_nll": "Needs forget records with at least one token to score.",
    "gibberish": "Needs forget records to answer or to go on with.",
    "utility_gibberish": "Needs utility records to answer or to go on with.",
    "scalability": "Needs the unlearning method, to run it on growing parts of the forget set (--folds 4).",
    "sustainability": "Needs the unlearning method, to run it on the forget set part by part (--folds 4).",
}


def answer_scores(sitting: Sitting, name: str) -> np.ndarray:
    """(N,) ROUGE-L F1 of the answers to a set's questions."""
    return 100 * rouge_l(sitting.answers(name), sitting.exam.questions[name].truths)


def recital_scores(sitting: Sitting, name: str) -> np.ndarray:
    """(N,) ROUGE-L F1 of the continuations of a set's documents."""
    return 100 * rouge_l(sitting.recital(name), sitting.truths(name))


def knowledge(sittings: Sittings, measurement: str, name: str) -> Measurement:
    """KnowMem of a set: C2 on forget, C4 on utility."""
    group, better = _aim(name)
    if name not in _exam(sittings).questions:
        return unmeasured(measurement, group, better)
    values = {model: answer_scores(sitting, name) for model, sitting in sittings.items()}
    note = f"asked {_exam(sittings).style.words}; {_gibberish_words(sittings['after'].answers(name))}"
    return measured(measurement, group, better, values, note)


def verbatim(sittings: Sittings, measurement: str, name: str) -> Measurement:
    """VerbMem of a set: C1 on forget."""
    group, better = _aim(name)
    if name not in _exam(sittings).recitals:
        return unmeasured(measurement, group, better)
    values = {model: recital_scores(sitting, name) for model, sitting in sittings.items()}
    asked = _exam(sittings).recitals[name]
    given, truth = (np.mean([len(getattr(recital, part)) for recital in asked]) for part in ("prompt", "truth"))
    note = f"{truth:.0f} tokens after {given:.0f}, on average; {_gibberish_words(sittings['after'].recital(name))}"
    return measured(measurement, group, better, values, note)


def gibberish(sittings: Sittings, measurement: str, name: str) -> Measurement:
    """The share of a set's answers and continuations that are empty or no language, in percent."""
    kinds: list[Callable[[Sitting], list[str]]] = []
    if name in _exam(sittings).questions:
        kinds.append(lambda sitting: sitting.answers(name))
    if name in _exam(sittings).recitals and (name == "forget" or not kinds):
        kinds.append(lambda sitting: sitting.recital(name))
    if not kinds:
        return unmeasured(measurement, name, "lower")
    values = {
        model: np.array([100.0 * is_gibberish(text) for kind in kinds for text in kind(sitting)])
        for model, sitting in sittings.items()
    }
    return measured(measurement, name, "lower", values)


def surprise(sittings: Sittings, measurement: str, name: str) -> Measurement:
    """Mean negative log-likelihood a token of a set's rows, in nats."""
    better: Better = "reference" if name == "forget" else "lower"
    if name not in _exam(sittings).scored:
        return unmeasured(measurement, name, better)
    return measured(measurement, name, better, {model: sitting.surprise(name) for model, sitting in sittings.items()})


def leakage(sittings: Sittings, statistic: str, *, seed: int = 0) -> Measurement:
    """PrivLeak (C3): how far the membership attack's AUC is from the reference's, in percent of the latter.

    A forget text's value is 100 (share of holdout texts below it / AUC(reference) - 1), so the mean is the leakage.
    """
    blank = unmeasured("privacy_leakage", "privacy", "zero")
    if not _exam(sittings).members:
        wanted = "holdout records that no model has seen, of the same kind as the forget records"
        return replace(blank, note=f"Needs {wanted} (documents in both, or questions in both).")
    scores = {
        model: (sitting.attack("forget")[statistic], sitting.attack("holdout")[statistic])
        for model, sitting in sittings.items()
    }
    aucs = {model: membership.forget_auc(*sides) for model, sides in scores.items()}
    told = f"AUC of {statistic}: " + ", ".join(f"{model} {value:.3f}" for model, value in aucs.items())
    told += " (0: looks trained on, 0.5: cannot be told, 1: looks scrubbed)"
    if "reference" not in aucs:
        return replace(blank, note=f"Needs a reference model trained without the forget set. {told}.")
    fixed = aucs["reference"]
    if fixed < membership.LOWEST_AUC:
        why = "was it trained on the forget set, or is holdout of another kind?"
        return replace(blank, note=f"Needs a reference with an AUC of at least {membership.LOWEST_AUC}: {why} {told}.")
    low, high = membership.leakage_interval(scores["after"], scores["reference"], seed=seed)
    values = {model: 100 * (membership.placements(*sides) / fixed - 1) for model, sides in scores.items()}
    least, most = membership.feasible(fixed)
    told += f"; leakage can be {least:.0f} to {most:+.1f} %"
    if aucs["before"] >= 0.1:
        told += "; even before forgetting the attack does not see all of the forget set"
    if abs(fixed - 0.5) > 0.25:
        told += "; the reference itself tells forget from holdout, so holdout may be of another kind"
    found = measured("privacy_leakage", "privacy", "zero", values, told)
    return replace(
        found,  # the means again, without the rounding of a sum: the reference is 0 by construction
        before=membership.privacy_leakage(aucs["before"], fixed),
        after=membership.privacy_leakage(aucs["after"], fixed),
        reference=0.0,
        low=low,
        high=high,
        n=sum(len(side) for side in scores["after"]),
    )


def attack_aucs(sittings: Sittings) -> dict[str, Any]:
    """{"auc": {statistic: {model: AUC}}, "texts": {set: number}}: what every attack sees; empty without members."""
    if not _exam(sittings).members:
        return {}
    sides = {model: (sitting.attack("forget"), sitting.attack("holdout")) for model, sitting in sittings.items()}
    return {
        "auc": {
            statistic: {
                model: membership.forget_auc(forget[statistic], holdout[statistic])
                for model, (forget, holdout) in sides.items()
            }
            for statistic in sides["before"][0]
        },
        "texts": {name: len(rows) for name, rows in _exam(sittings).members.items()},
    }


def measured(name: str, group: str, better: Better, values: Mapping[str, np.ndarray], note: str = "") -> Measurement:
    """The measurement whose value is the mean over records, (N,) a model, with the bootstrap interval of *after*."""
    low, high = bootstrap_interval(values["after"])
    mean = {model: float(values[model].mean()) if model in values else None for model in MODELS}
    each = {model: tuple(values[model].tolist()) if model in values else () for model in MODELS}
    return Measurement(
        name=name,
        group=group,
        before=mean["before"],
        after=mean["after"],
        reference=mean["reference"],
        low=low,
        high=high,
        n=len(values["after"]),
        better=better,
        note=note,
        values=each["after"],
        before_values=each["before"],
        reference_values=each["reference"],
    )


def unmeasured(name: str, group: str, better: Better) -> Measurement:
    """A measurement without numbers; its note says what it needs."""
    return Measurement(name, group, None, None, better=better, note=NEEDS.get(name, ""))


def _exam(sittings: Sittings) -> Any:
    return sittings["before"].exam


def _aim(name: str) -> tuple[str, Better]:
    return ("forget", "reference") if name == "forget" else (name, "higher")


def _gibberish_words(said: list[str]) -> str:
    empty = sum(not text.strip() for text in said)
    return f"{empty} of {len(said)} empty, {sum(map(is_gibberish, said)) - empty} more gibberish"
