"""Synthetic tables a second: causal models of one form run together, against one model at a time.

Both sides draw from the same prior with the same NumPy code, 64 shots and 24 queries, on one core; the slow side makes
every table by itself, as a plain generator does.

    OMP_NUM_THREADS=1 python benchmarks/scm_tables.py
"""

from __future__ import annotations

from statistics import median

from common import in_turns, ratio_of, report
from palimpsest.core.seeds import numpy_rng
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


def main() -> None:
    in_turns(together, one_by_one, rounds=1)  # warm up
    fast, slow = in_turns(together, one_by_one, rounds=7)
    report(
        "scm_tables",
        5.0,
        ratio_of(slow, fast),
        tables_a_second=TABLES / median(fast),
        tables_a_second_one_by_one=TABLES / median(slow),
        shots=SHOTS,
        queries=QUERIES,
    )


if __name__ == "__main__":
    main()
