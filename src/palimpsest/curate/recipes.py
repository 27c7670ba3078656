"""Recipes over labels, as a user writes them: which rows to keep, and how often to repeat the articles they stand in.

``"educational >= 3; domain != other"`` keeps the rows that fit all of it.  ``"most domain = clinical: 10; any type =
clinical case: 10"`` repeats: an article most of whose rows fit, or any of whose rows fits, counts that often; without
``most`` or ``any`` a row counts by itself.  Where several fit, the largest number stands.  Knows nothing of where
labels come from.
Shapes: N rows.
"""

from __future__ import annotations

import operator
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from palimpsest.core.errors import InputError
from palimpsest.curate.labels import Schema

Array = np.ndarray[Any, Any]

_COMPARE: dict[str, Callable[[Any, Any], Any]] = {
    ">=": operator.ge, "<=": operator.le, "!=": operator.ne, "=": operator.eq, ">": operator.gt, "<": operator.lt,
}  # fmt: skip
_CONDITION = re.compile(r"\s*(.+?)\s*(>=|<=|!=|=|>|<)\s*(.+?)\s*")
_REPEAT = re.compile(r"\s*(?:(most|any)\s+)?(.+?)\s*:\s*(\d+)\s*")


@dataclass(frozen=True)
class Condition:
    """A comparison of one field with a point of its scale or one of its classes."""

    field: str
    sign: str
    value: str | float

    @staticmethod
    def parse(text: str, schema: Schema) -> Condition:
        found = _CONDITION.fullmatch(text)
        if not found:
            raise InputError(f"'{text.strip()}' is no condition; wanted FIELD >= NUMBER or FIELD = CLASS")
        name, sign, value = found.groups()
        field = schema[name]
        if field.scale:
            try:
                number = float(value)
            except ValueError:
                raise InputError(f"'{text.strip()}': {name} is a scale; wanted a number, not '{value}'") from None
            if sign in ("=", "!="):
                raise InputError(f"'{text.strip()}': {name} is a scale, which knows >=, >, <= and < only")
            return Condition(name, sign, number)
        label = field.read(value)
        if label is None or sign not in ("=", "!="):
            raise InputError(f"'{text.strip()}': wanted {name} = or != one of {', '.join(field.points)}")
        return Condition(name, sign, label)

    def __call__(self, labels: Mapping[str, Array], lines: Mapping[str, float]) -> Array:
        """(N,) bool; `lines` replaces points of a scale (see `Condition.line`)."""
        return np.asarray(_COMPARE[self.sign](labels[self.field], lines.get(self.line, self.value)), bool)

    @property
    def line(self) -> str:
        """What a line of this condition goes by."""
        return f"{self.field} {self.sign} {self.value:g}" if isinstance(self.value, float) else ""

    def __str__(self) -> str:
        return self.line or f"{self.field} {self.sign} {self.value}"


@dataclass(frozen=True)
class Repeat:
    condition: Condition
    of: str  # "most" or "any" row of an article, "": the row itself
    times: int

    def __call__(self, labels: Mapping[str, Array], lines: Mapping[str, float], articles: Array) -> Array:
        """(N,) bool: the rows that count more; `articles`: (N,) the number of each row's article."""
        fits = self.condition(labels, lines)
        if not self.of:
            return fits
        inside = np.bincount(articles, weights=fits)
        wanted = inside > 0 if self.of == "any" else 2 * inside > np.bincount(articles)
        found: Array = wanted[articles]
        return found


@dataclass(frozen=True)
class Recipe:
    keep: tuple[Condition, ...]
    repeats: tuple[Repeat, ...]

    @staticmethod
    def parse(keep: str, upsample: str, schema: Schema) -> Recipe:
        conditions = tuple(Condition.parse(part, schema) for part in keep.split(";") if part.strip())
        repeats = []
        for part in filter(str.strip, upsample.split(";")):
            found = _REPEAT.fullmatch(part)
            if not found or int(found[3]) < 1:
                raise InputError(f"'{part.strip()}' says not how often; wanted [most | any] CONDITION: TIMES")
            repeats.append(Repeat(Condition.parse(found[2], schema), found[1] or "", int(found[3])))
        return Recipe(conditions, tuple(repeats))

    def __call__(
        self, labels: Mapping[str, Array], articles: Array, lines: Mapping[str, float] | None = None
    ) -> tuple[Array, Array, Array]:
        """(N,) keep, (N,) how often a row counts (0 where it is left out), (N,) why.

        `labels`: by field (N,) classes or values; `articles`: (N,) int, the number of the article of each row.
        """
        lines = lines or {}
        rows = len(articles)
        keep, why = np.ones(rows, bool), np.full(rows, "kept", object)
        for condition in self.keep:
            fits = condition(labels, lines)
            why[keep & ~fits] = f"not {condition}"
            keep &= fits
        weight = np.ones(rows, np.int64)
        for repeat in self.repeats:
            more = repeat(labels, lines, articles) & (repeat.times > weight)
            weight[more] = repeat.times
            why[more & keep] = f"{repeat.of} {repeat.condition}".strip()
        return keep, weight * keep, why
