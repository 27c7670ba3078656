"""(i) Synthetic tables a second: causal models of one form run together, against a plain NumPy generator.

The plain side has the same distribution, written as a graph is thought of: one table at a time, one node at a time (all
rows of a node together), one tree at a time.  64 shots and 24 queries, one core.  Between the two lies our own code
with one model a call.

    OMP_NUM_THREADS=1 python benchmarks/scm_tables.py
"""

from __future__ import annotations

from statistics import median
from unittest import mock

import numpy as np

from common import in_turns, ratio_of, report
from palimpsest.core.seeds import numpy_rng
from palimpsest.data import causal
from palimpsest.data.causal import Array, Shape, activated
from palimpsest.data.tables import TablePrior, Tables, tables

SHOTS, QUERIES, TABLES = 64, 24, 512


def together() -> None:
    stream = Tables(shots=(SHOTS, SHOTS), queries=QUERIES, batch_size=16, block=8, seed=0)
    for step in range(TABLES // stream.batch_size):
        stream(step)


def one_by_one() -> None:
    rng, prior, made = numpy_rng(0, "one by one"), TablePrior(), 0
    while made < TABLES:
        made += len(tables(rng, prior, 1, SHOTS + QUERIES, SHOTS)[1])


def plain() -> None:
    with mock.patch.object(causal, "run", plain_run):
        one_by_one()


def plain_run(rng: np.random.Generator, form: Shape, models: int, rows: int) -> tuple[Array, Array]:
    """What `causal.run` draws, for one model."""
    assert models == 1
    causes = [cause(rng, rows, kind) for kind in [rng.integers(3)] for _ in range(form.causes)]
    if rng.random() < 0.5:
        causes = [rng.standard_normal() * one + rng.standard_normal() for one in causes]
    if form.trees:
        value = causes
        for _ in range(form.layers):
            depth, count = (min(4, least + int(rng.exponential(1))) for least in (2, 1))
            value = [sum(tree(rng, value, depth) for _ in range(count)) for _ in range(form.width)]
        return stacked(causes), value[rng.integers(form.width)][None].astype(np.float32)
    noise = np.exp(rng.uniform(np.log(1e-4), np.log(0.3)))
    value, hidden = mixed(rng, causes, form.width), []
    for _ in range(form.layers):
        active = list(activated(rng, stacked(value))[0].T)
        value = [one + noise * rng.standard_normal(rows) for one in mixed(rng, active, form.width)]
        hidden += value
    if not form.causal:
        return stacked(causes), value[0][None].astype(np.float32)
    target = len(hidden) - 1 - int(rng.integers(form.width if rng.random() < 0.5 else len(hidden)))
    others = [one for place, one in enumerate(hidden) if place != target]
    if rng.random() < 0.5:
        first = int(rng.integers(len(others) - form.columns + 1))
        picked = others[first : first + form.columns]
    else:
        picked = [others[place] for place in rng.permutation(len(others))[: form.columns]]
    return stacked(picked), hidden[target][None].astype(np.float32)


def stacked(columns: list[Array]) -> Array:
    return np.stack(columns, axis=1)[None].astype(np.float32)


def cause(rng: np.random.Generator, rows: int, kind: int) -> Array:
    if kind == 0:
        return rng.standard_normal(rows)
    if kind == 1:
        return rng.random(rows)
    own = rng.integers(4)
    if own == 1:
        return rng.integers(rng.integers(2, 21), size=rows).astype(float)
    if own == 2:
        return np.minimum(rng.zipf(2 + 2 * rng.random(), rows), 10).astype(float)
    return rng.random(rows) if own == 3 else rng.standard_normal(rows)


def mixed(rng: np.random.Generator, parents: list[Array], width: int) -> list[Array]:
    """Each node: a sum over the parents that it has."""
    kept = 1 - 0.9 * rng.random()
    scale = np.sqrt(max(kept * len(parents), 1))
    nodes = []
    for _ in range(width):
        node = np.zeros_like(parents[0])
        for parent in parents:
            if rng.random() < kept:
                node = node + rng.standard_normal() * parent / scale
        nodes.append(node)
    return nodes


def tree(rng: np.random.Generator, values: list[Array], depth: int) -> Array:
    """A regression tree, descended by all rows together."""
    asked = rng.integers(len(values), size=2**depth - 1)
    bounds = [values[column][rng.integers(len(values[0]))] for column in asked]
    node = np.zeros(len(values[0]), dtype=int)
    table = np.stack(values)
    for _ in range(depth):
        seen = table[asked[node], np.arange(len(node))]
        node = 2 * node + 1 + (seen > np.array(bounds)[node])
    return rng.standard_normal(2**depth)[node - (2**depth - 1)]


def main() -> None:
    in_turns(together, one_by_one, plain, rounds=1)  # warm up
    fast, single, slow = in_turns(together, one_by_one, plain, rounds=5)
    report(
        "scm_tables",
        5.0,
        ratio_of(slow, fast),
        tables_a_second=TABLES / median(fast),
        tables_a_second_plain=TABLES / median(slow),
        tables_a_second_one_by_one=TABLES / median(single),
        shots=SHOTS,
        queries=QUERIES,
    )


if __name__ == "__main__":
    main()
