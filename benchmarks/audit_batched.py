"""(d) The six-way audit of one model, against asking it one prompt at a time as MUSE's release does.

Both sides answer the same exam: recitals, questions about the forget, utility and retain sets after ten demonstrations,
likelihoods, and the membership attack.  The slow side is `transformers`' own `generate` and forward pass, unpadded.
Both sides must come to the same texts and, up to rounding, the same scores.

    python benchmarks/audit_batched.py
"""

from __future__ import annotations

import numpy as np
import torch

from common import in_turns, ratio_of, report
from palimpsest.audit import Muse, membership
from palimpsest.audit.answers import cut
from palimpsest.audit.exam import Exam, Sitting
from palimpsest.audit.memorisation import ends
from palimpsest.core.watch import Watch
from palimpsest.data.world import World
from palimpsest.models.lm import LM
from palimpsest.models.train import Recipe, train

Seen = tuple[list[str], list[float]]  # texts, scores


def batched(asked: Exam, lm: LM) -> Seen:
    sitting = Sitting(asked, lm, keep=False)
    texts = sitting.recital("forget") + [text for name in asked.questions for text in sitting.answers(name)]
    scores = [value for name in asked.scored for value in sitting.surprise(name).tolist()]
    return texts, scores + [value for name in asked.members for value in sitting.attack(name)["min-40%"].tolist()]


@torch.inference_mode()
def one_by_one(asked: Exam, lm: LM) -> Seen:
    said = [_generate(lm, recital.prompt, len(recital.truth)) for recital in asked.recitals["forget"]]
    texts = [lm.tokenizer.decode(ids, skip_special_tokens=True) for ids in said]
    for questions in asked.questions.values():
        for prompt in questions.prompts:
            answer = _generate(lm, np.array(lm.tokenizer(prompt)["input_ids"]), asked.sizes.answer_tokens)
            texts.append(cut(lm.tokenizer.decode(answer, skip_special_tokens=True)))
    scores = []
    for tables, own in ((asked.scored, False), (asked.members, True)):
        for table in tables.values():
            encoded = lm.encode(table)
            for ids, start in zip(encoded.ids, encoded.starts, strict=True):
                tokens = torch.as_tensor(ids[None])
                logprobs = lm.model(input_ids=tokens).logits[0, :-1].log_softmax(-1)
                values = logprobs.gather(1, tokens[0, 1:, None])[start - 1 :, 0].numpy()
                values = values[: len(values) - ends(lm, ids)] if own else values
                scores.append(float(membership.min_k([values], 40)[0] if own else -values.mean()))
    return texts, scores


def _generate(lm: LM, prompt: np.ndarray, tokens: int) -> torch.Tensor:
    ids = torch.as_tensor(prompt[None])
    mask = torch.ones_like(ids)
    return lm.model.generate(input_ids=ids, attention_mask=mask, do_sample=False, max_new_tokens=tokens)[
        0, ids.shape[1] :
    ]


def main() -> None:
    torch.set_num_threads(1)  # the faster way for both sides at this size
    world = World()
    lm = LM.build(world.train, "llama-tiny", vocab_size=768, max_length=512)
    lm = train(lm, world.train, Recipe(steps=300, lr=3e-3), watch=Watch(progress=False))
    asked = Muse(demonstrations=10).exam(lm, world.request())
    found: dict[str, Seen] = {}

    def slow() -> None:
        found["slow"] = one_by_one(asked, lm)

    def fast() -> None:
        found["fast"] = batched(asked, lm)

    in_turns(fast, rounds=1)  # warm up
    slow_seconds, fast_seconds = in_turns(slow, fast, rounds=5)
    (texts, scores), (other_texts, other_scores) = found["slow"], found["fast"]
    same = sum(one == other for one, other in zip(texts, other_texts, strict=True))
    worst = float(np.abs(np.array(scores) - np.array(other_scores)).max())
    if same != len(texts) or worst > 1e-4:
        raise SystemExit(f"the sides differ: {same} of {len(texts)} texts equal, scores by up to {worst:.2g}")
    report(
        "audit_batched",
        5,
        ratio_of(slow_seconds, fast_seconds),
        texts=float(len(texts)),
        scores=float(len(scores)),
        largest_difference_of_scores=worst,
        one_by_one_seconds=float(np.median(slow_seconds)),
        batched_seconds=float(np.median(fast_seconds)),
    )


if __name__ == "__main__":
    main()
