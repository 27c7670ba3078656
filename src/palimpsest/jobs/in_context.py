"""``palimpsest learn in-context METHOD``: learners that answer from their context, on the user's data.

A base set of labelled examples (GPICL), a family of functions (the Bayesian prism), or tasks of texts with a model
(MEND): what a method takes is what its `inputs` say.  What is measured is on tasks that were not trained on.
"""

from __future__ import annotations

import shutil
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np

from palimpsest.core.errors import InputError
from palimpsest.core.methods import MethodInfo, config_of
from palimpsest.core.records import Evidence, Measurement
from palimpsest.core.watch import Watch

FAMILY = "in-context"


@dataclass(frozen=True, kw_only=True)
class Output:
    out: str = "palimpsest-learn"  # folder for the learner, the evidence and the report


@dataclass(frozen=True, kw_only=True)
class BaseSetOptions(Output):
    """The examples that tasks are made of, by random projections and permutations of the labels."""

    data: str  # .npz, a folder of images (label = class), or rows with a label and numbers
    tasks: int = 2**16  # different ones in training
    bias: float = 0.8  # share of each training batch with one and the same permutation: ends the plateau
    test_share: float = 0.3  # of the examples, held out
    label: str | None = None  # column with the class, where its name does not say so
    size: int | None = None  # side of the images in pixels
    split_seed: int = 0


@dataclass(frozen=True, kw_only=True)
class FunctionOptions(Output):
    """The family that functions are drawn from, and the prompts."""

    functions: Literal["linear", "sparse", "fourier", "trees", "networks"] = "linear"
    dim: int = 5  # inputs of a function; fourier has one
    points: int = 11  # of a prompt
    prompts: int = 64  # in a batch
    noise: float = 0.1
    test_prompts: int = 512


@dataclass(frozen=True, kw_only=True)
class PromptOptions(Output):
    """Tasks of texts, and the model that answers them."""

    data: str  # rows with prompt, completion and task (and options, a list): .jsonl[.gz] .json .csv .parquet
    model: str  # the frozen model, a folder or hub name
    distiller: str | None = None  # where the distiller starts: a folder or hub name; default: a copy of the model
    texts: str | None = None  # plain texts for the first stage; default: the tasks' own examples
    test_tasks: float = 0.2  # share of the tasks that are held out
    queries: int = 50  # of each held-out task, at most
    split_seed: int = 0


Found = tuple[Any, list[Measurement], dict[str, Any], dict[str, Any]]  # learner, numbers, data, extras


def learn(info: MethodInfo, method: Any, options: Any) -> int:
    """Meta-train, test, and write the learner, ``evidence.json`` and ``report.html`` into OUT."""
    from palimpsest.learn.learner import save
    from palimpsest.report import incontext as page

    began = time.monotonic()
    out = Path(options.out)
    watch = Watch(checkpoint=out / ".unfinished")
    fitted, measurements, data, extras = JOBS[info.cls.inputs[0]](method, options, watch)  # type: ignore[attr-defined]
    save(fitted, out / "learner")
    extras["curves"] = {
        name: trace.logs.get("nll", trace.losses) if info.cls.inputs[0] == "features" else trace.losses  # type: ignore[attr-defined]
        for name, trace in watch.traces.items()
    }
    evidence = Evidence(
        kind="learn",
        measurements=tuple(measurements),
        method={"name": info.name, "paper": info.paper, "config": config_of(method)},
        model={"after": {"source": "learner", "sha256": _sha256(out / "learner")}},
        data=data,
        seconds=time.monotonic() - began,
        extras=extras,
    )
    evidence.write(out)
    written = page.write(evidence, out)
    shutil.rmtree(out / ".unfinished", ignore_errors=True)
    print(extras["verdict"])
    print(f"wrote {written}", file=sys.stderr)
    return 0


