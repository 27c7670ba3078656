"""Records tables: `datasets.Dataset` tables whose rows are documents, questions with answers, or conversations.

A row is read by the first of these that it has (a value of None counts as absent):

1. ``prompt`` and ``completion``: a question; the model is scored on the completion only;
2. ``messages``, a list of ``{"role", "content"}``: the last assistant message is the completion, the contents of the
   messages before it, one a line, are the prompt;
3. ``text``: a document, scored whole.

One table may mix all three; other columns are carried along untouched.  Knows nothing of files or models.
"""

from __future__ import annotations

import hashlib
import json
import unicodedata
from collections.abc import Iterator, Mapping
from typing import Any

import datasets
from datasets import Dataset

from palimpsest.core.errors import InputError

COLUMNS = ("prompt", "completion", "messages", "text")
_CHUNK = 4096  # rows turned into Python values at a time


def pairs(table: Dataset) -> list[tuple[str, str]]:
    """Every row as (prompt, completion), in order; a document is ("", text).

    Prompt and completion are meant to be written one after the other: where neither side brings white space, the
    completion gets one space in front.  A row without content is an `InputError`.
    """
    return [pair for _, pair in _rows(table)]


def documents(table: Dataset) -> list[str]:
    """The texts of the rows that are documents, in order."""
    return [completion for kind, (_, completion) in _rows(table) if kind == "document"]


def questions(table: Dataset) -> list[tuple[str, str]]:
    """The rows that are questions or conversations as (prompt, completion), joined as in `pairs`, in order."""
    return [pair for kind, pair in _rows(table) if kind == "question"]


def select_documents(table: Dataset) -> Dataset:
    """The rows that `documents` reads, with all their columns."""
    return table.select([row for row, (kind, _) in enumerate(_rows(table)) if kind == "document"])


def select_questions(table: Dataset) -> Dataset:
    """The rows that `questions` reads, with all their columns."""
    return table.select([row for row, (kind, _) in enumerate(_rows(table)) if kind == "question"])


def content_hashes(table: Dataset) -> list[bytes]:
    """A 16-byte hash of each row's content; equal for rows that differ in white space or Unicode form alone."""
    return [_content_hash(pair) for _, pair in _rows(table)]


def sha256(table: Dataset) -> str:
    """SHA-256 of the rows' contents in order: the same whatever file, column names or extra columns they came with."""
    digest = hashlib.sha256()
    for _, pair in _rows(table):
        digest.update(json.dumps(pair, ensure_ascii=False).encode("utf-8", "surrogatepass") + b"\n")
    return digest.hexdigest()


def concat(*tables: Dataset | None) -> Dataset:
    """All rows of all tables (None is skipped), with the union of their columns; what a row lacks is None.

    Columns whose types disagree between the tables become strings (JSON where they were no strings): an extra column
    that nobody reads must not stop the work.
    """
    given = [table.with_format(None) for table in tables if table is not None]
    if not given:
        raise InputError("no table to concatenate")
    if len(given) == 1:
        return given[0]
    types: dict[str, set[str]] = {}
    for table in given:
        for name, feature in table.features.items():
            if feature != datasets.Value("null"):
                types.setdefault(name, set()).add(repr(feature))
    clashing = {name for name, found in types.items() if len(found) > 1}
    return datasets.concatenate_datasets([stringify(table, clashing & set(table.column_names)) for table in given])


def stringify(table: Dataset, columns: set[str]) -> Dataset:
    """`table` with the values of `columns` as strings: strings stay, None stays, the rest becomes JSON."""
    for name in sorted(columns):
        if table.features[name] != datasets.Value("string"):
            values = [as_string(value) for value in table.with_format(None)[name]]
            position = table.column_names.index(name)
            order = table.column_names
            table = table.remove_columns(name).add_column(name, values, feature=datasets.Value("string"))
            table = table.select_columns([*order[:position], name, *order[position + 1 :]])
    return table


def as_string(value: Any) -> str | None:
    if value is None or isinstance(value, str):
        return value
    return json.dumps(value, ensure_ascii=False, default=str)


def row_pair(row: Mapping[str, Any]) -> tuple[str, tuple[str, str]] | None:
    """("question" or "document", (prompt, completion)) of one row; None if it has no content."""
    if row.get("prompt") is not None and row.get("completion") is not None:
        return "question", _joined(row["prompt"], row["completion"])
    if row.get("messages"):
        messages = row["messages"]
        spoken = [place for place, message in enumerate(messages) if message["role"] == "assistant"]
        if spoken:
            before = "\n".join(message["content"] for message in messages[: spoken[-1]])
            return "question", _joined(before, messages[spoken[-1]]["content"])
        return "document", ("", "\n".join(message["content"] for message in messages))
    if row.get("text") is not None:
        return "document", ("", row["text"])
    return None


def _joined(prompt: str, completion: str) -> tuple[str, str]:
    touching = prompt and completion and not prompt[-1].isspace() and not completion[0].isspace()
    return prompt, f" {completion}" if touching else completion


def _rows(table: Dataset) -> Iterator[tuple[str, tuple[str, str]]]:
    names = [name for name in COLUMNS if name in table.column_names]
    if not names:
        found = ", ".join(table.column_names) or "none"
        raise InputError(f"a table with the columns {found}; wanted 'text', 'prompt' and 'completion', or 'messages'")
    arrow = table.select_columns(names).with_format("arrow")
    for start in range(0, len(table), _CHUNK):
        for offset, row in enumerate(arrow[start : start + _CHUNK].to_pylist()):
            pair = row_pair(row)
            if pair is None:
                raise InputError(f"row {start + offset} of the table has neither text nor prompt and completion")
            yield pair


def _content_hash(pair: tuple[str, str]) -> bytes:
    sides = (" ".join(unicodedata.normalize("NFC", side).split()) for side in pair)
    return hashlib.blake2b("\0".join(sides).encode("utf-8", "surrogatepass"), digest_size=16).digest()
