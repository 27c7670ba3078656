"""``palimpsest run``: the main job.  Teach (or take) a model, make it forget, audit it, write the proof."""

from __future__ import annotations

import sys
import time
from dataclasses import dataclass
from pathlib import Path

from palimpsest.jobs.compare import as_one, attempt_all, choose, chosen_methods, overrides, settings
from palimpsest.jobs.intruder import attacked, enough_to_attack
from palimpsest.jobs.material import Source, prepare
from palimpsest.jobs.proof import write_proof

WORLD_METHODS = "grad-diff,npo,wga"  # compared when nothing is asked for: the plainest, the best known, a weighted one


@dataclass(frozen=True, kw_only=True)
class Run(Source):
    """Teach a small model (or take yours), make it forget, audit it against a reference and write the proof.

    With no argument: an embedded fictional world, a small model trained on it, a retrained reference, three methods
    compared.  With --forget and --retain: a small model is trained on your texts first.  With --model: yours is used.
    """

    method: str | None = None  # one or several, separated by commas; default: npo (on the embedded world: three)
    out: str = "palimpsest-out"  # folder for model, evidence, report and certificate
    steps: int | None = None  # the most optimiser steps; default: the method's own
    lr: float | None = None  # learning rate; default: the method's own, or tuned where the model was trained here
    lora_rank: int | None = None  # train LoRA factors of this rank instead of all weights
    set: tuple[str, ...] = ()  # hyper-parameters of the one method, as NAME=VALUE ...
    folds: int = 0  # also run the method on so many growing and successive parts of the request (MUSE's C5 and C6)
    attacks: bool = False  # attack the result too: is it removed, or only suppressed? (about a minute more)


def run(options: Run) -> int:
    """Do the job; the proof is in the folder `options.out`."""
    began = time.monotonic()
    infos = chosen_methods("forget", options.method or ("npo" if options.forget else WORLD_METHODS))
    chosen = overrides(options) | settings(infos, options.set)
    _check_out(Path(options.out))
    material = prepare(options)
    if options.attacks:
        enough_to_attack(material)
    attempts = attempt_all(infos, chosen, material, folds=options.folds)
    best = choose(attempts)
    evidence = as_one(best, attempts)
    if options.attacks:
        evidence = attacked(evidence, best.lm, material)
    write_proof(evidence, Path(options.out), options, best.lm)
    print(f"done in {time.monotonic() - began:.0f} s", file=sys.stderr)
    return 0


def _check_out(out: Path) -> None:
    """Refuse a folder that cannot be written before any time is spent."""
    from palimpsest.core.errors import InputError

    if out.exists() and not out.is_dir():
        raise InputError(f"{out}: a file is there; --out wants a folder")
    out.mkdir(parents=True, exist_ok=True)
