"""(e) What a guard adds to a prompt: the time to answer behind ECO's gate or O3's detectors, against the bare model.

Prompts arrive singly, as at a server, and every side answers each with greedy tokens.  ECO's side also asks its gate (a
sentence encoder of 22 million weights, once a prompt); O3's asks a tuned encoder for each of its requests, of which
there are four, and adds its adapter to every matrix where a detector fires.  Half of the prompts are about what must
go.  What the asking takes does not depend on the model: read the ratio beside the milliseconds.  All sides must agree
where a guard lets a prompt through.

    python benchmarks/guards_latency.py
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from statistics import median

from common import in_turns, ratio_of, report
from palimpsest.core.watch import Watch
from palimpsest.data.request import ForgetRequest
from palimpsest.data.subjects import facts, table
from palimpsest.forget.eco import ECO, EcoGuard
from palimpsest.forget.o3 import O3, O3Guard
from palimpsest.models.lm import LM
from palimpsest.models.train import Recipe, train

PROMPTS = 40
TOKENS = 32
REQUESTS = ("composer", "chemist", "captain", "climber")
KEPT = ("chef", "striker")
QUIET = Watch(progress=False)


def main() -> None:
    known = facts(0, 8)
    tables = {subject: table([one for one in known if one.subject == subject]) for subject in (*REQUESTS, *KEPT)}
    lm = LM.build(table(known), "llama-small", vocab_size=768, max_length=256)
    lm = train(lm, table(known), Recipe(steps=30, lr=1e-3, batch_size=16), watch=QUIET)
    asked = [one.asked[2] for one in known if one.subject == REQUESTS[0]][: PROMPTS // 2]
    prompts = asked + [one.asked[2] for one in known if one.subject == KEPT[0]][: PROMPTS // 2]
    retain = table([one for one in known if one.subject in KEPT])

    behind_gate = ECO(strength=100.0)(lm, ForgetRequest(forget=tables[REQUESTS[0]], retain=retain))
    behind_detectors = lm
    for subject in REQUESTS:
        method = O3(steps=4, batch_size=16, detector_epochs=1)
        behind_detectors = method(behind_detectors, ForgetRequest(forget=tables[subject]), watch=QUIET)
    gate, detectors = behind_gate.guard, behind_detectors.guard
    assert isinstance(gate, EcoGuard)
    assert isinstance(detectors, O3Guard)
    for name, guarded, scope in (
        ("eco", behind_gate, lambda texts: gate.detected(texts) >= 0),
        ("o3", behind_detectors, lambda texts: detectors.weights(texts) > 0),
    ):
        measure(name, lm, guarded, prompts, scope)


def measure(name: str, lm: LM, guarded: LM, prompts: list[str], scope: Callable[[Sequence[str]], object]) -> None:
    """Time one guard against the bare model, and report it."""
    found = [bool(one) for one in scope(prompts)]  # type: ignore[attr-defined]
    passed = [prompt for prompt, fires in zip(prompts, found, strict=True) if not fires]
    if [guarded.generate([p]) for p in passed] != [lm.generate([p]) for p in passed]:
        raise SystemExit(f"{name}: the sides differ on prompts that the guard lets through")

    def answered(model: LM) -> None:
        for prompt in prompts:
            model.generate([prompt], max_new_tokens=TOKENS)

    def only_asked() -> None:
        for prompt in prompts:
            scope([prompt])

    sides = (lambda: answered(lm), lambda: answered(guarded), only_asked)
    in_turns(*sides, rounds=1)  # warm up
    bare, behind, asking = in_turns(*sides)
    added = median(b - a for a, b in zip(bare, behind, strict=True)) / PROMPTS
    report(
        f"guard_latency_{name}",
        2.0,
        ratio_of(behind, bare),
        at_most=True,
        bare_milliseconds_a_prompt=1e3 * median(bare) / PROMPTS,
        added_milliseconds_a_prompt=1e3 * added,
        asking_milliseconds_a_prompt=1e3 * median(asking) / PROMPTS,
        detected=float(sum(found)),
        prompts=float(len(prompts)),
        tokens=float(TOKENS),
    )


if __name__ == "__main__":
    main()
