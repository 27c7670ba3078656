"""What a causal language model makes of tokens that follow a prefix of vectors, which no text need have.

The prefix is read once and its keys and values are kept: demonstrations as text, distilled vectors and trained soft
prompts stand side by side.  Knows nothing of where vectors come from.
Shapes: B rows, T tokens, P vectors of the prefix, D hidden units, V words, N tokens that count.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from palimpsest.core.errors import InputError
from palimpsest.core.losses import head_of
from palimpsest.models.anatomy import base_of
from palimpsest.models.score import by_tokens, evaluating

if TYPE_CHECKING:
    from palimpsest.models.lm import LM

Tokens = Sequence[int]


def padded(rows: Sequence[Tokens], pad_id: int = 0, *, left: bool = False) -> tuple[Tensor, Tensor]:
    """(B, T) tokens and their mask, padded on the right or on the left."""
    width = max(map(len, rows), default=0)
    ids = np.full((len(rows), width), pad_id, dtype=np.int64)
    mask = np.zeros((len(rows), width), dtype=np.int64)
    for line, row in enumerate(rows):
        place = slice(width - len(row), width) if left else slice(len(row))
        ids[line, place], mask[line, place] = row, 1
    return torch.from_numpy(ids), torch.from_numpy(mask)


def embed(model: nn.Module, ids: Tensor) -> Tensor:
    """(B, T) tokens -> (B, T, D) as the model reads them."""
    return base_of(model).get_input_embeddings()(ids)


def hidden(model: nn.Module, embedded: Tensor, mask: Tensor) -> Tensor:
    """(B, T, D): what `core.losses.head_of` of a causal language model makes logits of, for embedded rows (B, T, D)."""
    base = base_of(model)
    if isinstance(head_of(model), nn.Identity):
        return base(**arguments(base, embedded, mask)).logits
    return states(getattr(base, base.base_model_prefix), embedded, mask)


def states(decoder: nn.Module, embedded: Tensor, mask: Tensor) -> Tensor:
    """(B, T, D): the last hidden states of a decoder without head."""
    return decoder(**arguments(decoder, embedded, mask)).last_hidden_state


def arguments(decoder: nn.Module, embedded: Tensor, mask: Tensor) -> dict[str, Any]:
    """Of a forward pass.  Padding, on whichever side, is not looked at and takes no place."""
    found: dict[str, Any] = {"inputs_embeds": embedded, "attention_mask": mask, "use_cache": False}
    if "position_ids" in inspect.signature(decoder.forward).parameters:
        found["position_ids"] = _places(mask)
    return found


def _places(mask: Tensor) -> Tensor:
    return (mask.cumsum(1) - 1).clamp(min=0)


@dataclass(frozen=True, eq=False)
class Prefix:
    """A model that has read P vectors.  Raises `InputError` for a guarded model, no vector, and too many of them."""

    lm: LM
    vectors: Tensor  # (P, D)

    def __post_init__(self) -> None:
        if self.lm.guard is not None:
            raise InputError("a guarded model cannot be given vectors: its guard must see the prompts")
        if not 1 <= len(self.vectors) < self.lm.max_length:
            raise InputError(
                f"{len(self.vectors)} vectors in front of a model that can see {self.lm.max_length} tokens"
            )

    @staticmethod
    def of(lm: LM, tokens: Tokens) -> Prefix:
        """The prefix that is a text's tokens."""
        with torch.no_grad():
            return Prefix(lm, embed(lm.model, torch.tensor([list(tokens)], device=lm.device))[0])

    @cached_property
    def _read(self) -> tuple[Any, Tensor]:
        """Keys and values of the vectors, and the logits (V,) after the last one."""
        from transformers import DynamicCache

        cache = DynamicCache(config=base_of(self.lm.model).config)
        vectors = self.vectors[None].to(self.lm.device)
        with evaluating(self.lm.model):
            found = self.lm.model(inputs_embeds=vectors, use_cache=True, **{self._cache_name: cache})
            return cache, found.logits[0, -1]

    @property
    def _cache_name(self) -> str:
        return "cache" if "cache" in inspect.signature(base_of(self.lm.model).forward).parameters else "past_key_values"

    def mean_logprobs(self, rows: Sequence[tuple[Tokens, Tokens]]) -> np.ndarray:
        """(N,) float64: the mean log-probability a token of each row's second part, which follows its first.

        Raises `InputError` for rows that do not fit behind the prefix.
        """
        lengths = np.array([len(start) + len(end) for start, end in rows])
        longest = int(lengths.max(initial=0))
        if len(self.vectors) + longest > self.lm.max_length:
            raise InputError(
                f"{len(self.vectors)} places of the prefix and {longest} of a query are more than the "
                f"{self.lm.max_length} that the model can see"
            )
        found = np.empty(len(rows))
        cache, last = self._read
        count = len(self.vectors)
        with evaluating(self.lm.model):
            for places in by_tokens(lengths + count):
                whole = [[*rows[place][0], *rows[place][1]] for place in places]
                ids, mask = (part.to(self.lm.device) for part in padded(whole, self.lm.tokenizer.pad_token_id))
                own = copy.deepcopy(cache)
                own.batch_repeat_interleave(len(places))
                seen = F.pad(mask, (count, 0), value=1)
                where = {"attention_mask": seen, "position_ids": _places(seen)[:, count:], self._cache_name: own}
                logits = self.lm.model(input_ids=ids, **where).logits
                logits = torch.cat([last.expand(len(places), 1, -1), logits[:, :-1]], dim=1)
                scores = logits.float().log_softmax(-1).gather(2, ids[..., None])[..., 0].double().cpu().numpy()
                for line, place in enumerate(places):
                    start = len(rows[place][0])
                    found[place] = scores[line, start : len(whole[line])].mean()
        return found

    def generate(self, prompts: Sequence[Tokens], max_new_tokens: int) -> list[str]:
        """The greedy continuation of each prompt behind the prefix, up to the end-of-sequence token."""
        room = self.lm.max_length - len(self.vectors) - max(map(len, prompts), default=0)
        if max_new_tokens < 1 or max_new_tokens > room:
            raise InputError(f"max_new_tokens={max_new_tokens}: behind prefix and prompt there is room for {room}")
        tokenizer = self.lm.tokenizer
        said = []
        with evaluating(self.lm.model):
            for prompt in prompts:  # one by one: no answer depends on another's padding
                ids = torch.tensor([list(prompt)], dtype=torch.int64, device=self.lm.device)
                whole = torch.cat([self.vectors[None].to(self.lm.device), embed(self.lm.model, ids)], dim=1)
                tokens = self.lm.model.generate(  # type: ignore[operator]  # of transformers' mixin
                    inputs_embeds=whole,
                    attention_mask=torch.ones(whole.shape[:2], dtype=torch.int64, device=self.lm.device),
                    max_new_tokens=max_new_tokens,
                    do_sample=False,
                    pad_token_id=tokenizer.pad_token_id,
                    eos_token_id=tokenizer.eos_token_id,
                )[0]
                said.append(str(tokenizer.decode(tokens, skip_special_tokens=True)))
        return said


