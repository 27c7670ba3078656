"""Twenty models of known truth through the whole battery: what it says, whether it is right, and how long it takes.

    OMP_NUM_THREADS=1 python benchmarks/removal_battery.py [SEEDS [FIRST]]

Five seeds of the claim's world, each with a model retrained from another seed (removed), the model before behind a
filter (suppressed), NPO (nobody knows: the evidence is printed) and the model before itself (not forgotten).
Wanted: no mistake on the three whose truth is known, and at most 60 s for one model, its before and reference included.
"""

from __future__ import annotations

import os
import sys
import tempfile
import time
from collections import Counter

import torch

from common import report
from palimpsest.audit.findings import Findings
from palimpsest.audit.recovery import words
from palimpsest.claims.sok_unlearning import Stage
from palimpsest.models.lm import LM

TRUTH = {"retrained": "removed", "guarded": "suppressed", "untouched": "not forgotten"}


def main(seeds: int = 5, first: int = 0) -> int:
    torch.set_num_threads(1)
    said: Counter[tuple[str, str]] = Counter()
    seconds: list[float] = []
    for seed in range(first, first + seeds):
        stage = Stage.set_up(seed, attacks=(), relearn_steps=40)
        for name, (found, took) in attacked(stage, stage.controls() | {"npo": stage.unlearned("npo")}).items():
            word = found.verdict.word
            said[name, word] += 1
            seconds.append(took)
            wrong = "" if TRUTH.get(name, word) == word else "WRONG"
            print(f"seed {seed}  {name:<10} {word:<14} {wrong} {took:5.1f} s  {found.verdict.why}", flush=True)
            if name == "npo":
                print(evidence(found), flush=True)
    mistakes = sum(count for (name, word), count in said.items() if TRUTH.get(name, word) != word)
    report(
        "removal_battery",
        60.0,
        max(seconds),
        at_most=True,
        models_of_known_truth=float(len(TRUTH) * seeds),
        mistakes=float(mistakes),
        npo=", ".join(f"{word} {count}" for (name, word), count in sorted(said.items()) if name == "npo"),
        median_seconds_a_model=sorted(seconds)[len(seconds) // 2],
    )
    return int(mistakes > 0 or max(seconds) > 60)


def attacked(stage: Stage, models: dict[str, LM]) -> dict[str, tuple[Findings, float]]:
    """{model: what was found, seconds}.  Readings go to an empty cache: kept ones would flatter the time."""
    kept, found = os.environ.get("PALIMPSEST_CACHE"), {}
    with tempfile.TemporaryDirectory() as folder:
        os.environ["PALIMPSEST_CACHE"] = folder
        for name, lm in models.items():
            began = time.perf_counter()
            findings = stage.battery.attack(lm)
            findings.measurements()
            found[name] = findings, time.perf_counter() - began
    if kept is None:
        del os.environ["PALIMPSEST_CACHE"]
    else:
        os.environ["PALIMPSEST_CACHE"] = kept
    return found


def evidence(found: Findings) -> str:
    """What each attack brings back, the most first; "asked" is without any."""
    shares = sorted(found.shares.values(), key=lambda share: -share.share)
    return "\n".join(
        f"    {words(s.name):<38} {s.share:5.0%}  ({s.low:.0%} to {s.high:.0%}){'' if s.power else '  no power'}"
        for s in shares
    )


if __name__ == "__main__":
    sys.exit(main(*map(int, sys.argv[1:])))
