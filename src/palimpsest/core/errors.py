"""What a person did wrong, said in one line.  Knows nothing of models or data."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class InputError(ValueError):
    """The user's input cannot be used.  The command line prints the message alone and exits with code 2.

    A message says what was found, where, and what is wanted: ``leaked.jsonl:17: not valid JSON (Expecting ',')``.
    """


class MissingExtra(InputError):
    """A feature needs a package that is not installed; names the extra that brings it."""

    def __init__(self, package: str, extra: str):
        super().__init__(f"this needs the package '{package}': pip install 'palimpsest[{extra}]'")


def unknown(kind: str, name: str, known: Iterable[str]) -> InputError:
    """An `InputError` for a name that is not known, with the nearest known names."""
    choices = sorted(known)
    near = difflib.get_close_matches(name.lower(), choices, n=3, cutoff=0.5)
    hint = f"did you mean {' or '.join(near)}?" if near else f"known: {', '.join(choices)}"
    return InputError(f"unknown {kind} '{name}': {hint}")