@dataclass(frozen=True)
class Cost:
    """Of answering behind a prefix, in multiply-adds counted twice (FLOPs), embeddings and output head left out."""

    prefix: int  # places that every query attends to
    kept: int  # numbers of the kept keys and values
    query: float  # FLOPs of a query of the given length, the prefix kept
    reading: float  # FLOPs of the prefix's own pass through the model, once


def cost(lm: LM, prefix: int, query: int) -> Cost:
    """What a prefix of so many places costs for queries of so many tokens."""
    config = lm.model.config.get_text_config()
    layers, width, heads = (int(getattr(config, name)) for name in _SIZES)
    shared = int(getattr(config, "num_key_value_heads", None) or heads)
    size = int(getattr(config, "head_dim", None) or width // heads)
    return Cost(
        prefix,
        2 * layers * shared * size * prefix,
        flops(lm.model, query, prefix),
        flops(lm.model, prefix, 0),
    )


_SIZES = ("num_hidden_layers", "hidden_size", "num_attention_heads")


def flops(model: nn.Module, tokens: int, before: int) -> float:
    """Of reading so many tokens that follow `before` kept ones: twice the weights a token, and causal attention."""
    base = base_of(model)
    tables = {id(p) for m in (base.get_input_embeddings(), base.get_output_embeddings()) if m for p in m.parameters()}
    weights = sum(p.numel() for p in model.parameters() if id(p) not in tables)
    config = base.config.get_text_config()
    layers, width, _ = (int(getattr(config, name)) for name in _SIZES)
    attended = tokens * before + tokens * (tokens + 1) / 2
    return 2.0 * weights * tokens + 4.0 * layers * width * attended
