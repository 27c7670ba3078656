"""Learners in context on a page, and GPICL's transition from remembered tasks to learning as a picture and a table.

Knows nothing of how the models were trained: reads the evidence of ``palimpsest learn in-context`` and what
`learn.incontext.gpicl.study` returns.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from palimpsest.audit.cards import card
from palimpsest.core.errors import InputError
from palimpsest.core.records import Evidence
from palimpsest.learn.incontext.gpicl import Trial
from palimpsest.report import parts, plots
from palimpsest.report.html import render
from palimpsest.report.words import duration, number

_ROLES = ("after", "reference", "before", "ink", "muted")  # of the lines, largest model first
_PLACES = 9  # of a context's length that are marked


def write(evidence: Evidence, folder: str | Path) -> Path:
    """Write ``report.html`` into `folder`; returns its path.  Raises InputError for evidence of another kind."""
    extras = evidence.extras
    if evidence.kind != "learn" or "verdict" not in extras:
        raise InputError("this evidence is not of a learner in context")
    path = Path(folder) / "report.html"
    headline = extras["verdict"][0].upper() + extras["verdict"][1:]
    context = {
        "title": f"{evidence.method['name']} \N{MIDDLE DOT} {headline}",
        "kicker": "in-context report",
        "undertext": evidence.model["after"]["sha256"],
        "headline": headline,
        "facts": [("Method", evidence.method["name"]), ("Time", duration(evidence.seconds))],
        "course": _course(extras["course"], extras["along"], extras["unit"]) if "course" in extras else None,
        "caption": f"{extras.get('unit', '')}, by {extras.get('along', '')}".capitalize() + ".",
        "rows": [parts.row(m) for m in evidence.measurements],
        "curves": parts.curves(extras.get("curves") or {}),
        "config": parts.flat(evidence.method["config"]),
        "data": parts.hashed(evidence.data),
        "environment": parts.flat(evidence.environment),
    }
    render("incontext.html", context, path)
    return path


def _course(found: Mapping[str, Sequence[float]], along: str, unit: str) -> dict[str, Any]:
    """Each measurement by the length of the context, at up to `_PLACES` lengths: a picture and its numbers."""
    length = len(next(iter(found.values())))
    places = sorted({round(n * (length - 1) / max(1, _PLACES - 1)) for n in range(_PLACES)})
    lines = [
        plots.Line(card(name).title.split(" ", 2)[-1], [values[place] for place in places], role)
        for role, (name, values) in zip(_ROLES, found.items(), strict=False)
    ]
    percent = unit.endswith("%")
    svg = plots.sweep([str(place) for place in places], lines, "course", unit, along=along, percent=percent)
    rows = [[str(place), *(number(line.values[n], 2) for line in lines)] for n, place in enumerate(places)]
    return {"svg": parts.markup(svg), "heads": [along, *(line.name for line in lines)], "rows": rows}


def transition(trials: Sequence[Trial], key: str) -> str:
    """Accuracy on unseen tasks over the number of training tasks, one line a model, as inline SVG.

    A dashed line of the same colour is the accuracy on the training's own tasks.  `key` must be unique on the page.
    Raises `InputError` if the trials are not every model on every number of tasks, or of more than five models.
    """
    models = _models(trials)
    tasks = sorted({trial.tasks for trial in trials})
    if len(models) > len(_ROLES):
        raise InputError(f"a picture shows up to {len(_ROLES)} models, not {len(models)}: draw several")
    lines = []
    for role, (name, found) in zip(_ROLES, models.items(), strict=False):
        if sorted(found) != tasks:
            raise InputError(f"{name} was not trained on every number of tasks ({', '.join(map(str, tasks))})")
        diagnoses = [found[count].diagnosis for count in tasks]
        lines.append(plots.Line(name, [100 * one.unseen.last for one in diagnoses], role))
        lines.append(plots.Line(f"{name}, seen", [100 * one.seen.last for one in diagnoses], role, dashed=True))
    title = "Accuracy on unseen tasks, over tasks in training"
    chance = 100 * trials[0].diagnosis.chance
    return plots.sweep([_count(count) for count in tasks], lines, key, title, along="tasks in training", level=chance)


def rows(trials: Sequence[Trial]) -> list[dict[str, Any]]:
    """The numbers of the picture, one row a trial, accuracies in percent."""
    return [
        {
            "model": trial.kind,
            "width": trial.width,
            "parameters": trial.parameters,
            "state": trial.state,
            "tasks": trial.tasks,
            "seen, first": round(100 * trial.diagnosis.seen.first, 1),
            "seen, last": round(100 * trial.diagnosis.seen.last, 1),
            "unseen, first": round(100 * trial.diagnosis.unseen.first, 1),
            "unseen, last": round(100 * trial.diagnosis.unseen.last, 1),
            "verdict": trial.diagnosis.verdict,
        }
        for trial in trials
    ]


def _models(trials: Sequence[Trial]) -> dict[str, dict[int, Trial]]:
    """By model, largest first: its trial for each number of tasks."""
    if not trials:
        raise InputError("there is no trial to show")
    kinds = {trial.kind for trial in trials}
    found: dict[str, dict[int, Trial]] = {}
    for trial in sorted(trials, key=lambda trial: (-trial.parameters, trial.kind)):
        name = f"width {trial.width}" if len(kinds) == 1 else f"{trial.kind} {trial.width}"
        found.setdefault(name, {})[trial.tasks] = trial
    return found


def _count(tasks: int) -> str:
    """Powers of two are written as such from 1024 on."""
    power = tasks.bit_length() - 1
    return f"2^{power}" if tasks == 2**power and power >= 10 else str(tasks)
