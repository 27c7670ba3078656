"""From rows of text to rows of tokens, and where in each the scored part begins.

A row is ``<bos> prompt completion <eos>``; prompt and completion are tokenised as the one text they are, and a token
that holds the prompt's last character and the completion's first belongs to the completion.  Knows nothing of models.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np

from palimpsest.core.errors import InputError
from palimpsest.data.batches import Encoded

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedTokenizerFast

Rows: TypeAlias = "Dataset | Sequence[str] | Sequence[tuple[str, str]]"
"""A records table, documents, or (prompt, completion) pairs."""


@dataclass(frozen=True)
class Pairs:
    """N rows as text.  `complete` rows were written by a chat template, which has set the special tokens already."""

    prompts: list[str]
    completions: list[str]
    complete: list[bool]

    def __len__(self) -> int:
        return len(self.prompts)


def read_pairs(rows: Rows, tokenizer: PreTrainedTokenizerFast) -> Pairs:
    """The rows as prompts and completions; a document's prompt is empty.

    Conversations (`messages`) go through the tokenizer's chat template; if it has none they are read as
    `palimpsest.data.records.pairs` reads them, a line a message.  `InputError` names the first row that cannot be read.
    """
    import datasets

    if isinstance(rows, datasets.Dataset):
        from palimpsest.data import records

        found = records.pairs(rows)
        templated = _templated(rows, tokenizer)
        pairs = [templated.get(row, pair) for row, pair in enumerate(found)]
        complete = [row in templated for row in range(len(found))]
    elif isinstance(rows, str):
        raise InputError("a single text was given where rows are wanted: put it into a list")
    else:
        pairs = [_pair(row, number) for number, row in enumerate(rows)]
        complete = [False] * len(pairs)
    return Pairs([prompt for prompt, _ in pairs], [completion for _, completion in pairs], complete)


def _pair(row: Any, number: int) -> tuple[str, str]:
    if isinstance(row, str):
        return "", row
    if isinstance(row, tuple | list) and len(row) == 2 and all(isinstance(side, str) for side in row):
        return row[0], row[1]
    raise InputError(f"row {number} is {type(row).__name__} {row!r:.60}; wanted a text or a (prompt, completion) pair")


def _templated(table: Dataset, tokenizer: PreTrainedTokenizerFast) -> dict[int, tuple[str, str]]:
    """The rows that are read as conversations, written by the chat template: what leads to the last answer, and it."""
    if "messages" not in table.column_names or not tokenizer.chat_template:
        return {}
    names = [name for name in ("prompt", "completion", "messages") if name in table.column_names]
    found = {}
    for number, row in enumerate(table.select_columns(names)):
        messages = row["messages"]
        if not messages or (row.get("prompt") is not None and row.get("completion") is not None):
            continue
        whole = str(tokenizer.apply_chat_template(messages, tokenize=False))
        prompt = ""
        if messages[-1]["role"] == "assistant":
            prompt = str(tokenizer.apply_chat_template(messages[:-1], tokenize=False, add_generation_prompt=True))
        if not whole.startswith(prompt):
            raise InputError(
                f"row {number}: the chat template writes the conversation differently without its last answer"
            )
        found[number] = prompt, whole[len(prompt) :]
    return found


def encode_pairs(tokenizer: PreTrainedTokenizerFast, pairs: Pairs, max_length: int) -> Encoded:
    """Tokenise rows, at most `max_length` tokens each; see `LM.encode` for what is cut."""
    if max_length < 2:
        raise InputError(f"max_length must be at least 2, not {max_length}")
    texts = [prompt + completion for prompt, completion in zip(pairs.prompts, pairs.completions, strict=True)]
    tokens, ends = _tokenise(tokenizer, texts, offsets=any(pairs.prompts))
    ids, starts = [], []
    for row, body in enumerate(tokens):
        prompt = int(np.searchsorted(ends[row], len(pairs.prompts[row]), side="right")) if pairs.prompts[row] else 0
        special = not pairs.complete[row]
        whole, start = _assemble(tokenizer, body, prompt, max_length, special)
        ids.append(whole)
        starts.append(start)
    if ids and all(len(row) <= start for row, start in zip(ids, starts, strict=True)):
        raise InputError(f"row 0 ({texts[0]!r:.40}) has no token to score, nor has any other row")
    return Encoded(tuple(ids), tuple(starts), int(tokenizer.pad_token_id))


def encode_prompts(tokenizer: PreTrainedTokenizerFast, prompts: Sequence[str]) -> list[np.ndarray]:
    """``<bos> prompt`` as tokens, not cut.  `InputError` for an empty prompt where the tokenizer has no `<bos>`."""
    tokens, _ = _tokenise(tokenizer, list(prompts), offsets=False)
    found = [np.concatenate([_bos(tokenizer, body), body]) for body in tokens]
    for number, ids in enumerate(found):
        if len(ids) == 0:
            raise InputError(
                f"prompt {number} is empty, and this tokenizer has no beginning-of-sequence token to start from"
            )
    return found


def bos_length(tokenizer: PreTrainedTokenizerFast, ids: np.ndarray) -> int:
    """1 if the row starts with the beginning-of-sequence token, else 0."""
    return int(tokenizer.bos_token_id is not None and len(ids) > 0 and ids[0] == tokenizer.bos_token_id)


def cut_prompt(tokenizer: PreTrainedTokenizerFast, ids: np.ndarray, room: int) -> np.ndarray:
    """The last `room` tokens of a prompt; its `<bos>` is kept."""
    if len(ids) <= room:
        return ids
    bos = bos_length(tokenizer, ids)
    return np.concatenate([ids[:bos], ids[len(ids) - room + bos :]])


def _assemble(
    tokenizer: PreTrainedTokenizerFast, body: np.ndarray, prompt: int, max_length: int, special: bool
) -> tuple[np.ndarray, int]:
    """The row's tokens, and its first scored token."""
    bos = _bos(tokenizer, body) if special else body[:0]
    head = np.concatenate([bos, body[:prompt]])
    answer = np.concatenate([body[prompt:], _eos(tokenizer, body)]) if special else body[prompt:]
    if len(head) + len(answer) > max_length:
        answer = answer[: max(max_length - len(head), max_length // 2)]
        head = cut_prompt(tokenizer, head, max_length - len(answer))
    if len(head) + len(answer) == 0:
        head = np.array([tokenizer.pad_token_id], dtype=np.int64)
    return np.concatenate([head, answer]), max(len(head), 1)


def _bos(tokenizer: PreTrainedTokenizerFast, body: np.ndarray) -> np.ndarray:
    given = tokenizer.bos_token_id is None or bos_length(tokenizer, body)
    return np.array([] if given else [tokenizer.bos_token_id], dtype=np.int64)


def _eos(tokenizer: PreTrainedTokenizerFast, body: np.ndarray) -> np.ndarray:
    given = tokenizer.eos_token_id is None or (len(body) > 0 and body[-1] == tokenizer.eos_token_id)
    return np.array([] if given else [tokenizer.eos_token_id], dtype=np.int64)


def _tokenise(
    tokenizer: PreTrainedTokenizerFast, texts: list[str], offsets: bool
) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """Tokens without specials, and (if `offsets`) the character at which each token ends."""
    if not texts:
        return [], []
    found = tokenizer(
        texts, add_special_tokens=False, truncation=False, padding=False, return_offsets_mapping=offsets, verbose=False
    )
    ids = [np.array(row, dtype=np.int64) for row in found["input_ids"]]
    if not offsets:
        return ids, []
    return ids, [np.array([end for _, end in row], dtype=np.int64) for row in found["offset_mapping"]]
