"""A request to forget: what must go, what may help, what only measures, and what was never seen.

The sets are MUSE's (arXiv:2407.06460): forget, retain (its retain1, which the unlearner may use), utility (its retain2,
trained on but for evaluation alone) and holdout (never trained on, same distribution as forget).
Everything that can be wrong with the sets is found here, when the request is made.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from datasets import Dataset

from palimpsest.core.errors import InputError
from palimpsest.core.seeds import numpy_rng
from palimpsest.data import sources
from palimpsest.data.records import concat, content_hashes, pairs, sha256

SETS = ("forget", "retain", "utility", "holdout", "train")
_APART = (  # sets that may not share a row, and why
    ("forget", "retain", "a row cannot be both forgotten and kept"),
    ("forget", "utility", "a row cannot be both forgotten and kept"),
    ("forget", "holdout", "holdout rows must never have been trained on"),
    ("retain", "holdout", "holdout rows must never have been trained on"),
    ("utility", "holdout", "holdout rows must never have been trained on"),
    ("train", "holdout", "holdout rows must never have been trained on"),
    ("retain", "utility", "utility rows are for evaluation alone"),
)


@dataclass(frozen=True)
class ForgetRequest:
    """Which rows a model must forget, and the sets that forgetting and its audit need.

    Two rows are the same when their contents agree up to white space and Unicode form.  Sets that overlap where they
    must not, and empty sets, raise `InputError`.
    """

    forget: Dataset  # must go
    retain: Dataset | None = None  # may be used by the unlearner
    utility: Dataset | None = None  # trained on, used only for evaluation
    holdout: Dataset | None = None  # never trained on, same distribution as forget
    train: Dataset | None = None  # everything the model was trained on, when known
    name: str = "request"

    def __post_init__(self) -> None:
        hashes = {}
        for name in SETS:
            table = getattr(self, name)
            if table is None:
                continue
            if len(table) == 0:
                raise InputError(f"the {name} set is empty")
            hashes[name] = content_hashes(table)
        for left, right, reason in _APART:
            if left in hashes and right in hashes:
                self._refuse_overlap(left, hashes[left], right, hashes[right], reason)

    @staticmethod
    def read(
        forget: sources.Source,
        retain: sources.Source | None = None,
        utility: sources.Source | None = None,
        holdout: sources.Source | None = None,
        train: sources.Source | None = None,
        *,
        seed: int = 0,
        name: str | None = None,
    ) -> ForgetRequest:
        """Read each set from its source (see `sources.read`).

        Where retain is given and utility is not, a seeded quarter of retain becomes utility: at least 16 groups of
        rows, at most half of them, and none of fewer than 4.  Equal rows, and rows with one value in the column
        ``person`` (where there is one), are a group: utility must not ask what the unlearner may train on.
        """
        tables = {
            key: None if source is None else sources.read(source)
            for key, source in zip(SETS, (forget, retain, utility, holdout, train), strict=True)
        }
        if tables["retain"] is not None and utility is None:
            tables["retain"], tables["utility"] = _split_utility(tables["retain"], seed)
        if name is None:
            name = Path(forget).name.split(".")[0] if isinstance(forget, str | Path) else "request"
        return ForgetRequest(**tables, name=name or "request")

    def describe(self) -> dict[str, dict[str, Any]]:
        """{"forget": {"rows", "sha256"}, ...} of the sets that are there: the data section of the evidence."""
        tables = {name: getattr(self, name) for name in SETS}
        return {
            name: {"rows": len(table), "sha256": sha256(table)} for name, table in tables.items() if table is not None
        }

    def trained_on(self) -> Dataset:
        """What the model was trained on: `train` where it is known, else forget, retain and utility together."""
        return self.train if self.train is not None else concat(self.forget, self.retain, self.utility)

    def without_forget(self, train: Dataset | None = None) -> Dataset:
        """The rows of `train` (else of `trained_on()`) that need not be forgotten: what a reference is trained on."""
        table = self.trained_on() if train is None else train
        gone = set(content_hashes(self.forget))
        kept = [row for row, content in enumerate(content_hashes(table)) if content not in gone]
        if len(kept) == len(table):
            raise InputError(
                f"none of the {len(self.forget)} forget rows is among the {len(table)} training rows: "
                "nothing would change by leaving them out"
            )
        if not kept:
            raise InputError(
                "every training row is a forget row: nothing is left to train a reference on (give --retain)"
            )
        return table.select(kept)

    def reserve_holdout(self, share: float = 0.2, *, by: str = "person", seed: int = 0) -> ForgetRequest:
        """Move a seeded `share` of the forget rows to holdout.  Only right *before* the model is trained.

        Rows with equal content, and rows with one value in the column `by` (where there is such a column), move
        together.  At least one group moves and at least one stays.
        """
        if self.holdout is not None or self.train is not None:
            reason = "it has a holdout set" if self.holdout is not None else "the model has been trained on these rows"
            raise InputError(f"no holdout can be taken from request '{self.name}': {reason}")
        if not 0 < share < 1:
            raise InputError(f"share must lie between 0 and 1, not {share}")
        groups = _groups(self.forget, by)
        if len(groups) < 2:
            raise InputError("a holdout set needs at least 2 different forget rows; give --holdout")
        order = numpy_rng(seed, "holdout").permutation(len(groups))
        moved = min(max(round(share * len(groups)), 1), len(groups) - 1)
        return replace(
            self,
            holdout=_take(self.forget, groups, order[:moved]),
            forget=_take(self.forget, groups, order[moved:]),
        )

    def folds(self, k: int, *, nested: bool, by: str = "person", seed: int = 0) -> list[ForgetRequest]:
        """`k` requests with parts of the forget set, all other sets as they are.

        Nested folds grow, each holding the one before, the last being the whole set (MUSE's scalability); otherwise the
        folds are disjoint and together are the whole set (sustainability).  Rows stay together as in `reserve_holdout`.
        """
        groups = _groups(self.forget, by)
        if not 1 <= k <= len(groups):
            raise InputError(f"{k} folds of {len(groups)} different forget records; wanted 1 to {len(groups)}")
        parts = np.array_split(numpy_rng(seed, "folds").permutation(len(groups)), k)
        picked = [np.concatenate(parts[: i + 1]) for i in range(k)] if nested else parts
        return [
            replace(self, forget=_take(self.forget, groups, part), name=f"{self.name}-{i + 1}of{k}")
            for i, part in enumerate(picked)
        ]

    def _refuse_overlap(self, left: str, left_rows: list[bytes], right: str, right_rows: list[bytes], why: str) -> None:
        known = set(left_rows)
        shared = [row for row, content in enumerate(right_rows) if content in known]
        if shared:
            table = getattr(self, right)
            first = "".join(pairs(table.select(shared[:1]))[0])
            shown = first if len(first) <= 80 else f"{first[:77]}..."
            raise InputError(
                f"{left} and {right} overlap: {len(shared)} of {len(right_rows)} {right} rows also in {left}, "
                f"first row {shared[0] + 1} ({shown!r}); {why}"
            )


def _split_utility(retain: Dataset, seed: int) -> tuple[Dataset, Dataset | None]:
    """(retain, utility), see `ForgetRequest.read`."""
    groups = _groups(retain, by="person")
    if len(groups) < 4:
        return retain, None
    size = min(max(len(groups) // 4, 16), len(groups) // 2)
    order = numpy_rng(seed, "utility").permutation(len(groups))
    return _take(retain, groups, order[size:]), _take(retain, groups, order[:size])


def _groups(table: Dataset, by: str) -> list[list[int]]:
    """Row numbers that stay together: equal contents, and equal values of the column `by` where it exists."""
    labels: list[Any] = list(content_hashes(table))
    if by in table.column_names:
        labels = [
            value if value is not None else content
            for value, content in zip(table.with_format(None)[by], labels, strict=True)
        ]
    groups: dict[Any, list[int]] = {}
    for row, label in enumerate(labels):
        groups.setdefault(label, []).append(row)
    return list(groups.values())


def _take(table: Dataset, groups: list[list[int]], picked: np.ndarray) -> Dataset:
    return table.select(sorted(row for group in picked for row in groups[group]))
