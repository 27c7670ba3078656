"""What a job works on: a request, the model that must forget, and the reference that never knew.

Three ways to come by them: nothing given (the embedded world), records but no model (a small model is trained on
them), or the user's own model (with ``--train`` it is first tuned on all records, and the reference on all but those
to forget).
"""

from __future__ import annotations

import sys
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from palimpsest.core.errors import InputError
from palimpsest.core.seeds import numpy_rng
from palimpsest.data.records import concat
from palimpsest.data.request import ForgetRequest
from palimpsest.jobs.plan import plan_training, refuse_if_too_large
from palimpsest.models.kept import trained
from palimpsest.models.lm import LM
from palimpsest.models.train import Recipe

if TYPE_CHECKING:
    from datasets import Dataset

_WORLD_PEOPLE = 160
_CONTEXT = 256  # tokens that a model trained here can read
_WORDS = 4096  # of its tokenizer, at most


@dataclass(frozen=True, kw_only=True)
class Source:
    """Records and models; without any, an embedded world of fictional people."""

    forget: str | None = (
        None  # records that must go: .jsonl[.gz] .json .csv .parquet .txt[.gz], a folder, or hf:org/name
    )
    retain: str | None = None  # records that the methods may train on to stay useful
    utility: str | None = None  # records that only measure usefulness; default: a quarter of retain
    holdout: str | None = None  # records the model never saw, like those to forget
    train: str | None = None  # records to tune --model on first; its reference is tuned on all but --forget
    model: str | None = None  # your model, a folder or hub name; default: a small one is trained on forget and retain
    reference: str | None = None  # a model like yours that was trained without the records to forget
    config: str = "llama-mini"  # which small model to train when --model is not given
    rows: int = 100  # at most so many rows of each set when a model is trained here; 0: all
    train_epochs: float = 40.0  # passes over the records when a model is trained here
    train_lr: float = 2e-3  # peak learning rate of that training (tuning --model: use 1e-5 to 1e-4)
    seed: int = 0


@dataclass(frozen=True)
class Material:
    request: ForgetRequest
    before: LM
    reference: LM | None
    train_lr: float | None = None  # the peak rate of the training, where the job trained the model


def prepare(source: Source, progress: bool = True) -> Material:
    """Read and, where it takes it, train everything the job needs.  Finished trainings are taken from the cache."""
    if source.forget is None:
        for name in ("retain", "utility", "holdout", "train", "model", "reference"):
            if getattr(source, name) is not None:
                raise InputError(f"--{name} without --forget: say which records must go (--forget FILE)")
        return _world(source.seed, progress)
    request = ForgetRequest.read(
        source.forget, source.retain, source.utility, source.holdout, source.train, seed=source.seed
    )
    if source.model is None:
        if source.train is not None or source.reference is not None:
            raise InputError(
                "--train and --reference go with --model: without it a small model is trained on the records"
            )
        return _small_model(request, source, progress)
    start = LM.load(source.model)
    if source.train is not None:
        if source.reference is not None:
            raise InputError("--train makes the reference itself: give --train or --reference, not both")
        return _train_both(start, request, _recipe(source, len(request.trained_on())), progress)
    return Material(request, start, LM.load(source.reference) if source.reference else None)


def _world(seed: int, progress: bool) -> Material:
    from palimpsest.data.world import World

    world = World(people=_WORLD_PEOPLE, seed=seed)
    lm = LM.build(world.texts, "llama-tiny", vocab_size=2000, max_length=128, seed=seed)
    recipe = Recipe(steps=900, lr=3e-3, batch_size=48, seed=seed)
    return _train_both(lm, world.request(), recipe, progress)


def _small_model(request: ForgetRequest, source: Source, progress: bool) -> Material:
    if request.retain is None:
        raise InputError(
            "without --model a small model is trained on the records: give --retain FILE as well as --forget"
        )
    if request.holdout is None:
        request = request.reserve_holdout(seed=source.seed)
    request = _at_most(request, source.rows, source.seed)
    # holdout too, or a membership test would tell its words from the forget set's by how they are cut into tokens
    lm = LM.build(
        concat(request.trained_on(), request.holdout),
        source.config,
        vocab_size=_WORDS,
        max_length=_CONTEXT,
        seed=source.seed,
    )
    return _train_both(lm, request, _recipe(source, len(request.trained_on())), progress)


def _recipe(source: Source, rows: int, batch_size: int = 16) -> Recipe:
    steps = max(1, round(source.train_epochs * rows / batch_size))
    return Recipe(steps=steps, lr=source.train_lr, batch_size=batch_size, seed=source.seed)


def _train_both(start: LM, request: ForgetRequest, recipe: Recipe, progress: bool) -> Material:
    """The target, trained on everything, and the reference, trained by the same recipe on all that need not go."""
    table = request.trained_on()
    _announce(start, table, recipe)
    before = trained(start, table, recipe, name="target", progress=progress)
    reference = trained(start, request.without_forget(), recipe, name="reference", progress=progress)
    return Material(replace(request, train=table), before, reference, recipe.lr)


def _announce(start: LM, table: Dataset, recipe: Recipe) -> None:
    encoded = start.encode(table, max_length=recipe.max_length)
    plan = plan_training(
        f"training target and reference ({start.num_parameters / 1e6:.1f}M weights, {len(encoded)} records, "
        f"{recipe.steps} steps each)",
        start,
        steps=recipe.steps,
        batch_size=recipe.batch_size,
        tokens=int(encoded.lengths.mean()),
        models=2,
    )
    print(plan, file=sys.stderr)
    refuse_if_too_large(plan)


def _at_most(request: ForgetRequest, rows: int, seed: int) -> ForgetRequest:
    """The request with at most `rows` seeded rows of each set, and a line that says so."""
    if rows <= 0:
        return request
    cut = {}
    for name in ("forget", "retain", "utility", "holdout"):
        table = getattr(request, name)
        if table is not None and len(table) > rows:
            print(f"using {rows} of {len(table)} {name} records (--rows 0 for all)", file=sys.stderr)
            cut[name] = table.select(sorted(numpy_rng(seed, "rows", name).permutation(len(table))[:rows]))
    return replace(request, **cut)