def from_base_set(method: Any, options: BaseSetOptions, watch: Watch) -> Found:
    from palimpsest.data.labelled import read
    from palimpsest.data.projections import BaseSet, Projections
    from palimpsest.learn.incontext.gpicl import InContextClassifier, context_baselines, diagnose, evaluation

    if not 0 < options.test_share < 1:
        raise InputError(f"test_share must lie between 0 and 1, not {options.test_share}")
    splits = read(options.data, label=options.label, size=options.size, seed=options.split_seed)
    if splits.kind not in ("images", "features"):
        raise InputError(f"{options.data}: wanted images or numbers, not {splits.kind}")
    known, other = (BaseSet.of(part.x, part.y) for part in (splits.train, splits.test))
    train, held_out = known.split(1 - options.test_share, options.split_seed)
    training = Projections(
        train,
        options.tasks,
        features=method.features,
        length=method.length,
        batch_size=method.batch_size,
        bias=options.bias,
        classes=max(known.classes, other.classes),
        seed=method.seed,
    )
    fitted = method.meta_fit(training, watch=watch)
    seen, unseen = evaluation(training, held_out)
    others = {"other": replace(unseen, base=other)}
    found = diagnose(fitted, seen, unseen, others)
    blank = method.model(method.features, training.labels, method.length).eval()
    before = diagnose(InContextClassifier(method, blank), seen, unseen, others)
    rows = (
        ("seen_task_accuracy", before.seen, found.seen),
        ("unseen_task_accuracy", before.unseen, found.unseen),
        ("other_class_accuracy", before.others["other"], found.others["other"]),
    )
    nearest = 100 * context_baselines(unseen)["1-NN"]
    measurements = [
        Measurement(
            name,
            "in context",
            before=100 * start.last,
            after=100 * curve.last,
            reference=nearest if name == "unseen_task_accuracy" else None,
            n=8 * method.batch_size,
            better="higher",
        )
        for name, start, curve in rows
    ]
    verdict = f"{found.verdict}: {100 * found.unseen.last:.1f}% on new tasks, chance {100 * found.chance:.1f}%"
    lines = {name: [100 * value for value in curve.accuracy] for name, _, curve in rows}
    extras = {"verdict": verdict, "course": lines, "along": "labelled examples before it", "unit": "accuracy, %"}
    return fitted, measurements, {"base_set": splits.describe()["train"]}, extras


def from_functions(method: Any, options: FunctionOptions, watch: Watch) -> Found:
    from palimpsest.data import functions
    from palimpsest.learn.incontext.bayesian_prism import FittedPrism, compare, exact, least_squares

    kinds: dict[str, Callable[[], Any]] = {
        "linear": lambda: functions.Dense(options.dim),
        "sparse": lambda: functions.Sparse(options.dim, min(3, options.dim)),
        "fourier": functions.Fourier,
        "trees": lambda: functions.DecisionTrees(options.dim),
        "networks": lambda: functions.ReluNets(options.dim),
    }
    if options.points < 3 or options.dim < 1 or options.test_prompts < 2:
        raise InputError("wanted at least 3 points, 1 input and 2 test prompts")
    family = kinds[options.functions]()
    stream = functions.FunctionStream(family, options.points, options.prompts, options.noise, method.seed)
    yardsticks: dict[str, Any] = {}
    if isinstance(family, functions.Linear):
        yardsticks = {"bayes": exact(family, max(options.noise, 1e-3)), "least_squares": least_squares(family)}
    fitted = method.meta_fit(stream, watch=watch)
    batch = replace(stream, batch_size=options.test_prompts, seed=method.seed + 1)(0)
    blank = FittedPrism(method, method.model(batch["x"].shape[2], options.points).eval())
    found, start = (compare(one, yardsticks, batch) for one in (fitted, blank))
    names = {"bayes": "distance_to_bayes", "least_squares": "distance_to_least_squares", "truth": "distance_to_truth"}
    measurements = [
        Measurement(
            name,
            "in context",
            before=float(start[key].mean()),
            after=float(found[key].mean()),
            n=options.test_prompts,
        )
        for key, name in names.items()
        if key in found
    ]
    nearest = min((key for key in found if key != "truth"), key=lambda key: found[key].mean(), default="truth")
    words = {"bayes": "the exact Bayesian predictor", "least_squares": "least squares", "truth": "the function itself"}
    verdict = f"median squared distance {found[nearest].mean():.4f} to {words[nearest]}"
    lines = {names[key]: values.tolist() for key, values in found.items()}
    extras = {"verdict": verdict, "course": lines, "along": "pairs before it", "unit": "median squared distance"}
    data = {"functions": {"rows": options.test_prompts, "family": options.functions, "points": options.points}}
    return fitted, measurements, data, extras


