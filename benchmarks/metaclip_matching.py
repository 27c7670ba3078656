"""MetaCLIP on generated captions: half a million entries, all cores, ten million rows in bounded memory.

(1) Captions a second on one core: our matcher against pyahocorasick as the official code uses it (space the text, walk
the automaton, collect the entries in a set), results compared.  ahocorasick-rs, one call a caption, for the record.
(2) The engine (match, count, balance, write) on ten million captions, on one core and on all; beside it what the
machine itself gives: the bare matcher in as many processes as there are cores, none of which knows of the others.
(3) The same runs' peak memory, of all processes together.

Words are random letters with frequencies by Zipf's law; every other caption is made of words that no entry names.

    pip install pyahocorasick
    python benchmarks/metaclip_matching.py [--rows ROWS]
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
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
ROWS = 10_000_000  # of the second part: starting a process and its index takes as long as half a million
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
    memory = PeakMemory()

    def on(count: int) -> None:
        """A process of its own, because a process's threads stay on the cores they were started on."""
        with memory:
            subprocess.run([sys.executable, __file__, "--on", str(folder), str(count)], check=True)

    alone, together = in_turns(lambda: on(1), lambda: on(cores()), rounds=2)
    result = json.loads((folder / "out" / "curation.json").read_text())
    report(
        f"metaclip: the engine on {cores()} cores against one",
        0.9 * cores(),
        ratio_of(alone, together),
        machine_itself=ceiling(folder),
        rows=rows,
        rows_per_second_one_core=rows / float(np.median(alone)),
        rows_per_second_all_cores=rows / float(np.median(together)),
    )
    report(
        f"metaclip: GiB of memory for {rows:,} captions on {cores()} cores",
        2,
        memory.peak,
        at_most=True,
        seconds=float(np.median(together)),
        kept=result["kept"],
        expected=result["notes"]["numbers"]["expected"],
    )


def ceiling(folder: Path) -> float:
    """How many times the matching of one process is done by one a core, without any engine."""

    def matched(count: int) -> float:
        commands = [[sys.executable, __file__, "--match", str(folder), str(core)] for core in range(count)]
        running = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for command in commands]
        return float(np.mean([float(process.communicate()[0]) for process in running]))

    return float(np.median([cores() * matched(1) / matched(cores()) for _ in range(3)]))


def match_on(folder: Path, core: int) -> float:
    """Seconds of matching a shard ten times on one core."""
    os.sched_setaffinity(0, [sorted(os.sched_getaffinity(0))[core]])
    matcher = Matcher((folder / "entries.txt").read_text().splitlines())
    texts = pyarrow.parquet.read_table(folder / "pool" / "00000.parquet")["text"].combine_chunks()
    began = time.perf_counter()
    for _ in range(10):
        matcher(texts)
    return time.perf_counter() - began


def work(folder: Path, count: int) -> None:
    """Curate the pool in `folder` on the first `count` cores."""
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:count])
    shutil.rmtree(folder / "out", ignore_errors=True)
    run(MetaCLIP(metadata=str(folder / "entries.txt"), id="id"), folder / "pool", folder / "out", progress="")


class PeakMemory:
    """The most memory (proportional set size, GiB) that all processes below this one held at once while inside."""

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
            self.peak = max(self.peak, sum(map(_held, _family(os.getpid())[1:])) / 2**20)


def _family(root: int) -> list[int]:
    """A process, and all below it."""
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


def write_pool(folder: Path, vocabulary: np.ndarray, rows: int) -> None:
    (folder / "pool").mkdir(exist_ok=True)
    for shard in range(-(-rows // SHARD)):
        texts = captions(vocabulary, min(SHARD, rows - shard * SHARD), np.random.default_rng([1, shard]))
        ids = pa.array(np.arange(len(texts)) + shard * SHARD)
        pyarrow.parquet.write_table(pa.table({"id": ids, "text": texts}), folder / "pool" / f"{shard:05d}.parquet")


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--rows", type=int, default=ROWS, help="captions of the second part")
    parser.add_argument("--on", nargs=2, metavar=("FOLDER", "CORES"), help=argparse.SUPPRESS)
    parser.add_argument("--match", nargs=2, metavar=("FOLDER", "CORE"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.on:
        work(Path(arguments.on[0]), int(arguments.on[1]))
        return
    if arguments.match:
        print(match_on(Path(arguments.match[0]), int(arguments.match[1])))
        return
    rng = np.random.default_rng(0)
    vocabulary = words(rng)
    names = entries(vocabulary, rng)
    match(names, captions(vocabulary, 200_000, rng))
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "entries.txt").write_text("\n".join(names))
        write_pool(folder, vocabulary, arguments.rows)
        del vocabulary, names
        spread(folder, arguments.rows)


if __name__ == "__main__":
    main()
