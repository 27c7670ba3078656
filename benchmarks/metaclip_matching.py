"""MetaCLIP on generated captions: half a million entries, all cores, ten million rows in bounded memory.

(1) Captions a second on one core: our matcher against pyahocorasick as the official code uses it (space the text, walk
the automaton, collect the entries in a set), results compared.  ahocorasick-rs, one call a caption, for the record.
(2) The engine (match, count, balance, write) with one process and with one a core.
(3) With ``--rows 10000000``: the same over that many captions; peak memory of all processes together.

Words are random letters with frequencies by Zipf's law; every other caption is made of words that no entry names.

    pip install pyahocorasick
    python benchmarks/metaclip_matching.py [--rows ROWS]
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet

from common import in_turns, ratio_of, report
from palimpsest.curate import MetaCLIP, run
from palimpsest.curate.matching import Matcher, spaced
from palimpsest.curate.workers import cores

WORDS, ENTRIES, SHARD = 400_000, 500_000, 250_000
SPREAD = 24 * SHARD  # rows of the second part: starting a process and its index takes as long as half a million
SAMPLE = 20_000  # captions matched by the slow sides


def words(rng: np.random.Generator) -> np.ndarray:
    """Different words of 2 to 11 letters, the most frequent first."""
    letters = rng.choice(list("etaoinshrdlcumwfgypbvk"), (2 * WORDS, 11))
    lengths = rng.integers(2, 12, 2 * WORDS)
    found = dict.fromkeys("".join(row[:length]) for row, length in zip(letters, lengths, strict=True))
    return np.array(list(found)[:WORDS], dtype=object)


def entries(vocabulary: np.ndarray, rng: np.random.Generator) -> list[str]:
    """Single words for the most part, as in the paper; the others are pairs."""
    known = len(vocabulary) * 4 // 5
    found = dict.fromkeys(vocabulary[:known])
    while len(found) < ENTRIES:
        pairs = vocabulary[np.minimum(rng.pareto(0.3, (ENTRIES, 2)) * 20, 1e15).astype(np.int64) % known]
        found |= dict.fromkeys(f"{a} {b}" for a, b in pairs)
    return list(found)[:ENTRIES]


def captions(vocabulary: np.ndarray, rows: int, rng: np.random.Generator) -> pa.Array:
    weights = 1 / np.arange(1, len(vocabulary) * 4 // 5 + 1) ** 1.05
    lengths = rng.integers(4, 16, rows)
    offsets = np.concatenate([[0], np.cumsum(lengths)])
    places = np.searchsorted(np.cumsum(weights) / weights.sum(), rng.random(offsets[-1]))
    junk = np.repeat(np.arange(rows) % 2 == 1, lengths)
    places[junk] = len(weights) + rng.integers(len(vocabulary) - len(weights), size=int(junk.sum()))
    tokens = pa.array(vocabulary, pa.string()).take(pa.array(places))
    commas = rng.random(len(tokens)) < 0.1
    tokens = pc.if_else(pa.array(commas), pc.binary_join_element_wise(tokens, ",", ""), tokens)
    return pc.binary_join(pa.ListArray.from_arrays(pa.array(offsets, pa.int32()), tokens), " ")


def match(names: list[str], texts: pa.Array) -> None:
    import ahocorasick
    import ahocorasick_rs

    ours = Matcher(names)
    official = ahocorasick.Automaton()
    for number, name in enumerate(names):
        official.add_word(spaced(name), (number, name))
    official.make_automaton()
    rust = ahocorasick_rs.AhoCorasick([spaced(name) for name in names])
    few = texts.slice(0, SAMPLE).to_pylist()
    found: dict[str, list[list[int]]] = {}

    def by_ours() -> None:
        found["ours"] = ours(texts)

    def by_official() -> None:
        found["official"] = [sorted({number for _, (number, _) in official.iter(spaced(text))}) for text in few]

    def by_rust() -> None:
        found["rust"] = [
            sorted({number for number, *_ in rust.find_matches_as_indexes(spaced(text), overlapping=True)})
            for text in few
        ]

    mine, theirs, rusts = in_turns(by_ours, by_official, by_rust)
    same = found["ours"].slice(0, SAMPLE).to_pylist()
    assert same == found["official"] == found["rust"]
    scale = len(texts) / SAMPLE
    report(
        "metaclip: captions a second against pyahocorasick, one core",
        5,
        ratio_of([seconds * scale for seconds in theirs], mine),
        ours_captions_per_second=len(texts) / float(np.median(mine)),
        pyahocorasick_captions_per_second=SAMPLE / float(np.median(theirs)),
        ahocorasick_rs_captions_per_second=SAMPLE / float(np.median(rusts)),
        entries=len(names),
        entries_a_caption=float(np.mean([len(row) for row in same])),
    )


def spread(folder: Path, rows: int) -> None:
    def on(count: int) -> None:
        """A process of its own, because a process's threads stay on the cores they were started on."""
        subprocess.run([sys.executable, __file__, "--on", str(folder), str(count)], check=True)

    alone, together = in_turns(lambda: on(1), lambda: on(cores()), rounds=2)
    report(
        f"metaclip: the engine on {cores()} cores against one",
        0.9 * cores(),
        ratio_of(alone, together),
        rows_per_second_one_core=rows / float(np.median(alone)),
        rows_per_second_all_cores=rows / float(np.median(together)),
    )


