"""Labelled data from files, with classes to meta-train on, to tune on and to test on.

======================================  ==============================================================================
``x.npz``                               arrays, no pickles: inputs and labels, in one pair with `train_classes` and
                                        `test_classes` (names or numbers), or in a pair each for train, val and test
a folder of images                      ``train/CLASS/*.png`` and ``test/CLASS/*.png``, or ``CLASS/*.png`` with lists
                                        ``train.txt`` and ``test.txt`` of class names beside them
``.jsonl[.gz] .json .csv[.gz] .parquet``  rows: texts, tables of numbers, or relations as FewRel writes them
======================================  ==============================================================================

Where nothing says which classes are for testing, they are split by `episodes.split_classes`.  Images become (M,
channels, height, width) uint8 arrays.  Knows nothing of learners.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np

from palimpsest.core.errors import InputError
from palimpsest.data import formats
from palimpsest.data.pictures import SUFFIXES, as_images, read_folder
from palimpsest.data.relations import parse
from palimpsest.data.sources import find
from palimpsest.data.tasks import Examples, split_classes

Kind = Literal["images", "features", "texts", "relations"]
PARTS = {
    "train": ("train", "base", "background", "images_background"),
    "valid": ("valid", "val", "validation"),
    "test": ("test", "novel", "evaluation", "images_evaluation"),
}
_INPUTS = ("x", "images", "image", "data", "features", "inputs", "embeddings", "arr_0")
_LABELS = ("y", "labels", "label", "targets", "target", "arr_1")
_LABEL_COLUMNS = ("label", "class", "intent", "category", "relation", "target", "topic", "fine", "coarse", "y")
_TEXT_COLUMNS = ("text", "sentence", "question", "utterance", "document", "content")


@dataclass(frozen=True, eq=False)
class Splits:
    """Pools of disjoint classes.  `given`: whether the data said which are for testing."""

    train: Examples
    valid: Examples | None
    test: Examples
    kind: Kind
    given: bool
    dropped: tuple[str, ...] = ()  # classes with too few examples

    def describe(self) -> dict[str, dict[str, Any]]:
        """Rows, classes and hash of each part."""
        parts = {"train": self.train, "valid": self.valid, "test": self.test}
        return {
            name: {"rows": len(one), "classes": one.way, "sha256": one.sha256}
            for name, one in parts.items()
            if one is not None
        }


def read(
    source: str | Path,
    *,
    label: str | None = None,
    text: str | None = None,
    train_classes: Sequence[str] | None = None,
    test_classes: Sequence[str] | None = None,
    at_least: int = 1,
    size: int | None = None,
    seed: int = 0,
) -> Splits:
    """Read labelled data and part its classes.

    - `label`, `text`: the columns that hold them, where their names do not say so.
    - `train_classes`, `test_classes`: names; the classes not named by either stay out, or train if only one is given.
    - `at_least`: classes with fewer examples are left out and named in `Splits.dropped`.
    - `size`: side of the images in pixels; by default 28 for grey and 84 for coloured ones, or what they have if less.

    Raises InputError for what cannot be read or leaves fewer than two classes to train or to test on.
    """
    path = Path(source).expanduser()
    parts, kind = _parts(path, label, text, size)
    if train_classes or test_classes:
        whole = _together(list(parts.values()))
        parts = _by_names(whole, train_classes, test_classes)
    parts, dropped = _large_enough(parts, at_least)
    given = "test" in parts
    if not given:
        whole = _together(list(parts.values()))
        tuned = 0.16 if whole.way >= 10 else 0.0  # of fewer, none can be spared for tuning
        train, valid, test = split_classes(whole, valid=tuned, seed=seed)
    else:
        train, valid, test = parts["train"], parts.get("valid"), parts["test"]
        shared = sorted(set(train.names) & set(test.names))
        if shared:
            raise InputError(f"{path}: the class '{shared[0]}' is for training and for testing ({len(shared)} are)")
        for name, one in (("train", train), ("test", test)):
            if one.way < 2:
                raise InputError(f"{path}: {one.way} class to {name} on; wanted at least 2")
    if kind == "features":
        train, valid, test = standardised(*_filled(train, valid, test))
    return Splits(train, valid, test, kind, given, dropped)


def rotated(examples: Examples) -> Examples:
    """Images with each quarter turn of a class as a class of its own: four times the classes (Santoro et al. 2016)."""
    turns = [np.ascontiguousarray(np.rot90(examples.x, turn, axes=(2, 3))) for turn in range(4)]
    names = tuple(f"{name}, turned {90 * turn}" for turn in range(4) for name in examples.names)
    y = np.concatenate([examples.y + turn * examples.way for turn in range(4)])
    return Examples(np.concatenate(turns), y, names)


def _from_npz(path: Path, size: int | None) -> tuple[dict[str, Examples], Kind]:
    try:
        with np.load(path, allow_pickle=False) as file:
            arrays = {name.lower(): file[name] for name in file.files}
    except FileNotFoundError:
        raise InputError(f"{path}: no such file") from None
    except (OSError, ValueError) as error:
        raise InputError(f"{path}: not a readable .npz of plain arrays ({str(error).splitlines()[0]})") from None
    found: dict[str, Examples] = {}
    for part, words in PARTS.items():
        sides = [_array_of(arrays, words, names) for names in (_INPUTS, _LABELS)]
        if sides[0] is not None:
            found[part] = _pair(path, sides[0], sides[1])
    if not found:
        x = next((arrays[name] for name in _INPUTS if name in arrays), None)
        if x is None:
            known = ", ".join(f"{name} {array.shape}" for name, array in arrays.items()) or "nothing"
            raise InputError(f"{path}: it holds {known}; wanted inputs ('x' or 'images') and labels ('y' or 'labels')")
        whole = _pair(path, x, next((arrays[name] for name in _LABELS if name in arrays), None))
        named = {part: _array_of(arrays, words, ("classes",)) for part, words in PARTS.items()}
        if named["test"] is None:
            found = {"train": whole}
        else:
            lists = {part: None if one is None else [str(v) for v in one.tolist()] for part, one in named.items()}
            found = _by_names(whole, lists["train"], lists["test"], lists["valid"])
    if next(iter(found.values())).x.ndim <= 2:
        return found, "features"
    return {part: replace(one, x=as_images(one.x, size)) for part, one in found.items()}, "images"


def _array_of(arrays: Mapping[str, np.ndarray], parts: Sequence[str], names: Sequence[str]) -> np.ndarray | None:
    """``train_x``, ``x_train`` or ``train`` itself."""
    wanted = [pattern for part in parts for name in names for pattern in (f"{part}_{name}", f"{name}_{part}")]
    wanted += list(parts) if names is _INPUTS else []
    return next((arrays[name] for name in wanted if name in arrays), None)


def _pair(path: Path, x: np.ndarray, y: np.ndarray | None) -> Examples:
    """Labelled inputs; without labels the first axis is the class and the second the example."""
    if y is None:
        if x.ndim < 3:
            raise InputError(f"{path}: inputs of shape {x.shape} without labels; wanted labels, one an input")
        y = np.repeat(np.arange(len(x)), x.shape[1])
        x = x.reshape(-1, *x.shape[2:])
    if len(x) != len(y) or y.ndim != 1:
        raise InputError(f"{path}: inputs of shape {x.shape} and labels of shape {y.shape}; wanted one label an input")
    return Examples.of(x if x.dtype != np.float64 else x.astype(np.float32), y)


def _parts(path: Path, label: str | None, text: str | None, size: int | None) -> tuple[dict[str, Examples], Kind]:
    kind: Kind
    if path.is_dir() and any(file.suffix.lower() in SUFFIXES for file in path.rglob("*")):
        parts, kind = read_folder(path, {name: PARTS[name] for name in PARTS}, size), "images"
    elif path.suffix.lower() == ".npz":
        parts, kind = _from_npz(path, size)
    else:
        parts, kind = _from_rows(path, label, text)
    return {name: one for name, one in parts.items() if one is not None and len(one)}, kind


def read_rows(
    path: str | Path, *, label: str | None = None, text: str | None = None, size: int | None = None
) -> tuple[Examples, Kind]:
    """All labelled rows of a source, whatever its classes are for; raises InputError as `read` does."""
    parts, kind = _parts(Path(path).expanduser(), label, text, size)
    whole = _together(list(parts.values()))
    return _filled(whole, None, whole)[0] if kind == "features" else whole, kind


def _from_rows(path: Path, label: str | None, text: str | None) -> tuple[dict[str, Examples], Kind]:
    rows = [place for file in find(path) for place in _rows(file)]
    if not rows:
        raise InputError(f"{path}: the file is empty")
    where, first = rows[0]
    column = _column(first, label, _LABEL_COLUMNS, "label", where)
    labels = []
    for place, row in rows:
        value = row.get(column)
        if value in (None, ""):
            raise InputError(f"{place}: '{column}' is empty; wanted the name of a class")
        labels.append(str(value))
    if "tokens" in first:
        return {"train": Examples.of([parse(row, place) for place, row in rows], labels)}, "relations"
    words = next((name for name in _TEXT_COLUMNS if name in first), None) if text is None else text
    if words is None:
        x = _numbers([{k: v for k, v in row.items() if k not in (column, "split")} for _, row in rows], where)
        return {"train": Examples.of(list(x), labels)}, "features"  # a list, for some may be missing: see `_filled`
    if words not in first:
        raise InputError(f"{where}: no column '{words}'; found {', '.join(map(repr, first))}")
    texts = []
    for place, row in rows:
        if not isinstance(row.get(words), str) or not row[words].strip():
            raise InputError(f"{place}: '{words}' is {row.get(words)!r}; wanted text")
        texts.append(row[words])
    whole = Examples.of(texts, labels)
    return _by_split_column(whole, [row.get("split") for _, row in rows]), "texts"


def _rows(file: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Rows of a file; FewRel's own form, an object of lists by relation, is unfolded."""
    if file.suffix.lower() == ".json":
        try:
            value = json.loads(file.read_text(encoding="utf-8"))
        except (ValueError, OSError):
            value = None  # the reader below says what is wrong
        if isinstance(value, dict) and value and all(isinstance(rows, list) for rows in value.values()):
            for name, rows in value.items():
                for number, row in enumerate(rows, 1):
                    yield f"{file}, {name}, row {number}", {**row, "relation": name}
            return
    yield from formats.rows(file)


