"""The page of a continual learner: the accuracy matrix as a picture, accuracy over tasks, memory beside accuracy.

Reads the evidence that ``palimpsest learn continual`` writes, and knows nothing of any method.  T tasks.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from palimpsest.core.errors import InputError
from palimpsest.core.records import Evidence
from palimpsest.report import parts, plots
from palimpsest.report.html import render
from palimpsest.report.svg import COLOURS, canvas, in_our_settings, svg
from palimpsest.report.words import duration, number

_ROLES = ("after", "reference", "before", "ink", "muted")
_LABELLED = 10  # tasks up to which the picture of the matrix has its numbers in it


def write(evidence: Evidence, folder: str | Path) -> Path:
    """Write ``report.html`` into `folder`; returns its path.  Raises InputError for evidence of another kind."""
    if "accuracy_matrix" not in evidence.extras:
        raise InputError("this evidence is not of a continual learner")
    path = Path(folder) / "report.html"
    main, name = evidence.measurements[0], evidence.method["name"]
    matrix, learners = evidence.extras["accuracy_matrix"], evidence.extras["learners"]
    stream = evidence.extras["continual"]
    tasks = [str(place + 1) for place in range(len(matrix))]
    headline = f"{main.after:.1f}% right among all classes in the end"
    heads = ["After task", *(f"On task {task}" for task in tasks)]
    context = {
        "title": f"{headline} \N{MIDDLE DOT} {name}",
        "kicker": "continual report",
        "undertext": evidence.model["after"]["sha256"],
        "headline": headline,
        "sentences": _sentences(evidence),
        "facts": [
            ("Method", name),
            ("Stream", f"{evidence.data['train']['classes']:,} classes in {len(tasks)} tasks, of {stream['kind']}"),
            ("Examples", f"{evidence.data['train']['rows']:,} to learn from, {main.n:,} to test on"),
            ("Memory", f"{learners[name]['memory_bytes']:,} bytes, {learners[name]['kept_examples']:,} examples kept"),
            ("Time", duration(evidence.seconds)),
        ],
        "rows": [parts.row(m) for m in evidence.measurements],
        "matrix": parts.markup(matrix_picture(matrix, "matrix")),
        "matrix_table": {
            "heads": heads,
            "rows": [[task, *map(number, row)] for task, row in zip(tasks, matrix, strict=True)],
        },
        "course": parts.markup(_course(tasks, learners)),
        "course_table": {
            "heads": ["After task", *learners],
            "rows": [
                [task, *(number(one["seen"][place]) for one in learners.values())] for place, task in enumerate(tasks)
            ],
        },
        "learners": {
            "heads": ["Method", "Last accuracy", "Average incremental", "Forgetting", "Bytes kept", "Examples kept"],
            "rows": [
                [
                    other,
                    *(number(one[key]) for key in ("last_accuracy", "incremental_accuracy", "forgetting")),
                    f"{one['memory_bytes']:,}",
                    f"{one['kept_examples']:,}",
                ]
                for other, one in learners.items()
            ],
        },
        "tasks": [(str(place + 1), parts.cut(", ".join(names), 300)) for place, names in enumerate(stream["tasks"])],
        "config": parts.flat(evidence.method["config"]),
        "data": parts.hashed(evidence.data),
        "environment": parts.flat(evidence.environment),
    }
    render("continual.html", context, path)
    return path


def _sentences(evidence: Evidence) -> list[str]:
    main, stream = evidence.measurements[0], evidence.extras["continual"]
    assert main.after is not None
    classes = evidence.data["train"]["classes"]
    said = [
        f"95% interval over {main.n:,} test examples: {number(main.low)} to {number(main.high)} percent; "
        f"guessing would be right in {100 / classes:.1f}."
    ]
    if main.reference is not None:
        gap = main.after - main.reference
        told = f"{abs(gap):.1f} points {'above' if gap >= 0 else 'below'}"
        said.append(f"The nearest class mean, which learns nothing, reaches {main.reference:.1f}: this is {told}.")
    if stream["batch_size"]:
        said.append(f"Task-free: examples came {stream['batch_size']} at a time, and no border was told.")
    return said


@in_our_settings
def matrix_picture(matrix: Sequence[Sequence[float]], key: str) -> str:
    """Accuracies (T, T) in percent as a grid of squares, the darker the higher: task across, stage down."""
    size = len(matrix)
    figure, axes = canvas(480, 400, left=70, right=20, bottom=56, top=10)
    for stage, row in enumerate(matrix):
        for task, value in enumerate(row):
            axes.fill_between(
                [task - 0.47, task + 0.47],
                stage - 0.47,
                stage + 0.47,
                color=COLOURS["after"],
                alpha=0.6 * value / 100,
                lw=0,
            )
            if size <= _LABELLED:
                axes.text(task, stage, f"{value:.0f}", ha="center", va="center", color=COLOURS["ink"])
    axes.set_xlim(-0.5, size - 0.5)
    axes.set_ylim(size - 0.5, -0.5)
    shown = range(0, size, max(1, -(-size // 10)))
    for axis, words in ((axes.xaxis, "accuracy on task"), (axes.yaxis, "after task")):
        axis.set_ticks(list(shown), [str(place + 1) for place in shown])
        axis.set_label_text(words, color=COLOURS["muted"])
    axes.tick_params(length=0, labelcolor=COLOURS["muted"], pad=6)
    told = "; ".join(f"after task {n + 1}: {', '.join(map(number, row))}" for n, row in enumerate(matrix))
    return svg(figure, key, "Accuracy on each task after each task", f"In percent, {told}.")


def _course(tasks: Sequence[str], learners: dict[str, Any]) -> str:
    """Accuracy on the classes so far; of more learners than there are colours, the first ones."""
    lines = [plots.Line(name, one["seen"], role) for role, (name, one) in zip(_ROLES, learners.items(), strict=False)]
    return plots.sweep(tasks, lines, "course", "Accuracy on the classes so far", along="tasks met")
