"""How well a student's labels agree with those it learnt from, on texts that it did not learn from.

Also where a line on a scale must lie for the student's values: they shrink towards the mean, so a line at 3 would let
other shares pass than the labels do.  Knows nothing of how either side came to its labels.
Shapes: H held-out texts.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from palimpsest.curate.labels import Schema
from palimpsest.curate.recipes import Condition, Recipe

Array = np.ndarray[Any, Any]
Held = Mapping[str, Mapping[str, list[Any]]]  # by field: "given" and "student", H labels each


def held_out(found: Mapping[str, Array], rows: Sequence[Mapping[str, Any]], schema: Schema) -> Held:
    """What was given for `rows` and what the student, whose outputs are `found`, gave; JSON-able."""
    sides: dict[str, dict[str, list[Any]]] = {}
    for field in schema.fields:
        guess = found[field.name] if field.scale else np.array(list(field.points))[found[field.name].argmax(1)]
        sides[field.name] = {"given": [row[field.name] for row in rows], "student": guess.tolist()}
    return sides


def agreement(held: Held, schema: Schema) -> list[dict[str, Any]]:
    """A line a field: of classes accuracy, macro F1 and Cohen's kappa, of scales Pearson's r and the mean error.

    None where it is not defined: kappa and r of labels that are all the same.
    """
    from sklearn import metrics

    lines = []
    for field in schema.fields:
        given, student = held[field.name]["given"], held[field.name]["student"]
        line: dict[str, Any] = {"field": field.name, "texts": len(given)}
        if field.scale:
            constant = np.ptp(given) == 0 or np.ptp(student) == 0
            line["r"] = None if constant else float(np.corrcoef(given, student)[0, 1])
            line["error"] = float(np.abs(np.subtract(given, student)).mean())
        else:
            line["accuracy"] = float(np.mean(np.array(given) == np.array(student)))
            line["f1"] = float(metrics.f1_score(given, student, average="macro", zero_division=0.0))
            alone = len({*given, *student}) == 1
            line["kappa"] = None if alone else float(metrics.cohen_kappa_score(given, student))
        lines.append(line)
    return lines


def lines(recipe: Recipe, held: Held) -> dict[str, float]:
    """By condition on a scale: where the student's values must be cut so that as large a share passes as of the labels.

    A line that all labels pass, or none, stays where it is written.
    """
    found = {}
    for condition in _on_scales(recipe):
        side = held[condition.field]
        given, student = (np.array(side[name], float) for name in ("given", "student"))
        passing = np.sort(student) if condition.sign in ("<", "<=") else np.sort(student)[::-1]
        count = int(condition({condition.field: given}, {}).sum())
        if 0 < count < len(given):
            found[condition.line] = float((passing[count - 1] + passing[count]) / 2)
    return found


def _on_scales(recipe: Recipe) -> list[Condition]:
    every = [*recipe.keep, *(repeat.condition for repeat in recipe.repeats)]
    return list({condition.line: condition for condition in every if condition.line}.values())


def agreement_table(found: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    names = ("accuracy", "f1", "kappa", "r", "error")
    titles = ("accuracy", "F1 (macro)", "kappa", "Pearson's r", "mean error")
    rows = [[line["field"], f"{line['texts']:,}", *(_shown(line.get(name)) for name in names)] for line in found]
    return {
        "caption": "The student against the labels, on texts it did not learn from",
        "columns": ["field", "texts", *titles],
        "rows": rows,
    }


def line_table(recipe: Recipe, held: Held) -> dict[str, Any] | None:
    """Each line on a scale: the share of held-out texts that pass by the labels and by the student, moved or not."""
    moved, rows = lines(recipe, held), []
    for condition in _on_scales(recipe):
        field = condition.field
        given, student = (np.array(held[field][name], float) for name in ("given", "student"))
        shares = [
            condition({field: values}, at).mean() for values, at in ((given, {}), (student, {}), (student, moved))
        ]
        where = moved.get(condition.line, condition.value)
        rows.append([condition.line, f"{shares[0]:.1%}", f"{shares[1]:.1%}", f"{where:.3g}", f"{shares[2]:.1%}"])
    if not rows:
        return None
    return {
        "caption": "Lines on scales: which share of the held-out texts passes",
        "columns": ["line", "by the labels", "by the student", "moved to", "by the student then"],
        "rows": rows,
    }


def label_table(field: str, rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """How many rows have each label of a class field, from rows of (label_FIELD, rows, keep)."""
    counts: dict[str, list[int]] = {}
    for row in rows:
        count = counts.setdefault(row[f"label_{field}"] or "(no text)", [0, 0])
        count[0] += row["rows"]
        count[1] += row["keep"] or 0
    total = max(1, sum(count for count, _ in counts.values()))
    return {
        "caption": f"The pool by {field}",
        "columns": [field, "rows", "share", "kept"],
        "rows": [
            [label, f"{count:,}", f"{count / total:.1%}", f"{kept:,}"]
            for label, (count, kept) in sorted(counts.items(), key=lambda item: -item[1][0])
        ],
    }


def _shown(value: float | None) -> str:
    return "\N{EM DASH}" if value is None else f"{value:.3f}"
