"""Reading the labels of many queries off one prompt: the JSON around them is given, only the labels are asked.

So the answer is always whole JSON, and each label comes with its probability (Dong et al. 2025, arXiv:2509.06806, let
the model write it and repair what is broken).  The prompt is read once for all queries.
"""

from __future__ import annotations

import inspect
from typing import Any

import numpy as np
import torch

from palimpsest.core.errors import InputError
from palimpsest.learn.incontext.table_prompts import opening
from palimpsest.models.anatomy import base_of
from palimpsest.models.encode import encode_prompts
from palimpsest.models.lm import LM


def check(lm: LM, classes: int) -> list[int]:
    """The tokens of the labels 0 .. `classes` - 1.  `InputError` unless each is one token of its own."""
    before = _ids(lm, opening(1))
    found = []
    for label in range(classes):
        ids = _ids(lm, f"{opening(1)}{label}{opening(2)}")
        if len(ids) <= len(before) or ids[: len(before)] != before or ids[len(before) + 1 :] != _ids(lm, opening(2)):
            raise InputError(f"the model's tokenizer does not write the label {label} as one token of its own")
        found.append(ids[len(before)])
    return found


def probabilities(lm: LM, question: str, queries: int, classes: int) -> np.ndarray:
    """(Q, C) of each query's labels among themselves, each after the likeliest labels of the queries before it.

    `InputError` if prompt and answer do not fit the model's context.
    """
    labels = check(lm, classes)
    pieces = [_ids(lm, opening(place)) for place in range(queries)]
    ids = encode_prompts(lm.tokenizer, [question])[0].tolist()
    length = len(ids) + sum(map(len, pieces)) + queries
    if length > lm.max_length:
        raise InputError(
            f"the rows and {queries} queries take {length} tokens, the model's context holds {lm.max_length}: "
            "give fewer rows, or ask fewer queries at once"
        )
    found = np.empty((queries, classes))
    past = "cache" if "cache" in inspect.signature(base_of(lm.model).forward).parameters else "past_key_values"
    seen: dict[str, Any] = {}
    with torch.inference_mode():
        for place, piece in enumerate(pieces):
            step = torch.tensor([ids + piece], device=lm.device)
            output = lm.model(input_ids=step, use_cache=True, logits_to_keep=1, **seen)
            seen = {past: getattr(output, past)}
            found[place] = output.logits[0, -1, labels].double().softmax(-1).cpu().numpy()
            ids = [labels[int(found[place].argmax())]]
    return found


def _ids(lm: LM, text: str) -> list[int]:
    return lm.tokenizer.encode(text, add_special_tokens=False)
