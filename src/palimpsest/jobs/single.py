"""``palimpsest forget | audit | curate METHOD``: one method on the user's model and records."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import tyro

from palimpsest.core.errors import InputError
from palimpsest.core.files import write_json
from palimpsest.core.methods import MethodInfo, config_of

if TYPE_CHECKING:
    from palimpsest.core.records import Evidence
    from palimpsest.data.request import ForgetRequest
    from palimpsest.models.lm import LM


@dataclass(frozen=True, kw_only=True)
class ForgetOptions:
    """What to forget, from which model, and where the result goes."""

    model: str  # folder or hub name of the model
    forget: Annotated[tyro.conf.UseAppendAction[tuple[str, ...]], tyro.conf.arg(aliases=["--request"])]
    """records that must go; given several times: requests served one after the other"""
    retain: str | None = None  # records that the method may train on to stay useful
    utility: str | None = None  # records that only measure usefulness; default: a quarter of retain
    holdout: str | None = None  # records the model never saw, like those to forget
    train: str | None = None  # everything the model was trained on
    out: str = "palimpsest-out"  # folder for the model and its record


@dataclass(frozen=True, kw_only=True)
class CurateOptions:
    """The pool, and where the judged pool goes."""

    pool: tyro.conf.Positional[tuple[str, ...]]  # files, folders, globs or object-store addresses
    out: str = "palimpsest-curated"  # folder for the judged shards and the report
    only_kept: bool = False  # write the rows that are kept and leave out the others
    broken: Literal["stop", "skip"] = "stop"  # what a file that cannot be used does; what is skipped is named
    workers: int | None = None  # shards at a time; default: as many as there are cores
    ray: str | None = None  # address of a Ray cluster that runs the same query


@dataclass(frozen=True, kw_only=True)
class AuditOptions:
    """The models to compare and the records to compare them on."""

    before: str  # folder or hub name of the model before forgetting
    after: str  # ... after forgetting
    forget: str  # records that must be gone
    reference: str | None = None  # a model trained without them
    retain: str | None = None  # records the method may have trained on
    utility: str | None = None  # records that only measure usefulness; default: a quarter of retain
    holdout: str | None = None  # records no model ever saw, like those to forget
    out: str = "palimpsest-out"  # folder for evidence, report and certificate


@dataclass(frozen=True, kw_only=True)
class BenchmarkOptions:
    """The model to examine and the multiple-choice items to examine it with."""

    model: str  # folder or hub name of the model
    benchmark: str  # items: .csv .jsonl[.gz] .json .parquet, a folder, hf:org/name[/config][:split], or lm-eval:TASK
    out: str = "palimpsest-out"  # folder for evidence, report and certificate


def forget(info: MethodInfo, method: Any, options: ForgetOptions) -> int:
    """Run the method on every request in turn; write ``OUT/model`` and ``OUT/forget.json``."""
    from palimpsest.core.watch import Watch
    from palimpsest.data.request import ForgetRequest
    from palimpsest.models.lm import LM

    if not options.forget:
        raise InputError("say which records must go (--forget FILE)")
    others = {name: getattr(options, name) for name in ("retain", "utility", "holdout", "train")}
    requests = [ForgetRequest.read(source, **others) for source in options.forget]
    out = Path(options.out)
    lm = start = LM.load(options.model)
    _announce(info, method, lm, requests[0])
    stream = [{"request": "before", **_usefulness(lm, requests[0])}]
    for number, request in enumerate(requests, 1):
        folder = out / ".unfinished" / f"{info.name}-{number}"
        lm = method(lm, request, watch=Watch(checkpoint=folder))
        stream.append({"request": request.name, "data": request.describe(), **_usefulness(lm, request)})
        _say(f"request {number} of {len(requests)} ({request.name}): " + _in_words(stream[-1]))
    lm.save(out / "model")
    record = {
        "method": {"name": info.name, "paper": info.paper, "config": config_of(method)},
        "model": {
            "before": {"source": options.model, "sha256": start.sha256},
            "after": {"source": "model", "sha256": lm.sha256, "guarded": lm.guard is not None},
        },
        "stream": stream,
    }
    write_json(out / "forget.json", record)
    shutil.rmtree(out / ".unfinished", ignore_errors=True)
    _say(f"wrote {out / 'model'}; now: palimpsest audit muse --before {options.model} --after {out / 'model'} ...")
    return 0


def audit(info: MethodInfo, method: Any, options: AuditOptions) -> int:
    """Run the audit; write the evidence with its report and certificate into OUT."""
    from palimpsest.jobs.proof import write_proof

    write_proof(audited(method, options), Path(options.out), options)
    return 0


def audited(method: Any, options: AuditOptions) -> Evidence:
    """The evidence of an audit of saved models."""
    from palimpsest.data.request import ForgetRequest
    from palimpsest.models.lm import LM

    sets = {name: getattr(options, name) for name in ("retain", "utility", "holdout")}
    request = ForgetRequest.read(options.forget, **sets)
    before, after = LM.load(options.before), LM.load(options.after)
    reference = LM.load(options.reference) if options.reference else None
    if before.sha256 == after.sha256:
        raise InputError(
            f"--before and --after are the same model (sha256 {before.sha256[:12]}): nothing was forgotten"
        )
    return method(before, after, request, reference)


def audit_benchmark(info: MethodInfo, method: Any, options: BenchmarkOptions) -> int:
    """Run an audit that takes one model and one benchmark; write the evidence, report and certificate into OUT."""
    from palimpsest.jobs.proof import write_proof

    write_proof(examined(method, options), Path(options.out), options)
    return 0


def examined(method: Any, options: BenchmarkOptions) -> Evidence:
    """The evidence of an audit of one saved model on one benchmark."""
    from palimpsest.audit.choices import read_items
    from palimpsest.models.lm import LM

    items = read_items(options.benchmark)
    return method(LM.load(options.model), items)


def curate(info: MethodInfo, method: Any, options: CurateOptions) -> int:
    """Judge the pool shard by shard; write the shards, ``curation.json`` and the one-page report into OUT."""
    from palimpsest.curate import engine
    from palimpsest.report import curation

    if not options.pool:
        raise InputError(f"say which pool: palimpsest curate {info.name} FILE ... --out DIR")
    done = engine.run(
        method,
        list(options.pool),
        options.out,
        ray=options.ray,
        workers=options.workers,
        only_kept=options.only_kept,
        broken=options.broken,
    )
    for fault in done.broken:
        _say(f"skipped: {fault['error']}")
    _say(f"{done.kept} of {done.rows} rows kept; {curation.write(options.out)}")
    return 0


JOBS: dict[str, tuple[Callable[[MethodInfo, Any, Any], int], type]] = {
    "forget": (forget, ForgetOptions),
    "audit": (audit, AuditOptions),
    "audit-benchmark": (audit_benchmark, BenchmarkOptions),
    "curate": (curate, CurateOptions),
}


def job_of(info: MethodInfo) -> tuple[Callable[[MethodInfo, Any, Any], int], type]:
    """What runs a method, and its options: the verb's, unless the method's class names another as `job`."""
    return JOBS[getattr(info.cls, "job", info.verb)]


def _announce(info: MethodInfo, method: Any, lm: LM, request: ForgetRequest) -> None:
    """One line on memory and time before the work, and a refusal if it cannot fit."""
    from palimpsest.forget.unlearn import Budget
    from palimpsest.jobs.plan import plan_training, refuse_if_too_large

    if not isinstance(method, Budget):
        return
    encoded = lm.encode(request.forget, max_length=method.max_length)
    plan = plan_training(
        f"{info.name} on {len(encoded)} records",
        lm,
        steps=method.total_steps(method.batches(encoded)),
        batch_size=method.batch_size,
        tokens=int(encoded.lengths.mean()),
        lora_rank=method.lora_rank,
    )
    _say(str(plan))
    refuse_if_too_large(plan)


def _usefulness(lm: LM, request: ForgetRequest) -> dict[str, float]:
    """Mean loss a token on what must go and on what must stay."""
    tables = {"forget_nll": request.forget, "utility_nll": request.utility or request.retain}
    return {name: float(lm.nll(table).mean()) for name, table in tables.items() if table is not None}


def _in_words(row: dict[str, Any]) -> str:
    return ", ".join(f"{name.replace('_', ' ')} {value:.3f}" for name, value in row.items() if isinstance(value, float))


def _say(line: str) -> None:
    print(line, file=sys.stderr)
