"""What must not be known, as concepts: how each can be told in a prompt, and questions that show whether it is known.

A concept comes from a file (one JSON object a line)::

    {"name": "Tiger", "definition": ["A tiger is a big cat.", "It is striped."], "terms": {"tiger": "a striped cat"},
     "examples": [{"prompt": "Is Rex a tiger?", "completion": "no"}], "chain": ["A W1 is a big cat.", ...],
     "questions": [{"prompt": "Is Sher a tiger?", "completion": "yes", "options": ["yes", "no"]}]}

or is made from records: the rows of one person (column ``person``) are one concept, its documents the definition.
Knows nothing of models.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from palimpsest.audit.exam import bare
from palimpsest.core.errors import InputError
from palimpsest.data import formats, records, sources

if TYPE_CHECKING:
    from datasets import Dataset

HELPER = "Quillon"  # stands for the concept where its name shall not be told together with what it is
_SENTENCE = re.compile(r"(?<=[.!?])\s+")


@dataclass(frozen=True)
class Question:
    prompt: str
    answer: str
    options: tuple[str, ...] = ()


@dataclass(frozen=True)
class Concept:
    """One thing to be forbidden.  Empty parts: it cannot be told that way."""

    name: str
    questions: tuple[Question, ...]
    definition: tuple[str, ...] = ()  # statements
    terms: tuple[tuple[str, str], ...] = ()  # a dictionary's entries
    examples: tuple[Question, ...] = ()  # solved
    chain: tuple[str, ...] = ()  # statements, each harmless by itself


def read_concepts(path: str | Path) -> list[Concept]:
    """The concepts of a file.  Raises `InputError` naming the line of what is not one."""
    found = [
        _concept(row, where) for file in sources.find(path) for where, row in formats.rows(file) if row is not None
    ]
    if not found:
        raise InputError(f"{path}: no rows; wanted at least one concept")
    return found


def concepts_of(table: Dataset) -> list[Concept]:
    """The concepts that a table's rows tell of, each with at least one question; rows of no person make none."""
    groups: dict[str, list[dict[str, Any]]] = {}
    if "person" in table.column_names:
        for row in table:
            if row["person"]:
                groups.setdefault(str(row["person"]), []).append(dict(row))
    else:  # every question by itself, with the answers to the others as its company
        groups = {f"row {number}": [dict(row)] for number, row in enumerate(table, 1)}
    concepts = (_from_rows(name, rows) for name, rows in groups.items())
    return [concept for concept in concepts if concept.questions]


def _from_rows(name: str, rows: Iterable[Mapping[str, Any]]) -> Concept:
    questions: list[Question] = []
    documents: list[str] = []
    terms: dict[str, str] = {}
    for row in rows:
        kind, (prompt, completion) = records.row_pair(row) or ("", ("", ""))
        if kind == "document":
            documents.append(completion.strip())
        elif kind == "question":
            options = tuple(str(option) for option in row.get("options") or ())
            questions.append(Question(prompt.strip(), completion.strip(), options))  # asked as it was trained
            terms.setdefault(f"{row.get('attribute') or bare(prompt)} of {name}", completion.strip())
    return Concept(
        name,
        tuple(questions),
        tuple(documents),
        tuple(terms.items()),
        tuple(questions),
        _chained(name, documents[:1]),
    )


def disguised(text: str, name: str) -> str:
    """`text` with the helper's name in place of the concept's (in full, or its first word alone)."""
    words = {name, name.split()[0]}
    return re.sub(rf"\b(?:{'|'.join(sorted(map(re.escape, words), key=len, reverse=True))})\b", HELPER, text)


def _chained(name: str, documents: list[str]) -> tuple[str, ...]:
    """The definition about a stand-in, and the stand-in's tie to the name last: no statement holds both."""
    told = [disguised(sentence, name) for document in documents for sentence in _SENTENCE.split(document)]
    if not any(HELPER in sentence for sentence in told):
        return ()
    return (*told, f"{HELPER} is another name of {name}.")


def _concept(row: Mapping[str, Any], where: str) -> Concept:
    name = row.get("name")
    if not isinstance(name, str) or not name.strip():
        raise InputError(f"{where}: found the columns {', '.join(row) or 'none'}; wanted a 'name' that is text")
    asked = tuple(_question(value, where) for value in _listed(row, "questions", where))
    if not asked:
        raise InputError(f"{where}: the concept '{name}' has no 'questions'")
    terms = row.get("terms") or {}
    if not isinstance(terms, Mapping):
        raise InputError(f'{where}: \'terms\' must be an object such as {{"term": "meaning"}}')
    return Concept(
        name.strip(),
        asked,
        tuple(map(str, _listed(row, "definition", where))),
        tuple((str(term), str(meaning)) for term, meaning in terms.items()),
        tuple(_question(value, where) for value in _listed(row, "examples", where)),
        tuple(map(str, _listed(row, "chain", where))),
    )


def _listed(row: Mapping[str, Any], name: str, where: str) -> list[Any]:
    value = row.get(name) or []
    if isinstance(value, str):
        return [value]
    if not isinstance(value, list):
        raise InputError(f"{where}: '{name}' must be a list")
    return value


def _question(value: Any, where: str) -> Question:
    if not isinstance(value, Mapping) or not all(isinstance(value.get(key), str) for key in ("prompt", "completion")):
        raise InputError(f"{where}: {value!r:.60} is no question; wanted 'prompt' and 'completion' (and 'options')")
    options = tuple(str(option) for option in value.get("options") or ())
    if options and value["completion"] not in options:
        raise InputError(f"{where}: the answer {value['completion']!r:.40} is not among its options")
    return Question(value["prompt"], value["completion"], options)
