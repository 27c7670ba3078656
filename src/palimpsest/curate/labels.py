"""What a text is to be labelled with, how a large model is asked for it, and what becomes of its answers.

A `Schema` has fields of two kinds: a class among named ones, or a whole number on a scale whose points are described.
An answer that cannot be read, or gives a label that the schema does not know, is asked for once more and then set
aside: it is counted and shown, never guessed at.  Knows nothing of students or of what labels are good for.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from palimpsest.core.errors import InputError
from palimpsest.curate import pool
from palimpsest.data.teacher import Teacher

_CHARACTERS = 6_000  # of a text that the teacher reads
_TOKENS = 300  # of its answer: a short reason and a line of JSON
_SHOWN = 120  # characters of an answer in the report

Labels = dict[str, str | int]  # by field: the name of a class, or a point of a scale


@dataclass(frozen=True)
class Field:
    """One thing to say of a text."""

    name: str
    points: Mapping[str, str]  # class, or whole number, as text: what it means
    scale: bool = False  # are the points numbers whose order and distance count?

    def read(self, value: Any) -> str | int | None:
        """The label that `value` stands for; None if it is not one of the field's."""
        if isinstance(value, float) and value.is_integer():
            value = int(value)
        if not isinstance(value, str | int) or isinstance(value, bool):
            return None
        known = {point.casefold(): point for point in self.points}
        point = known.get(" ".join(str(value).replace("_", " ").split()).casefold())
        return point if point is None or not self.scale else int(point)


@dataclass(frozen=True)
class Schema:
    """The fields, and as whom the teacher is asked."""

    fields: tuple[Field, ...]
    role: str = "You are a careful annotator of texts."

    def __post_init__(self) -> None:
        if not self.fields:
            raise InputError("the schema has no fields; wanted at least one")
        for field in self.fields:
            if len(field.points) < 2:
                raise InputError(f"the field '{field.name}' has {len(field.points)} labels; wanted at least two")
            if field.scale and not all(point.lstrip("-").isdecimal() for point in field.points):
                raise InputError(f"the scale '{field.name}' has the points {', '.join(field.points)}; wanted numbers")

    def __getitem__(self, name: str) -> Field:
        for field in self.fields:
            if field.name == name:
                return field
        raise InputError(f"the schema has no field '{name}'; it has {', '.join(field.name for field in self.fields)}")

    @staticmethod
    def from_json(value: Any, where: str = "the schema") -> Schema:
        """From ``{"role": ..., "fields": {NAME: {"classes" | "scale": {LABEL: MEANING}}}}``."""
        try:
            fields = tuple(_field(name, told) for name, told in value["fields"].items())
        except (KeyError, TypeError, AttributeError, ValueError) as error:
            raise InputError(
                f'{where}: wanted {{"fields": {{NAME: {{"classes" or "scale": {{LABEL: MEANING, ...}}}}, ...}}}} '
                f"({type(error).__name__}: {error})"
            ) from None
        return Schema(fields, str(value.get("role", Schema.role)))

    @staticmethod
    def load(path: str | Path) -> Schema:
        try:
            return Schema.from_json(json.loads(Path(path).read_text(encoding="utf-8")), str(path))
        except (OSError, ValueError) as error:
            raise InputError(f"{path}: not a schema ({error})") from None

    def to_json(self) -> dict[str, Any]:
        fields = {field.name: {"scale" if field.scale else "classes": dict(field.points)} for field in self.fields}
        return {"role": self.role, "fields": fields}

    def instructions(self) -> str:
        """What the teacher is told once, before any text."""
        lines = [
            self.role,
            "Judge only the text that you are given, not what might stand around it. Its language, its length and "
            "placeholders for names do not matter.",
        ]
        for field in self.fields:
            kind = "a number on this scale" if field.scale else "one of these classes"
            lines += ["", f"{field.name}: {kind}", *(f"- {point}: {told}" for point, told in field.points.items())]
        shape = {field.name: "..." for field in self.fields}
        lines += ["", f"Give a reason in one sentence, then on a last line of its own: {json.dumps(shape)}"]
        return "\n".join(lines)

    def labels(self, found: Mapping[str, Any]) -> tuple[Labels, str]:
        """The labels that `found` holds by field, and why they cannot be used ("" if they can)."""
        labels: Labels = {}
        for field in self.fields:
            if field.name not in found:
                return {}, f"{field.name} is missing"
            label = field.read(found[field.name])
            if label is None:
                return {}, f"unknown {field.name} {str(found[field.name])[:40]!r}"
            labels[field.name] = label
        return labels, ""

    def read(self, answer: str) -> tuple[Labels, str]:
        """As `labels`, of what a teacher said."""
        found = _last_object(answer)
        return ({}, "no JSON object") if found is None else self.labels(found)


