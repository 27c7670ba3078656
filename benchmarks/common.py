"""What the benchmarks share: measuring two sides in turns, a small table, and one line in results/benchmarks.jsonl."""

from __future__ import annotations

import datetime
import json
import platform
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from statistics import median

import torch

RESULTS = Path(__file__).resolve().parent.parent / "results" / "benchmarks.jsonl"


def in_turns(*sides: Callable[[], object], rounds: int = 5) -> list[list[float]]:
    """Seconds of every side in every round.  They take turns, so that a busy moment of the machine hits them alike."""
    seconds: list[list[float]] = [[] for _ in sides]
    for _ in range(rounds):
        for side, found in zip(sides, seconds, strict=True):
            began = time.perf_counter()
            side()
            found.append(time.perf_counter() - began)
    return seconds


def ratio_of(slow: list[float], fast: list[float]) -> float:
    """How many times faster: the median over the rounds of `in_turns`, each round compared with itself."""
    return median(a / b for a, b in zip(slow, fast, strict=True))


def report(name: str, target: float, ratio: float, *, at_most: bool = False, **parts: float | str) -> None:
    """Print the benchmark's table and append its line.  `target` is the least (or `at_most`) ratio wanted."""
    met = ratio <= target if at_most else ratio >= target
    print(
        f"{name}: {ratio:.2f} (wanted {'at most' if at_most else 'at least'} {target:g}: {'met' if met else 'MISSED'})"
    )
    for part, value in parts.items():
        print(
            f"  {part.replace('_', ' '):<40} {value:>14,.4g}"
            if isinstance(value, float | int)
            else f"  {part}: {value}"
        )
    line = {
        "name": name,
        "ratio": round(ratio, 4),
        "target": target,
        "at_most": at_most,
        "met": met,
        "parts": {part: round(v, 6) if isinstance(v, float) else v for part, v in parts.items()},
        "versions": {package: version(package) for package in ("palimpsest", "torch", "transformers", "accelerate")},
        "machine": machine(),
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
    }
    RESULTS.parent.mkdir(exist_ok=True)
    with RESULTS.open("a", encoding="utf-8") as handle:
        handle.write(json.dumps(line) + "\n")


def machine() -> str:
    """The processor by what it can do, not by whose it is."""
    amx = ", AMX" if torch.cpu._is_amx_tile_supported() else ""
    kind = f"{platform.machine()}, {torch.backends.cpu.get_cpu_capability()}{amx}, {torch.get_num_threads()} threads"
    return f"{kind}, {torch.cuda.get_device_name()}" if torch.cuda.is_available() else kind
