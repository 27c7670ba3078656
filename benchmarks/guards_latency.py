"""(e) What a guard adds to a prompt: the time to answer behind ECO's gate against the bare model, one prompt at a time.

Prompts arrive singly, as at a server, and both sides answer each with greedy tokens; the guarded side also asks its
gate (a sentence encoder of 22 million weights).  Half of the prompts are about what must go.  The added time does not
depend on the model: read the ratio beside the milliseconds.  Both sides must agree where the gate lets through.

    python benchmarks/guards_latency.py
"""

from __future__ import annotations

from statistics import median

from common import in_turns, ratio_of, report
from palimpsest.core.watch import Watch
from palimpsest.data.world import World
from palimpsest.forget.eco import ECO, EcoGuard
from palimpsest.models.lm import LM
from palimpsest.models.train import Recipe, train

PROMPTS = 40
TOKENS = 32


def main() -> None:
    world = World(people=40)
    lm = LM.build(world.train, "llama-small", vocab_size=768, max_length=256)
    lm = train(lm, world.train, Recipe(steps=30, lr=1e-3, batch_size=16), watch=Watch(progress=False))
    guarded = ECO(strength=100.0)(lm, world.request())
    asked = [list(world.questions(split, "held-out")["prompt"])[: PROMPTS // 2] for split in ("forget", "retain")]
    prompts = asked[0] + asked[1]
    guard = guarded.guard
    assert isinstance(guard, EcoGuard)
    passed = [prompt for prompt, scope in zip(prompts, guard.detected(prompts), strict=True) if scope < 0]

    def bare() -> None:
        for prompt in prompts:
            lm.generate([prompt], max_new_tokens=TOKENS)

    def behind() -> None:
        for prompt in prompts:
            guarded.generate([prompt], max_new_tokens=TOKENS)

    def gate() -> None:
        for prompt in prompts:
            guard.detected([prompt])

    if [guarded.generate([p]) for p in passed] != [lm.generate([p]) for p in passed]:
        raise SystemExit("the sides differ on prompts that the gate lets through")
    in_turns(bare, behind, rounds=1)  # warm up
    bare_seconds, behind_seconds, gate_seconds = in_turns(bare, behind, gate)
    added = median(b - a for a, b in zip(bare_seconds, behind_seconds, strict=True)) / PROMPTS
    report(
        "guard_latency_eco",
        2.0,
        ratio_of(behind_seconds, bare_seconds),
        at_most=True,
        bare_milliseconds_a_prompt=1e3 * median(bare_seconds) / PROMPTS,
        added_milliseconds_a_prompt=1e3 * added,
        gate_milliseconds_a_prompt=1e3 * median(gate_seconds) / PROMPTS,
        detected=float(len(prompts) - len(passed)),
        prompts=float(len(prompts)),
        tokens=float(TOKENS),
    )


if __name__ == "__main__":
    main()