def _field(name: str, told: Mapping[str, Any]) -> Field:
    (kind,) = told
    if kind not in ("classes", "scale"):
        raise ValueError(f"'{name}' has '{kind}', wanted 'classes' or 'scale'")
    points = told[kind]
    return Field(name, {str(point): str(meaning) for point, meaning in points.items()}, kind == "scale")


def _last_object(answer: str) -> dict[str, Any] | None:
    """The last JSON object in a text."""
    decoder, start = json.JSONDecoder(), answer.rfind("{")
    while start >= 0:
        try:
            found, _ = decoder.raw_decode(answer, start)
        except json.JSONDecodeError:
            found = None
        if isinstance(found, dict):
            return found
        start = answer.rfind("{", 0, start)
    return None


@dataclass(frozen=True)
class Labelled:
    """What labelling a sample came to."""

    rows: list[dict[str, Any]]  # text, context, article, and one label a field
    aside: list[dict[str, str]]  # text, answer, why
    by: str  # who labelled

    def reasons(self) -> Counter[str]:
        return Counter(row["why"] for row in self.aside)


def prompt(text: str, context: str = "") -> str:
    """What the teacher is asked about one text; `context` is what stands above it, such as the title of its section."""
    above = f"It stands under: {context}\n\n" if context else ""
    return f"{above}The text:\n{text[:_CHARACTERS]}"


def annotate(teacher: Teacher, schema: Schema, rows: Sequence[Mapping[str, Any]]) -> Labelled:
    """Ask `teacher` for the labels of rows with "text" and, where there is one, "context".  Raises as `Teacher.ask`."""
    asked = [prompt(row["text"], row.get("context") or "") for row in rows]
    how = {"system": schema.instructions(), "max_tokens": _TOKENS}
    answers = teacher.ask(asked, **how)
    read = [schema.read(answer) for answer in answers]
    bad = [place for place, (_, why) in enumerate(read) if why]
    again = [
        f"{asked[place]}\n\nAn earlier answer could not be used ({read[place][1]}). Give the reason and the line again."
        for place in bad
    ]
    for place, answer in zip(bad, teacher.ask(again, **how) if again else [], strict=True):
        answers[place], read[place] = answer, schema.read(answer)
    good, aside = [], []
    for row, answer, (labels, why) in zip(rows, answers, read, strict=True):
        if why:
            aside.append({"text": row["text"][:_SHOWN], "answer": answer.strip()[-_SHOWN:], "why": why})
        else:
            good.append({**row, **labels})
    return Labelled(good, aside, teacher.name)


def annotated(path: str | Path, schema: Schema, *, text: str, context: str = "", article: str = "") -> Labelled:
    """Rows that somebody has labelled: a file with a column of texts and one a field.  Raises `InputError`."""
    table = [row for shard in pool.shards(path) for row in shard.frame().to_pylist()]
    wanted = [text, *(field.name for field in schema.fields)]
    for name in wanted:
        if not table or name not in table[0]:
            found = ", ".join(f"'{column}'" for column in table[0]) if table else "no rows"
            raise InputError(f"{path}: no column '{name}'; found {found}; wanted {', '.join(wanted)}")
    good: list[dict[str, Any]] = []
    aside: list[dict[str, str]] = []
    for row in table:
        if not str(row[text] or "").strip():
            aside.append({"text": "", "answer": "", "why": "no text"})
            continue
        labels, why = schema.labels(row)
        if why:
            aside.append(
                {
                    "text": str(row[text])[:_SHOWN],
                    "answer": str({field.name: row[field.name] for field in schema.fields})[:_SHOWN],
                    "why": why,
                }
            )
            continue
        more = {"context": row.get(context) or "", "article": str(row[article]) if row.get(article) is not None else ""}
        good.append({"text": str(row[text]), **more, **labels})
    return Labelled(good, aside, Path(path).name)


BIOMEDICAL = Schema.from_json(  # the fields of the paper; the wording is ours, its own prompt is not published
    {
        "role": "You are an experienced editor of biomedical texts who labels single paragraphs of articles.",
        "fields": {
            "type": {
                "classes": {
                    "clinical case": "tells of a single patient: complaint, findings, treatment, course",
                    "study": "tells of an investigation: its methods, subjects, measurements or results",
                    "review": "sums up or explains what is known, without new data",
                    "other": "none of these: funding, acknowledgements, addresses, captions, licences, lists",
                }
            },
            "domain": {
                "classes": {
                    "clinical": "care of patients: diagnosis, treatment, prognosis, guidelines",
                    "biomedical": "the science below it: molecules, cells, animals, methods, epidemiology",
                    "other": "neither",
                }
            },
            "educational": {
                "scale": {
                    "1": "nothing to learn for a student of the field, or not understandable on its own",
                    "2": "touches on something worth knowing, in fragments or without saying how it hangs together",
                    "3": "would do in a lecture: says something worth knowing, with gaps or side matters",
                    "4": "clear and coherent, could stand in a textbook for college students",
                    "5": "outstanding: explains exactly, completely and in good order, hardly a word too many",
                }
            },
        },
    }
)