def _column(row: Mapping[str, Any], given: str | None, known: Sequence[str], what: str, where: str) -> str:
    names = [given] if given else known
    found = next((name for name in names if name in row), None)
    if found is None:
        wanted = f"'{given}'" if given else f"one of {', '.join(known)} (or say which is the {what})"
        raise InputError(f"{where}: found the columns {', '.join(map(repr, row))}; wanted {wanted}")
    return found


def _numbers(rows: list[dict[str, Any]], where: str) -> np.ndarray:
    """(M, D) float32: numbers as they are, words as one column for each that occurs; what is missing is NaN."""
    columns = []
    for name in rows[0]:
        values = [row.get(name) for row in rows]
        try:
            numbers = np.array([np.nan if v in (None, "", "?") else float(v) for v in values])
        except (TypeError, ValueError):
            kinds = sorted({str(value) for value in values})
            if len(kinds) > 100:
                found = f"{where}: the column '{name}' holds {len(kinds)} different words"
                raise InputError(f"{found}; say which column is the text, or leave it out") from None
            columns += [np.array([str(value) == kind for value in values], dtype=np.float64) for kind in kinds]
            continue
        if not np.isfinite(numbers).any():
            continue
        columns.append(np.where(np.isfinite(numbers), numbers, np.nan))
    if not columns:
        raise InputError(f"{where}: no column to learn from beside the label")
    return np.stack(columns, 1).astype(np.float32)


