"""Where claims are measured: in fresh processes of one thread each, on a Ray cluster, or right here.

Only names and numbers travel between processes, never models.  Knows nothing of verdicts or of what is kept.
"""

from __future__ import annotations

import contextlib
import importlib
import io
import os
import signal
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from concurrent.futures import Future, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from functools import partial
from multiprocessing.connection import Connection
from operator import attrgetter
from typing import Any

from palimpsest.claims.definition import Claim, ClaimError, NotFinite
from palimpsest.core.errors import InputError, MissingExtra
from palimpsest.core.records import environment
from palimpsest.core.seeds import seed_everything

Submit = Callable[["Run"], "Future[dict[str, Any]]"]


@dataclass(frozen=True)
class Run:
    """One seed of a claim, with or without the mechanism: all that a process needs to measure it."""

    module: str
    attribute: str  # the claim's name in its module
    paper: str
    seed: int
    mechanism: bool
    scale: float

    def __str__(self) -> str:
        return f"{self.paper}, seed {self.seed}{'' if self.mechanism else ', control'}"


def measured(runs: list[Run], workers: int, ray: str | None) -> Iterator[tuple[Run, dict[str, Any] | Exception]]:
    """Each run with what it measured, as they complete.  After one that fails, its claim's others are left out."""
    failed: set[str] = set()
    if ray is None and workers == 1:
        with _one_thread():
            for one in runs:
                if one.paper not in failed:
                    value = _attempt(one, partial(measure_run, one))
                    if isinstance(value, Exception):
                        failed.add(one.paper)
                    yield one, value
        return
    with _processes(workers) if ray is None else _ray(ray) as submit:
        futures = {submit(one): one for one in runs}
        for future in as_completed(futures):
            one = futures[future]
            if one.paper in failed:
                continue
            value = _attempt(one, future.result)
            if isinstance(value, Exception):
                failed.add(one.paper)
                if ray is None:  # a Ray task has begun elsewhere; its result is passed over
                    for other in [other for other, its in futures.items() if its.paper == one.paper]:
                        other.cancel()
            yield one, value


def measure_run(one: Run) -> dict[str, Any]:
    """Measure one run in this process: ``values``, or ``broken`` if one is not finite; ``seconds`` and ``machine``."""
    claim: Claim = attrgetter(one.attribute)(importlib.import_module(one.module))
    seed_everything(one.seed, "claim", one.paper)
    start = time.perf_counter()
    try:
        found: dict[str, Any] = {"values": claim(one.seed, mechanism=one.mechanism, scale=one.scale)}
    except NotFinite as error:
        found = {"broken": str(error)}
    return found | {"seconds": time.perf_counter() - start, "machine": machine()}


def machine() -> dict[str, Any]:
    """What can change a claim's numbers from one machine to the next."""
    import torch

    return environment() | {"dtype": str(torch.get_default_dtype()).removeprefix("torch."), "cores": cores()}


def cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _attempt(one: Run, measure: Callable[[], dict[str, Any]]) -> dict[str, Any] | Exception:
    """What `measure` returns, or the error that it raises or brings from another process."""
    try:
        value = measure()
    except BrokenProcessPool:
        return ClaimError(
            f"{one}: a measuring process died (out of memory? use fewer workers; "
            "in a script of your own, call this under `if __name__ == '__main__':`)"
        )
    except Exception as error:
        return error
    if "refused" in value:
        return InputError(f"{one}: {value['refused']}")
    return ClaimError(f"{one}:\n{value['failed']}") if "failed" in value else value


def _away(one: Run) -> dict[str, Any]:
    """`measure_run` in a process of its own.  Errors go home as text, for not every exception survives the journey.

    The training's own progress bars are kept off the terminal: they would write over the runner's.
    """
    try:
        with contextlib.redirect_stderr(io.StringIO()):
            return measure_run(one)
    except InputError as error:
        return {"refused": str(error)}
    except Exception:
        return {"failed": traceback.format_exc()}


@contextlib.contextmanager
def _processes(workers: int) -> Iterator[Submit]:
    """Yield a function that starts a run in one of `workers` fresh processes and returns its future.

    The processes end at once when the block ends with an error (Ctrl-C, say) or this process is killed.
    """
    import multiprocessing
    from concurrent.futures import ProcessPoolExecutor

    context = multiprocessing.get_context("spawn")
    leash, end = context.Pipe(duplex=False)  # `end` is closed here, or by the system if this process dies
    pool = ProcessPoolExecutor(workers, context, initializer=_enter, initargs=(leash,))
    try:
        yield lambda one: pool.submit(_away, one)
    except BaseException:
        end.close()
        raise
    finally:
        pool.shutdown(cancel_futures=True)
        end.close()
        leash.close()


def _enter(leash: Connection) -> None:
    """Prepare a measuring process: one thread (fastest for small models side by side), no life after its parent's."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to answer

    def follow() -> None:
        with contextlib.suppress(EOFError, OSError):
            leash.recv()
        os._exit(1)

    threading.Thread(target=follow, daemon=True).start()
    for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"):
        os.environ[name] = "1"
    import torch
    from threadpoolctl import threadpool_limits

    torch.set_num_threads(1)
    threadpool_limits(1)


@contextlib.contextmanager
def _one_thread() -> Iterator[None]:
    """As many threads as in a measuring process, so that the number of workers cannot change a number."""
    import torch
    from threadpoolctl import threadpool_limits

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with threadpool_limits(1):
            yield
    finally:
        torch.set_num_threads(threads)


@contextlib.contextmanager
def _ray(address: str) -> Iterator[Submit]:
    """Yield a function that starts a run on the Ray cluster at `address` and returns its future."""
    try:
        import ray
    except ImportError:
        raise MissingExtra("ray", "cluster") from None
    try:
        ray.init(address=address, log_to_driver=False, include_dashboard=False if address == "local" else None)
    except ConnectionError as error:
        raise InputError(f"no Ray cluster at {address}: {error}") from None
    try:
        remote = ray.remote(num_cpus=1, max_retries=0, runtime_env={"env_vars": {"OMP_NUM_THREADS": "1"}})(_away)
        yield lambda one: remote.remote(one).future()
    finally:
        ray.shutdown()
