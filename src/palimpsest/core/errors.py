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


class TrainingDiverged(RuntimeError):
    """The loss or the gradient stopped being a finite number.  The model holds the last finite weights."""

    def __init__(self, step: int, of: int, found: str, last: tuple[int, float] | None, lr: float, kept: str = ""):
        before = f"last finite loss {last[1]:.4g} at step {last[0]}" if last else "no finite loss before it"
        super().__init__(
            f"training diverged at step {step} of {of}: {found} ({before}; learning rate {lr:.3g}); "
            f"a smaller lr, a longer warmup or a smaller clip may help{kept}"
        )
        self.step = step
        self.lr = lr