def _by_split_column(whole: Examples, splits: Sequence[Any]) -> dict[str, Examples]:
    """The parts a column names, if they share no class; otherwise (a split for ordinary training) all in one."""
    part_of = {word: part for part, words in PARTS.items() for word in words}
    parts = np.array([part_of.get(str(split).lower(), "") for split in splits])
    if not {"train", "test"} <= set(parts) or "" in parts:
        return {"train": whole}
    classes = {part: set(whole.y[parts == part].tolist()) for part in PARTS}
    if classes["train"] & classes["test"]:
        return {"train": whole}
    return {
        part: whole.of_classes([whole.names[label] for label in sorted(found)])
        for part, found in classes.items()
        if found
    }


def _together(parts: list[Examples]) -> Examples:
    if len(parts) == 1:
        return parts[0]
    labels = [one.names[label] for one in parts for label in one.y]
    first = parts[0].x
    joined = (
        np.concatenate([one.x for one in parts])
        if isinstance(first, np.ndarray)
        else [value for one in parts for value in one.x]
    )
    return Examples.of(joined, labels)


def _by_names(
    whole: Examples,
    train: Sequence[str] | None,
    test: Sequence[str] | None,
    valid: Sequence[str] | None = None,
) -> dict[str, Examples]:
    taken = {*(train or ()), *(test or ()), *(valid or ())}
    rest = [name for name in whole.names if name not in taken]
    lists = {"train": train or rest, "valid": valid, "test": test or rest}
    return {part: whole.of_classes(list(names)) for part, names in lists.items() if names}


def _large_enough(parts: dict[str, Examples], at_least: int) -> tuple[dict[str, Examples], tuple[str, ...]]:
    kept, dropped = {}, []
    for part, one in parts.items():
        small = [name for name, count in zip(one.names, one.counts, strict=True) if count < at_least]
        dropped += small
        names = [name for name in one.names if name not in set(small)]
        if len(names) < 2:
            raise InputError(
                f"{len(names)} of {one.way} classes to {part} on have the {at_least} examples that an episode needs"
            )
        kept[part] = one.of_classes(names) if small else one
    return kept, tuple(dropped)


def _filled(train: Examples, valid: Examples | None, test: Examples) -> tuple[Examples, Examples | None, Examples]:
    """Rows of tables as one array, with the mean of the training classes (0 if they have none) where one is missing."""
    if isinstance(train.x, np.ndarray):
        return train, valid, test
    known = np.isfinite(train.x)
    means = np.where(known, train.x, 0).sum(0) / np.maximum(known.sum(0), 1)

    def filled(one: Examples) -> Examples:
        x = np.stack(one.x)
        return replace(one, x=np.where(np.isfinite(x), x, means).astype(np.float32))

    return filled(train), None if valid is None else filled(valid), filled(test)


def standardised(train: Examples, valid: Examples | None, test: Examples) -> tuple[Examples, Examples | None, Examples]:
    """Columns of very different spread made comparable by the training classes' mean and deviation."""
    spread = train.x.std(0)
    if spread.max() <= 10 * max(float(np.median(spread)), 1e-12):  # embeddings, which are comparable as they are
        return train, valid, test
    mean, scale = train.x.mean(0), np.where(spread > 0, spread, 1.0)
    parts = [None if one is None else replace(one, x=(one.x - mean) / scale) for one in (train, valid, test)]
    assert parts[0] is not None
    assert parts[2] is not None
    return parts[0], parts[1], parts[2]
