"""The transition of GPICL as a picture and a table: from remembered tasks to learning, over tasks and model sizes.

Knows nothing of how the models were trained; draws what `learn.incontext.gpicl.study` returns.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from palimpsest.core.errors import InputError
from palimpsest.learn.incontext.gpicl import Trial
from palimpsest.report import plots

_ROLES = ("after", "reference", "before", "ink", "muted")  # of the lines, largest model first


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
