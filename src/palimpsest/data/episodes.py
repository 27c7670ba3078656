"""Few-shot episodes (N ways, K shots) drawn from one pool of `Examples`: a stream of tasks.

`rows` draws hundreds of them at once as row numbers, so that an evaluation is a few array operations.
A task is a pure function of (seed, number): neither order nor block size changes it.
Knows nothing of learners, files or models.
Shapes: E episodes, N ways, K shots, Q queries an episode in all.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, Literal

import numpy as np

from palimpsest.core.errors import InputError
from palimpsest.core.seeds import numpy_rng
from palimpsest.data.tasks import Examples, Task, TaskStream

Contexts = Literal["any", "matched", "shift", "adversarial"]
CONTEXTS: tuple[Contexts, ...] = ("any", "matched", "shift", "adversarial")

_BLOCK = 512  # episodes drawn together


@dataclass(frozen=True)
class Rows:
    """E episodes as row numbers: `support` of the pool, `query` of the pool that queries come from."""

    support: np.ndarray  # (E, N, K)
    query: np.ndarray  # (E, Q)
    labels: np.ndarray  # (E, Q): 0 to N-1, or N for none of the episode's classes
    classes: np.ndarray  # (E, N): the pool's labels

    def __len__(self) -> int:
        return len(self.support)

    def __getitem__(self, part: slice) -> Rows:
        return Rows(self.support[part], self.query[part], self.labels[part], self.classes[part])


@dataclass(frozen=True, kw_only=True)
class Episodes(TaskStream):
    """N-way K-shot episodes from a pool: classes, then examples, drawn without replacement.

    - `queries` are those of each class; `nota` is the share of *all* queries that belong to none of the episode's
      classes (FewRel's toolkit counts otherwise), drawn evenly from the classes left over.
    - `query_from`: another pool with the same class names: support from one domain, queries from the other.
    - `contexts` (needs `pool.contexts`): "any" ignores them; otherwise the support of each class comes from one context
      of its own, and its queries from the same ("matched"), from the contexts of the episode's classes alike ("shift"),
      or from any context but its own ("adversarial").

    Raises InputError at once for a pool that cannot fill an episode, naming what is short.
    """

    pool: Examples
    way: int = 5
    shot: int = 1
    queries: int = 15
    nota: float = 0.0
    query_from: Examples | None = None
    contexts: Contexts = "any"
    count: int = 600  # episodes of one pass
    seed: int = 0

    def __post_init__(self) -> None:
        for name, value in (("way", self.way), ("shot", self.shot), ("queries", self.queries), ("count", self.count)):
            if value < (2 if name == "way" else 1):
                raise InputError(f"{name} must be at least {2 if name == 'way' else 1}, not {value}")
        if not 0 <= self.nota < 1:
            raise InputError(f"nota is a share of the queries, 0 to below 1, not {self.nota}")
        if self.contexts not in CONTEXTS:
            raise InputError(f"contexts must be one of {', '.join(CONTEXTS)}, not '{self.contexts}'")
        if self.contexts != "any" and (self.pool.contexts is None or self.query_from is not None):
            raise InputError(f"contexts='{self.contexts}' needs one pool, with a context for each example")
        self._check_sizes()

    def _check_sizes(self) -> None:
        spare = self.way + (self.nota > 0)
        if self.pool.way < spare:
            extra = f" and one more for queries of none of them (nota={self.nota})" if self.nota else ""
            raise InputError(f"{self.way} ways need {self.way} classes{extra}; the pool has {self.pool.way}")
        if self.query_from is not None and self.query_from.names != self.pool.names:
            raise InputError("query_from must have the very classes of the pool, in the same order")
        apart = self.query_from is not None
        for pool, needed, words in (
            (self.pool, self.shot + (0 if apart else self.queries), f"{self.shot} shots"),
            (self.query_from or self.pool, self.queries + (0 if apart else self.shot), f"{self.queries} queries"),
        ):
            if (pool.counts < needed).any():
                short = int(pool.counts.argmin())
                words = words if apart else f"{self.shot} shots and {self.queries} queries"
                raise InputError(
                    f"the class '{pool.names[short]}' has {pool.counts[short]} examples; {words} need {needed}"
                )
        if self.strangers:
            pool, left = self.query_from or self.pool, self.pool.way - self.way
            each, short = -(-self.strangers // left), int(pool.counts.argmin())
            if pool.counts[short] < each:
                raise InputError(
                    f"{self.strangers} queries of none of the classes (nota={self.nota}) are {each} of each class left "
                    f"over; '{pool.names[short]}' has {pool.counts[short]} examples (fewer ways or queries need less)"
                )
        if self.contexts != "any":
            _ = self._cells  # its checks are wanted now, not at the first draw

    def __len__(self) -> int:
        return self.count

    @property
    def strangers(self) -> int:
        """Queries an episode of none of its classes."""
        return round(self.nota / (1 - self.nota) * self.way * self.queries)

    def over(self, x: Any, query_x: Any = None) -> Episodes:
        """The very same episodes over other inputs of the same examples, such as their features."""
        other = self.query_from
        if other is not None:
            if query_x is None:
                raise InputError("queries come from another pool: give its inputs as well")
            other = replace(other, x=query_x)
        return replace(self, pool=replace(self.pool, x=x), query_from=other)

    def task(self, index: int) -> Task:
        return self.task_of(self.rows(index, 1), index)

    def task_of(self, rows: Rows, index: int) -> Task:
        """The one episode in `rows` as a `Task`."""
        names = tuple(self.pool.names[label] for label in rows.classes[0])
        labels = np.repeat(np.arange(self.way), self.shot)
        support = replace(self.pool.take(rows.support.reshape(-1)), y=labels, names=names)
        query = replace((self.query_from or self.pool).take(rows.query[0]), y=rows.labels[0], names=names)
        return Task(support, query, name=f"episode {index}")

    def rows(self, first: int, count: int) -> Rows:
        """The episodes `first` to `first + count - 1` at once."""
        if first < 0 or count < 1:
            raise InputError(f"no episodes {first} to {first + count - 1}")
        pieces = []
        for block in range(first // _BLOCK, (first + count - 1) // _BLOCK + 1):
            start = block * _BLOCK
            pieces.append(self._block(block)[max(first - start, 0) : first + count - start])
        if len(pieces) == 1:
            return pieces[0]
        parts = ("support", "query", "labels", "classes")
        return Rows(*(np.concatenate([getattr(piece, part) for piece in pieces]) for part in parts))

    def _block(self, block: int) -> Rows:
        if block not in self._last:
            rng = numpy_rng(self.seed, "episodes", block)
            self._last.clear()
            self._last[block] = self._draw(rng) if self.contexts == "any" else self._draw_in_contexts(rng)
        return self._last[block]

    @cached_property
    def _last(self) -> dict[int, Rows]:
        """The block drawn last: training asks for one episode after the other."""
        return {}

    @cached_property
    def _by_class(self) -> tuple[np.ndarray, np.ndarray]:
        """The pool's rows sorted by class, and where each class starts."""
        return _sorted_by(self.pool.y, self.pool.way)

    @cached_property
    def _queries_by_class(self) -> tuple[np.ndarray, np.ndarray]:
        return self._by_class if self.query_from is None else _sorted_by(self.query_from.y, self.query_from.way)

    def _draw(self, rng: np.random.Generator) -> Rows:
        order = rng.random((_BLOCK, self.pool.way)).argsort(axis=1)
        classes = order[:, : self.way]
        if self.query_from is None:
            both = _distinct(rng, self._by_class, classes, self.shot + self.queries)
            support, query = both[..., : self.shot], both[..., self.shot :]
        else:
            support = _distinct(rng, self._by_class, classes, self.shot)
            query = _distinct(rng, self._queries_by_class, classes, self.queries)
        return self._assembled(rng, support, query, order)

    def _assembled(self, rng: np.random.Generator, support: np.ndarray, query: np.ndarray, order: np.ndarray) -> Rows:
        """The block with its queries in one line, those of other classes at its end."""
        labels = np.repeat(np.arange(self.way), self.queries)[None].repeat(_BLOCK, axis=0)
        query = query.reshape(_BLOCK, -1)
        if self.strangers:
            others = order[:, self.way :]
            each = -(-self.strangers // others.shape[1])  # the classes left over take turns
            strange = _distinct(rng, self._queries_by_class, others, each)
            strange = strange.transpose(0, 2, 1).reshape(_BLOCK, -1)[:, : self.strangers]
            query = np.concatenate([query, strange], axis=1)
            labels = np.concatenate([labels, np.full_like(strange, self.way)], axis=1)
        return Rows(support, query, labels, order[:, : self.way])

    @cached_property
    def _cells(self) -> list[dict[int, np.ndarray]]:
        """Of each class: its contexts, with the rows of each."""
        assert self.pool.contexts is not None
        needed = self.shot + (self.queries if self.contexts == "matched" else 0)
        cells: list[dict[int, np.ndarray]] = []
        for label, name in enumerate(self.pool.names):
            rows = np.flatnonzero(self.pool.y == label)
            found = {int(c): rows[self.pool.contexts[rows] == c] for c in np.unique(self.pool.contexts[rows])}
            away = max((len(rows) - len(cell) for cell in found.values() if len(cell) >= needed), default=0)
            if all(len(cell) < needed for cell in found.values()):
                most = max(map(len, found.values()))
                raise InputError(f"the class '{name}' has at most {most} examples in one context; wanted {needed}")
            if self.contexts == "adversarial" and away < self.queries:
                raise InputError(
                    f"the class '{name}' has {away} examples outside its context; {self.queries} queries need more"
                )
            cells.append(found)
        return cells

    def _draw_in_contexts(self, rng: np.random.Generator) -> Rows:
        order = rng.random((_BLOCK, self.pool.way)).argsort(axis=1)
        drawn = [self._episode_in_contexts(rng, classes) for classes in order[:, : self.way]]
        support, query = (np.stack(part) for part in zip(*drawn, strict=True))
        return self._assembled(rng, support, query, order)

    def _episode_in_contexts(self, rng: np.random.Generator, classes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(N, K) support and (N, queries) rows; contexts differ between the classes wherever they can."""
        needed = self.shot + (self.queries if self.contexts == "matched" else 0)
        chosen: list[int] = []
        for label in classes:
            cells = self._cells[label]
            rows = sum(map(len, cells.values()))
            fit = [c for c, cell in cells.items() if len(cell) >= needed]
            if self.contexts == "adversarial":
                fit = [c for c in fit if rows - len(cells[c]) >= self.queries]
            chosen.append(int(rng.choice([c for c in fit if c not in chosen] or fit)))
        support, query = [], []
        for label, context in zip(classes, chosen, strict=True):
            cells = self._cells[label]
            own = rng.permutation(cells[context])
            support.append(own[: self.shot])
            left = {c: rng.permutation(cell) for c, cell in cells.items() if c != context}
            if self.contexts == "matched":
                query.append(own[self.shot : needed])
            elif self.contexts == "adversarial":
                query.append(rng.permutation(np.concatenate(list(left.values())))[: self.queries])
            else:
                left[context] = own[self.shot :]
                query.append(self._evenly(rng, left, chosen))
        return np.stack(support), np.stack(query)

    def _evenly(self, rng: np.random.Generator, left: dict[int, np.ndarray], chosen: list[int]) -> np.ndarray:
        """`queries` rows, as evenly as they last from the `chosen` contexts; the rest from any other."""
        ranks = [
            (place, c not in chosen, rng.random(), row) for c, rows in left.items() for place, row in enumerate(rows)
        ]
        within = sorted((rank for rank in ranks if not rank[1]), key=lambda rank: (rank[0], rank[2]))
        beyond = sorted((rank for rank in ranks if rank[1]), key=lambda rank: rank[2])
        return np.array([rank[3] for rank in (within + beyond)[: self.queries]])


def _sorted_by(y: np.ndarray, way: int) -> tuple[np.ndarray, np.ndarray]:
    order = np.argsort(y, kind="stable")
    return order, np.searchsorted(y[order], np.arange(way + 1))


def _distinct(
    rng: np.random.Generator, by_class: tuple[np.ndarray, np.ndarray], classes: np.ndarray, wanted: int
) -> np.ndarray:
    """(..., wanted) different rows of each of `classes` (...), uniformly.

    The j-th draw is a rank among the rows not yet taken; stepping over the taken ones, in rising order, gives a place.
    Draws come first in memory, so that each step works on one stretch of it.
    """
    order, starts = by_class
    sizes = (starts[1:] - starts[:-1])[classes].reshape(-1)
    if (sizes < wanted).any():
        raise InputError(f"a class has {sizes.min()} examples; wanted {wanted} different ones")
    ranks = rng.random((wanted, len(sizes)), dtype=np.float32) * (sizes - np.arange(wanted)[:, None]).astype(np.float32)
    places = np.minimum(ranks.astype(np.int32), (sizes - np.arange(wanted)[:, None] - 1).astype(np.int32))
    taken = np.empty_like(places)
    for j, place in enumerate(places):
        for t in range(j):
            place += taken[t] <= place
        new = place.copy()
        for t in range(j):  # put in where it belongs
            new, taken[t] = np.maximum(taken[t], new), np.minimum(taken[t], new)
        taken[j] = new
    rows = order[starts[:-1][classes].reshape(-1) + places]
    return np.ascontiguousarray(rows.T).reshape(*classes.shape, wanted)