def from_prompts(method: Any, options: PromptOptions, watch: Watch) -> Found:
    from palimpsest.core.files import sha256_of
    from palimpsest.data.evaluation import interval
    from palimpsest.data.records import documents
    from palimpsest.data.sources import read
    from palimpsest.data.text_tasks import read_tasks, split_tasks
    from palimpsest.learn.incontext.mend import PromptedTasks
    from palimpsest.learn.incontext.prompting import in_context, zero_shot
    from palimpsest.models.lm import LM

    if not 0 < options.test_tasks < 1 or options.queries < 1:
        raise InputError("test_tasks must lie between 0 and 1, and queries be at least 1")
    train, test = split_tasks(read_tasks(options.data), options.test_tasks, options.split_seed)
    parted = [
        (task, *task.parted(min(method.demonstrations, len(task.examples) - 1), options.split_seed))
        for task in test
        if task.options and len(task.examples) > 1
    ]
    if not parted:
        names = ", ".join(task.name for task in test)
        raise InputError(f"no held-out task ({names:.60}) has options to choose among: give a column options")
    separator = method.separator
    texts = (
        documents(read(options.texts))
        if options.texts
        else ["".join(f"{x} {y}{separator}" for x, y in task.examples) for task in train]
    )
    lm = LM.load(options.model)
    start = LM.load(options.distiller) if options.distiller else None
    fitted = method.meta_fit(PromptedTasks(lm, train, texts, start), watch=watch)
    layout = {"separator": separator, "most": method.example_tokens}
    scores: dict[str, list[float]] = {"distilled": [], "prompt": [], "none": []}
    for task, shown, rest in parted:
        queries = rest[: options.queries]
        predictors = {
            "distilled": fitted.adapt(shown),
            "prompt": in_context(lm, shown, method.demonstrations, **layout),
            "none": zero_shot(lm, shown, **layout),
        }
        for name, predictor in predictors.items():
            said = predictor([question for question, _ in queries])
            right = [task.options[a] == answer for a, (_, answer) in zip(said, queries, strict=True)]
            scores[name].append(100 * float(np.mean(right)))
    mean, low, high = interval(np.array(scores["distilled"]))
    measurement = Measurement(
        "prompt_accuracy",
        "in context",
        before=float(np.mean(scores["none"])),
        after=mean,
        reference=float(np.mean(scores["prompt"])),
        low=None if np.isnan(low) else low,
        high=None if np.isnan(high) else high,
        n=len(parted),
        better="higher",
        values=tuple(scores["distilled"]),
        before_values=tuple(scores["none"]),
        reference_values=tuple(scores["prompt"]),
    )
    verdict = (
        f"{mean:.1f}% on {len(parted)} held-out tasks behind {method.vectors} vectors; {measurement.before:.1f}% "
        f"without demonstrations, {measurement.reference:.1f}% with all of them as text"
    )
    data = {
        name: {"rows": sum(len(task.examples) for task in part), "sha256": sha256_of([t.sha256 for t in part])}
        for name, part in (("training_tasks", train), ("test_tasks", test))
    }
    return fitted, [measurement], data, {"verdict": verdict}


JOBS: dict[str, Callable[[Any, Any, Watch], Found]] = {
    "features": from_base_set,
    "functions": from_functions,
    "prompted": from_prompts,
}
OPTIONS: dict[str, type] = {"features": BaseSetOptions, "functions": FunctionOptions, "prompted": PromptOptions}


def _sha256(folder: Path) -> str:
    """Of all weights in a learner's folder."""
    import hashlib

    digest = hashlib.sha256()
    for path in sorted(folder.rglob("*.safetensors")):
        with path.open("rb") as file:
            digest.update(path.relative_to(folder).as_posix().encode() + hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()
