"""Twenty models of known truth through the whole battery: what it says, whether it is right, and how long it takes.

    OMP_NUM_THREADS=1 python benchmarks/removal_battery.py [SEEDS]

Five seeds of the claim's world, each with a model retrained from another seed (removed), the model before behind a
filter (suppressed), NPO (nobody knows: the evidence is printed) and the model before itself (not forgotten).
Wanted: no mistake on the three whose truth is known, and at most 60 s for one model, its before and reference included.
"""

from __future__ import annotations

import sys
import time

import torch

from palimpsest.audit.findings import Findings
from palimpsest.audit.recovery import words
from palimpsest.claims.sok_unlearning import Stage

TRUTH = {"retrained": "removed", "guarded": "suppressed", "untouched": "not forgotten"}


def main(seeds: int = 5) -> int:
    torch.set_num_threads(1)
    wrong, longest = 0, 0.0
    for seed in range(seeds):
        stage = Stage.set_up(seed, attacks=(), relearn_steps=40)
        models = stage.controls() | {"npo": stage.unlearned("npo")}
        for name, lm in models.items():
            began = time.perf_counter()
            found = stage.battery.attack(lm)
            word = found.verdict.word
            seconds = time.perf_counter() - began
            longest = max(longest, seconds)
            right = TRUTH.get(name, word) == word
            wrong += not right
            print(
                f"seed {seed}  {name:<10} {word:<14} {'' if right else 'WRONG'} {seconds:5.1f} s  {found.verdict.why}"
            )
            if name == "npo":
                print(evidence(found))
    print(
        f"{wrong} mistakes on {len(TRUTH) * seeds} models of known truth; the longest took {longest:.1f} s (wanted 60)"
    )
    return int(wrong > 0 or longest > 60)


def evidence(found: Findings) -> str:
    """What each attack brings back, the most first."""
    shares = sorted(found.shares.values(), key=lambda share: -share.share)
    return "\n".join(f"    {words(s.name):<38} {s.share:5.0%}  ({s.low:.0%} to {s.high:.0%})" for s in shares)


if __name__ == "__main__":
    sys.exit(main(int(sys.argv[1]) if len(sys.argv) > 1 else 5))
