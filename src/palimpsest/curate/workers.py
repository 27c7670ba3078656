"""Run one function over many shards: on all cores of this machine, or on a Ray cluster.

The unit of distribution is the shard, not the batch: every worker runs the same Daft query on its own shard, keeps what
is costly to build (an index of half a million entries, a model) from one shard to the next, and a method written in
plain Python uses all cores as well as one that lets threads run.  Knows nothing of what a task does.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from palimpsest.core.errors import InputError, MissingExtra

Task = tuple[Any, ...]


def cores() -> int:
    """The cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def run(function: Callable[..., Any], tasks: Sequence[Task], *, workers: int | None, ray: str | None) -> Iterator[Any]:
    """What ``function(*task)`` returns for each task, as they finish, in any order.

    `workers` processes here (None: one a core), or all of the Ray cluster at `ray` ("local" starts one here).
    With one task or worker everything happens in this process.
    """
    if not tasks:
        return
    if ray is not None:
        yield from _on_ray(function, tasks, ray)
        return
    count = min(cores() if workers is None else workers, len(tasks))
    if count < 1:
        raise InputError(f"workers must be at least 1, not {workers}")
    threads = max(1, cores() // count)
    if count == 1:
        prepare(threads)
        for task in tasks:
            yield function(*task)
        return
    from joblib import Parallel, delayed
    from joblib.externals.loky.process_executor import TerminatedWorkerError

    pool = Parallel(n_jobs=count, backend="loky", return_as="generator_unordered", batch_size=1)
    try:
        yield from pool(delayed(_in_worker)(os.getpid(), threads, function, task) for task in tasks)
    except TerminatedWorkerError as error:
        raise RuntimeError(
            f"a worker process was killed, most often for want of memory: run again with fewer than {count} workers "
            "(finished shards are kept)"
        ) from error


_prepared = False


def prepare(threads: int) -> None:
    """Give Daft and Arrow `threads` threads in this process, once; a runner that the user has chosen stays."""
    global _prepared
    if _prepared:
        return
    import pyarrow

    from palimpsest.curate.pool import require_daft

    daft = require_daft()
    if daft.runners._get_runner() is None:
        daft.set_runner_native(num_threads=threads)
        pyarrow.set_cpu_count(threads)
    _prepared = True


def _in_worker(parent: int, threads: int, function: Callable[..., Any], task: Task) -> Any:
    if not _prepared and os.getpid() != parent:
        threading.Thread(target=_end_with, args=(parent,), daemon=True).start()
    prepare(threads)
    return function(*task)


def _end_with(parent: int) -> None:
    """A worker whose parent was killed must not go on."""
    while os.getppid() == parent:
        time.sleep(1)
    os._exit(1)


def _on_ray(function: Callable[..., Any], tasks: Sequence[Task], address: str) -> Iterator[Any]:
    try:
        import ray
    except ModuleNotFoundError:
        raise MissingExtra("ray", "cluster") from None
    started = not ray.is_initialized()
    if started:
        try:
            ray.init(address=address, log_to_driver=False, configure_logging=False)
        except (ConnectionError, ValueError) as error:
            raise InputError(f"no Ray cluster at '{address}' ({str(error).splitlines()[0]})") from error
    try:
        remote = ray.remote(num_cpus=1)(_on_node)
        waiting = list(reversed(tasks))
        running: list[Any] = []
        at_once = 2 * max(1, int(ray.cluster_resources().get("CPU", 1)))
        while waiting or running:
            while waiting and len(running) < at_once:
                running.append(remote.remote(function, waiting.pop()))
            done, running = ray.wait(running)
            yield from ray.get(done)
    finally:
        if started:
            ray.shutdown()


def _on_node(function: Callable[..., Any], task: Task) -> Any:
    prepare(1)
    return function(*task)
