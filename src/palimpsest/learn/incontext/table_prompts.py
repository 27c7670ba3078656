"""Tables as a language model reads them: numbers as integers of three digits, a row as a line, answers as JSON.

Dong et al. 2025 (arXiv:2509.06806), sections on serialisation and prompts, as in their released code; values above 999
are cut off, which the code does not do.  In the small vocabulary of `number_tokenizer` each is one token.
Shapes: S labelled rows, Q queries, D columns.
"""

from __future__ import annotations

import json
import string
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from palimpsest.models.tokenizers import BOS, EOS, PAD, SPECIAL, UNK

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

NUMBERS = 1000
SCALE, MIDDLE, CUT = 120, 500, 1000
LABELS = 10  # classes at most: a label is one digit
_SYSTEM = "You do supervised classification of tables."
_RULE = 'Answer with a JSON array of {"id","label"} alone.'


def integers(x: np.ndarray, context: np.ndarray) -> np.ndarray:
    """(N, D) numbers as integers 0 to 999: 120 a standard deviation of `context` (S, D), whose mean is 500.

    A missing number (NaN) is the mean.  Statistics are those of the context alone; deviations have one degree less.
    """
    there = np.isfinite(context)
    count = np.maximum(there.sum(0), 1)
    mean = np.where(there, context, 0).sum(0) / count
    spread = np.sqrt((np.where(there, context - mean, 0) ** 2).sum(0) / np.maximum(count - 1, 1))
    z = np.clip((x - mean) / np.maximum(spread, 1e-6), -CUT, CUT)
    z = np.where(np.isnan(z), 0, z)
    return np.clip((SCALE * z + MIDDLE).astype(np.int64), 0, NUMBERS - 1)


def prompt(
    context: np.ndarray, y: Sequence[int], queries: np.ndarray, classes: int, names: Sequence[str] | None = None
) -> str:
    """The whole question: S labelled rows ``f1,f2,...|y`` and Q queries ``ID i:f1,f2,...``; all are integers."""
    columns = context.shape[1]
    lines = [
        _SYSTEM,
        f"{columns} features, labels {','.join(map(str, range(classes)))}.",
        "A row is its features separated by commas, then | and the label.",
    ]
    if names is not None:
        lines.append(f"Features: {','.join(name.replace(',', ' ') for name in names)}")
    lines.append("Training rows, their order does not matter:")
    lines += [f"{','.join(map(str, row))}|{label}" for row, label in zip(context.tolist(), y, strict=True)]
    lines.append("Test rows, keep their order:")
    lines += [f"ID {place}:{','.join(map(str, row))}" for place, row in enumerate(queries.tolist())]
    lines.append(_RULE)
    return "\n".join(lines) + "\n"


def opening(place: int) -> str:
    """The answer's text between the label before and that of query `place`."""
    return f'{"[" if place == 0 else "},"}{{"id":{place},"label":'


def answer(labels: Sequence[int]) -> str:
    """The JSON that answers the queries in order."""
    return json.dumps([{"id": place, "label": int(label)} for place, label in enumerate(labels)], separators=(",", ":"))


def number_tokenizer(max_length: int) -> PreTrainedTokenizerFast:
    """The prompt's words, punctuation, and each number up to 999 as a token of its own; nothing else can be written."""
    import re

    from tokenizers import Regex, Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    pattern = r"[0-9]{1,3}|[A-Za-z]+|[^0-9A-Za-z]"
    sample = prompt(np.zeros((1, 1), dtype=int), [0], np.zeros((1, 1), dtype=int), LABELS, [""]) + answer([0])
    words = [word for word in dict.fromkeys(re.findall(pattern, sample)) if not word.isdigit()]
    marks = [mark for mark in string.punctuation + " \n" if mark not in words]
    vocabulary = [*SPECIAL, *map(str, range(NUMBERS)), *words, *marks]
    tokenizer = Tokenizer(models.WordLevel({word: place for place, word in enumerate(vocabulary)}, unk_token=UNK))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(pattern), "isolated")
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", pair=f"{BOS} $A $B", special_tokens=[(BOS, SPECIAL.index(BOS))]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=PAD,
        bos_token=BOS,
        eos_token=EOS,
        unk_token=UNK,
        padding_side="left",
        model_max_length=max_length,
        clean_up_tokenization_spaces=False,
    )
