"""Batches made ahead of time by one thread, so that training on tasks made on the fly does not wait for them.

NumPy and torch let go of Python's lock while they compute.  A batch must be a pure function of the step, as in
data/batches.py, and use no global random state.  Knows nothing of what is in a batch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

Batches = Callable[[int], Any]


@dataclass(frozen=True, eq=False)
class Ahead:
    """The batches of `of`; asking for one starts the making of the next `depth`."""

    of: Batches
    depth: int
    _pool: ThreadPoolExecutor = field(repr=False)
    _made: dict[int, Future[Any]] = field(default_factory=dict, init=False, repr=False)

    @property
    def sha256(self) -> Any:
        """What tells the data apart is the source, not that it is read ahead."""
        from palimpsest.core.checkpoint import data_fingerprint
        from palimpsest.core.files import sha256_of

        return sha256_of(data_fingerprint(self.of))

    def __call__(self, step: int) -> Any:
        for near in range(step, step + self.depth + 1):
            if near not in self._made:
                self._made[near] = self._pool.submit(self.of, near)
        for far in [far for far in self._made if not step <= far <= step + self.depth]:
            self._made.pop(far).cancel()
        return self._made[step].result()


@contextmanager
def ahead(batches: Batches, depth: int = 4) -> Iterator[Ahead]:
    """`batches`, made up to `depth` steps before they are asked for, as long as the context lasts."""
    pool = ThreadPoolExecutor(1, thread_name_prefix="batches")
    try:
        yield Ahead(batches, depth, pool)
    finally:
        pool.shutdown(wait=True, cancel_futures=True)
