"""What a written solution answers, and whether that is right.  A text that answers nothing is `unparseable`: an outcome
of its own, for a model that rambles and one that errs have different faults.

An extractor takes a text and returns the answer in it as text, or None.  Two answers are the same if they are the same
number (1,234.50 and 1234.5; 0.5 and \\frac{1}{2}), or else the same words without case, spaces and signs around them.
Knows nothing of models.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Literal

from palimpsest.core.errors import InputError

Outcome = Literal["right", "wrong", "unparseable"]
Extractor = Callable[[str], str | None]

_DIGITS = r"(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)(?:\.\d+)?|\.\d+"
_NUMBER = re.compile(rf"(?<![\w.])[-+\u2212]?\s?\$?(?:{_DIGITS})(?:\s?/\s?(?:{_DIGITS}))?")
_FRACTION = re.compile(r"\\[dt]?frac\s*\{([^{}]+)\}\s*\{([^{}]+)\}")
_NOISE = re.compile(r"\\(?:left|right|text|mathrm|mbox|[,;!:])|[\s$%{}]|\\%")
_SAID = re.compile(r"(?:answer|result)\s*(?:is|:|=)+\s*:?\s*(.+)", re.IGNORECASE)


def final(text: str) -> str | None:
    """What a solution ends in: a boxed answer, what follows ``####``, what "the answer is", or the last number."""
    for extract in (boxed, marked, said):
        if (found := extract(text)) is not None:
            return found
    return last_number(text)


def boxed(text: str) -> str | None:
    """The content of the last ``\\boxed{...}`` that is closed."""
    for opening in reversed([found.end() for found in re.finditer(r"\\f?boxed\s*\{", text)]):
        depth = 1
        for place in range(opening, len(text)):
            depth += {"{": 1, "}": -1}.get(text[place], 0)
            if depth == 0:
                return text[opening:place].strip() or None
    return None


def marked(text: str, mark: str = "####") -> str | None:
    """The rest of the line behind the last `mark`."""
    if mark not in text:
        return None
    return text.rsplit(mark, 1)[1].strip().split("\n")[0].strip() or None


def said(text: str) -> str | None:
    """The number behind the last "answer is" or "answer:", or what stands there if there is none."""
    found = _SAID.findall(text)
    if not found:
        return None
    first = _NUMBER.search(found[-1])
    return first.group().strip() if first else found[-1].strip().rstrip(".") or None


def last_number(text: str) -> str | None:
    found = _NUMBER.findall(text)
    return found[-1].strip() if found else None


def option(text: str, letters: str = "ABCDE") -> str | None:
    """The letter of a multiple-choice answer: "(B)", "B.", "the answer is B"; None if several are named last."""
    named = re.findall(rf"(?<!\w)\(?([{letters}])(?:\)|\.|:|(?!\w))", text)
    behind = re.findall(rf"answer\s*(?:is|:)+\s*\(?([{letters}])(?!\w)", text, re.IGNORECASE)
    if behind:
        return str(behind[-1]).upper()
    return str(named[0]) if len(set(named)) == 1 else None


def digits(text: str) -> str | None:
    """The whole text, if it is made of digits alone: for answers whose places matter (0150 is not 150)."""
    stripped = text.strip()
    return stripped if re.fullmatch(r"[0-9]+", stripped) else None


def number(text: str) -> Fraction | None:
    """The value of a text that is one number: signs of currency, percent and thousands are ignored."""
    plain = _FRACTION.sub(r"\1/\2", text)
    plain = _NOISE.sub("", plain).replace("\u2212", "-").rstrip(".")
    if not re.fullmatch(rf"[-+]?(?:{_DIGITS})(?:/[-+]?(?:{_DIGITS}))?", plain):
        return None
    above, _, below = plain.replace(",", "").partition("/")
    return None if below and Fraction(below) == 0 else Fraction(above) / Fraction(below or 1)


def same(one: str, other: str, tolerance: float = 0.0) -> bool:
    """Whether two answers are equal; `tolerance` is relative, for numbers."""
    values = number(one), number(other)
    if values[0] is not None and values[1] is not None:
        allowed = Fraction(tolerance) * max(abs(values[0]), abs(values[1]))
        return abs(values[0] - values[1]) <= allowed
    return _words(one) == _words(other)


def _words(text: str) -> str:
    return " ".join(text.casefold().split()).strip(" .,;:!?'\"$")


def outcome(response: str, truth: str, extract: Extractor = final, equal: Callable[[str, str], bool] = same) -> Outcome:
    """How a response compares with the answer `truth`, which stands as it is or in a solution.  `InputError` for a
    truth that answers nothing.
    """
    wanted = extract(truth)
    if wanted is None:
        wanted = truth.strip() or None
    if wanted is None:
        raise InputError("a truth is blank: no response can be right")
    found = extract(response)
    if found is None:
        return "unparseable"
    return "right" if equal(found, wanted) else "wrong"


@dataclass(frozen=True)
class Marks:
    """How many responses were right, wrong, and no answer."""

    right: int
    wrong: int
    unparseable: int

    @staticmethod
    def of(outcomes: Iterable[Outcome]) -> Marks:
        counts = Counter(outcomes)
        return Marks(counts["right"], counts["wrong"], counts["unparseable"])

    @property
    def total(self) -> int:
        return self.right + self.wrong + self.unparseable

    @property
    def accuracy(self) -> float:
        """Right ones among all: no answer is no right answer."""
        return self.right / max(self.total, 1)

    @property
    def answered(self) -> float:
        """The share that says anything."""
        return 1 - self.unparseable / max(self.total, 1)


def marks(
    responses: Sequence[str],
    truths: Sequence[str],
    extract: Extractor = final,
    equal: Callable[[str, str], bool] = same,
) -> list[Outcome]:
    """`outcome` of each response, (N,).  `InputError` unless there are as many truths."""
    if len(responses) != len(truths):
        raise InputError(f"{len(responses)} responses for {len(truths)} truths: each truth needs one response")
    return [outcome(response, truth, extract, equal) for response, truth in zip(responses, truths, strict=True)]