def work(folder: Path, count: int) -> None:
    """Curate the pool in `folder` on the first `count` cores."""
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:count])
    with tempfile.TemporaryDirectory(dir=folder) as out:
        run(MetaCLIP(metadata=str(folder / "entries.txt"), id="id"), folder / "pool", out, progress="")


class PeakMemory:
    """The most memory (proportional set size, GiB) that this process and all below it held at once while inside."""

    peak = 0.0

    def __enter__(self) -> PeakMemory:
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._done.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._done.wait(0.2):
            self.peak = max(self.peak, sum(map(_held, _family(os.getpid()))) / 2**20)


def _family(root: int) -> list[int]:
    parents = {}
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            parents[int(path.parent.name)] = int(path.read_text().rpartition(")")[2].split()[1])
        except OSError:
            continue
    found = [root]
    for process in found:
        found += [child for child, parent in parents.items() if parent == process]
    return found


def _held(process: int) -> int:
    """KiB."""
    try:
        lines = Path(f"/proc/{process}/smaps_rollup").read_text().splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) for line in lines if line.startswith("Pss:")), 0)


def large(folder: Path, method: MetaCLIP, rows: int) -> None:
    began = time.perf_counter()
    with PeakMemory() as memory:
        result = run(method, folder / "pool", folder / "out", progress="")
    seconds = time.perf_counter() - began
    report(
        f"metaclip: GiB of memory for {rows:,} captions on {cores()} cores",
        2,
        memory.peak,
        at_most=True,
        seconds=seconds,
        rows_per_second=rows / seconds,
        kept=result.kept,
        expected=result.notes["numbers"]["expected"],
    )


def write_pool(folder: Path, vocabulary: np.ndarray, rows: int) -> None:
    (folder / "pool").mkdir(exist_ok=True)
    for shard in range(-(-rows // SHARD)):
        texts = captions(vocabulary, min(SHARD, rows - shard * SHARD), np.random.default_rng([1, shard]))
        ids = pa.array(np.arange(len(texts)) + shard * SHARD)
        pyarrow.parquet.write_table(pa.table({"id": ids, "text": texts}), folder / "pool" / f"{shard:05d}.parquet")


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--rows", type=int, default=0, help="captions of the third part; 0: without it")
    parser.add_argument("--on", nargs=2, metavar=("FOLDER", "CORES"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.on:
        work(Path(arguments.on[0]), int(arguments.on[1]))
        return
    rows = arguments.rows
    rng = np.random.default_rng(0)
    vocabulary = words(rng)
    names = entries(vocabulary, rng)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "entries.txt").write_text("\n".join(names))
        method = MetaCLIP(metadata=str(folder / "entries.txt"), id="id")
        if rows:
            write_pool(folder, vocabulary, rows)
            del vocabulary, names
            large(folder, method, rows)
        else:
            match(names, captions(vocabulary, 200_000, rng))
            write_pool(folder, vocabulary, SPREAD)
            spread(folder, SPREAD)


if __name__ == "__main__":
    main()
