"""Which columns of a source are meant by text, prompt, completion and messages, and whether a row can be used.

Names are compared without case and outer spaces.  The first name of a line that a row has is taken and renamed:

==============  ===================================================================
``text``        text, document, content, passage
``prompt``      prompt, question, instruction, query, input
``completion``  completion, answer, response, output, target
``messages``    messages
==============  ===================================================================

Where a row has both ``instruction`` and ``input`` (Alpaca's form), the prompt is both, a line each.
Every other column is kept under its own name.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import lru_cache
from typing import Any, Literal

from palimpsest.core.errors import InputError

Wanted = Literal["any", "documents", "questions"]

ALIASES = {
    "text": ("text", "document", "content", "passage"),
    "prompt": ("prompt", "question", "instruction", "query", "input"),
    "completion": ("completion", "answer", "response", "output", "target"),
    "messages": ("messages",),
}
WANTED = {
    "any": "'text', or 'prompt' and 'completion' (or 'question' and 'answer'), or 'messages'",
    "documents": "'text'",
    "questions": "'prompt' and 'completion' (or 'question' and 'answer'), or 'messages'",
}


def canonical(row: Mapping[str, Any], where: str, wanted: Wanted = "any") -> dict[str, Any]:
    """`row` under the canonical column names; an `InputError` that begins with `where` if it cannot be used."""
    names, join = renamed(tuple(row))
    clean = {names[key]: value for key, value in row.items()}
    for key, name in names.items():
        value = row[key]
        read = name in ("text", "prompt", "completion") or (join is not None and key in join)
        if read and value is not None and not isinstance(value, str):
            raise InputError(f"{where}: '{key}' is {_type(value)} ({_short(value)}); wanted a string")
    if join is not None:
        clean["prompt"] = "\n".join(row[key] for key in join if row[key]) or None
        del clean[join[1]]
    if clean.get("messages") is not None:
        _check_messages(clean["messages"], where)
    _check_kind(row, clean, names, where, wanted)
    return clean


def _check_kind(
    row: Mapping[str, Any], clean: Mapping[str, Any], names: Mapping[str, str], where: str, wanted: Wanted
) -> None:
    question = clean.get("prompt") is not None and clean.get("completion") is not None
    usable = {
        "questions": question or bool(clean.get("messages")),
        "documents": clean.get("text") is not None,
    }
    if not (any(usable.values()) if wanted == "any" else usable[wanted]):
        found = ", ".join(f"'{name}'" for name in list(row)[:12]) or "none"
        found += f" and {len(row) - 12} more" if len(row) > 12 else ""
        empty = [f"'{key}'" for key, name in names.items() if name in ALIASES and row[key] in (None, "", [])]
        hint = f" ({' and '.join(empty)} {'is' if len(empty) == 1 else 'are'} empty)" if empty else ""
        raise InputError(f"{where}: found the columns {found}{hint}; wanted {WANTED[wanted]}")
    scored = "completion" if question else "text"
    if clean.get(scored) is not None and not clean[scored].strip():
        shown = next(key for key, name in names.items() if name == scored)
        raise InputError(f"{where}: '{shown}' is blank; wanted text (delete the row or fill it)")


@lru_cache(maxsize=256)
def renamed(found: tuple[str, ...]) -> tuple[dict[str, str], tuple[str, str] | None]:
    """(column found -> its name here, (instruction, input) columns if both are there)."""
    folded: dict[str, str] = {}
    for name in (*found, *(name for name in found if name in ALIASES)):  # an exact name beats one in other case
        folded[name.strip().lower()] = name
    names = {name: name for name in found}
    for target, aliases in ALIASES.items():
        alias = next((alias for alias in aliases if alias in folded), None)
        if alias is not None:
            names[folded[alias]] = target
    join = None
    if "prompt" not in folded and "question" not in folded and {"instruction", "input"} <= set(folded):
        join = (folded["instruction"], folded["input"])
    return names, join


def read_columns(found: tuple[str, ...]) -> tuple[str, ...]:
    """The columns among `found` that `canonical` looks at; all of them if it knows none, so that it can name them."""
    names, join = renamed(found)
    return tuple(name for name in found if names[name] in ALIASES or (join and name in join)) or found


def _check_messages(messages: Any, where: str) -> None:
    good = isinstance(messages, list) and all(
        isinstance(message, Mapping) and all(isinstance(message.get(key), str) for key in ("role", "content"))
        for message in messages
    )
    if not good:
        wanted = 'a list of {"role": ..., "content": ...} with strings'
        raise InputError(f"{where}: 'messages' is {_short(messages)}; wanted {wanted}")
    if messages and not messages[-1]["content"].strip():
        raise InputError(f"{where}: the last of 'messages' is blank; wanted text (delete the row or fill it)")


def _type(value: Any) -> str:
    if isinstance(value, bool):
        return "true or false"
    if isinstance(value, int | float):
        return "a number"
    if isinstance(value, list):
        return "a list"
    return "an object" if isinstance(value, Mapping) else f"a {type(value).__name__}"


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 40 else f"{text[:37]}..."
