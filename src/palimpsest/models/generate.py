"""Batched generation with a key/value cache: the loop all audits stand on.

Prompts of similar length are decoded together, padded on the left; rows leave the batch as they finish; what all
prompts of a batch begin with (demonstrations, an instruction) is read once.  A row's answer does not depend on the
others: its random numbers come from (seed, prompt, sample).
Shapes: B rows, P prompt tokens, V words, S cached tokens.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

from palimpsest.core.errors import InputError
from palimpsest.models.guard import Around, untouched
from palimpsest.models.score import by_tokens, evaluating, prompt_mask

TOKENS = 16384  # cached tokens of a batch, unless the caller says how many rows
STOP_EVERY = 4  # steps between looks for stop strings: texts are cut afterwards, so a late look costs only steps
SHARED = 16  # tokens that prompts must have in common at the start to be worth reading apart


@dataclass(frozen=True)
class Decoding:
    """How to decode; the same for all rows of a call."""

    max_new_tokens: int
    pad_id: int
    eos_ids: tuple[int, ...]
    temperature: float = 0.0
    samples: int = 1
    draws: np.ndarray | None = None  # (prompts, samples, max_new_tokens) uniform numbers, where temperature > 0
    stopped: Callable[[list[list[int]]], list[bool]] | None = None  # whether these answers contain a stop string

    def __post_init__(self) -> None:
        if self.max_new_tokens < 1:
            raise InputError(f"max_new_tokens must be at least 1, not {self.max_new_tokens}")
        if self.samples < 1:
            raise InputError(f"samples must be at least 1, not {self.samples}")
        if not 0 <= self.temperature < float("inf"):
            raise InputError(f"temperature must be 0 (greedy) or positive, not {self.temperature}")
        if self.samples > 1 and self.temperature == 0:
            raise InputError("several samples of a greedy answer are all the same: set temperature above 0")


def decode(
    model: nn.Module,
    prompts: Sequence[np.ndarray],
    prompt_spans: Sequence[tuple[int, int]],
    decoding: Decoding,
    *,
    around: Around = untouched,
    rows: int | None = None,
) -> list[list[np.ndarray]]:
    """For each prompt (its tokens, at least one) the new tokens of each sample, without the end-of-sequence token."""
    results: list[list[np.ndarray]] = [[] for _ in prompts]
    if not prompts:
        return results
    if getattr(_inner(model), "_is_stateful", False):
        raise InputError(
            f"{type(_inner(model)).__name__} keeps a recurrent state; only attention models can generate here"
        )
    lengths = np.array([len(prompt) for prompt in prompts])
    cost = (lengths + decoding.max_new_tokens) * decoding.samples
    with evaluating(model):
        for places in by_tokens(cost, TOKENS, rows):
            answers = _Batch(model, prompts, prompt_spans, places, decoding, around).run()
            for place, answer in zip(places, answers, strict=True):
                results[place] = answer
    return results


class _Layer(DynamicLayer):
    """A cache layer that writes into a buffer of its final size, where transformers' own copies all keys every step."""

    keys: Tensor
    values: Tensor

    def __init__(self, size: int):
        super().__init__()
        self.size, self.used = size, 0

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        new = key_states.shape[-2]
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
            self.keys, self.values = (self._room(states, states.shape[0]) for states in (key_states, value_states))
        self.keys[..., self.used : self.used + new, :] = key_states
        self.values[..., self.used : self.used + new, :] = value_states
        self.used += new
        return self.keys[..., : self.used, :], self.values[..., : self.used, :]

    def get_seq_length(self) -> int:
        return self.used

    def batch_select_indices(self, indices: Tensor) -> None:
        for name in ("keys", "values"):
            old = getattr(self, name)
            kept = self._room(old, len(indices))
            kept[..., : self.used, :] = old[..., : self.used, :].index_select(0, indices)
            setattr(self, name, kept)

    def _room(self, like: Tensor, rows: int) -> Tensor:
        return like.new_empty((rows, like.shape[1], self.size, like.shape[3]))


class _Batch:
    """One batch on its way: its cache, which of its rows are still running, and what they have said."""

    def __init__(
        self,
        model: nn.Module,
        prompts: Sequence[np.ndarray],
        spans: Sequence[tuple[int, int]],
        places: np.ndarray,
        decoding: Decoding,
        around: Around,
    ):
        self.model, self.decoding, self.around = model, decoding, around
        self.device = next(model.parameters()).device
        self.places = places  # the prompts' numbers
        self.prompts = [prompts[place] for place in places]
        self.spans = [spans[place] for place in places]
        self.names = inspect.signature(_inner(model).forward).parameters
        self.cache_name = "cache" if "cache" in self.names else "past_key_values"

    def run(self) -> list[list[np.ndarray]]:
        """Each prompt's answers."""
        decoding = self.decoding
        logits_BV, mask_BS = self._read_prompts()
        count = len(self.prompts) * decoding.samples
        if decoding.samples > 1:
            repeated = torch.arange(len(self.prompts), device=self.device).repeat_interleave(decoding.samples)
            self.cache.batch_select_indices(repeated)
            logits_BV = logits_BV[repeated]
            mask_BS = None if mask_BS is None else mask_BS[repeated]
        lengths = torch.tensor([len(prompt) for prompt in self.prompts], device=self.device)
        positions_B = lengths.repeat_interleave(decoding.samples)
        running = torch.arange(count, device=self.device)  # the batch's rows that are still decoded
        said = torch.full((count, decoding.max_new_tokens), decoding.pad_id, device=self.device)
        ends = torch.full((count,), decoding.max_new_tokens, device=self.device)
        eos = torch.tensor(decoding.eos_ids, dtype=torch.int64, device=self.device)
        draws = self._draws()
        done = torch.zeros(count, dtype=torch.bool, device=self.device)
        with ExitStack() as guarded:
            self._guard(guarded, running)
            for step in range(decoding.max_new_tokens):
                tokens_B = self._choose(logits_BV, None if draws is None else draws[running, step])
                said[running, step] = tokens_B
                over = torch.isin(tokens_B, eos) & ~done
                ends[running[over]] = step
                done |= over
                if decoding.stopped is not None and (step + 1) % STOP_EVERY == 0:
                    stopped = decoding.stopped(said[running, : step + 1].tolist())
                    over = torch.tensor(stopped, device=self.device) & ~done
                    ends[running[over]] = step + 1
                    done |= over
                if step + 1 == decoding.max_new_tokens or bool(done.all()):
                    break
                if 4 * int(done.sum()) >= len(done):  # fewer, and the copying costs more than the idle rows
                    keep = torch.nonzero(~done).squeeze(1)
                    self.cache.batch_select_indices(keep)
                    running, tokens_B, positions_B = running[keep], tokens_B[keep], positions_B[keep]
                    mask_BS = None if mask_BS is None else mask_BS[keep]
                    done = done[keep]
                    guarded.close()
                    self._guard(guarded, running)
                if mask_BS is not None:
                    mask_BS = torch.cat([mask_BS, mask_BS.new_ones(len(mask_BS), 1)], 1)
                logits_BV = self._forward(tokens_B[:, None], mask_BS, positions_B[:, None])
                positions_B = positions_B + 1
        answers = [row[:end] for row, end in zip(said.cpu().numpy(), ends.tolist(), strict=True)]
        return [answers[i : i + decoding.samples] for i in range(0, count, decoding.samples)]

    def _read_prompts(self) -> tuple[Tensor, Tensor | None]:
        """The logits after each prompt, and the mask of its padding (None where there is none)."""
        shared = self._shared_prefix()
        tails = [prompt[shared:] for prompt in self.prompts]
        width = max(len(tail) for tail in tails)
        self.cache = self._new_cache(shared + width + self.decoding.max_new_tokens)
        if shared:
            self._forward(torch.as_tensor(self.prompts[0][None, :shared], device=self.device), None, None)
            self.cache.batch_select_indices(torch.zeros(len(tails), dtype=torch.int64, device=self.device))
        ids = np.full((len(tails), width), self.decoding.pad_id, dtype=np.int64)
        mask = np.zeros((len(tails), width), dtype=np.int64)
        for line, tail in enumerate(tails):
            ids[line, width - len(tail) :] = tail
            mask[line, width - len(tail) :] = 1
        padding = [width - len(tail) for tail in tails]
        positions = np.maximum(np.arange(width) - np.array(padding)[:, None], 0) + shared
        whole = np.concatenate([np.ones((len(tails), shared), dtype=np.int64), mask], 1)
        mask_BS = torch.as_tensor(whole, device=self.device) if any(padding) else None
        spans = [(first + pad, last + pad) for (first, last), pad in zip(self.spans, padding, strict=True)]
        with self.around(self.places, prompt_mask(ids.shape, spans).to(self.device)):
            inputs, positions_BP = (torch.as_tensor(value, device=self.device) for value in (ids, positions))
            return self._forward(inputs, mask_BS, positions_BP), mask_BS

    def _shared_prefix(self) -> int:
        """How many first tokens to read once for all rows: 0 if few, or if a guard may treat rows differently."""
        if self.around is not untouched or len(self.prompts) == 1:
            return 0
        shortest = min(len(prompt) for prompt in self.prompts) - 1  # a tail has at least one token
        heads = np.stack([prompt[:shortest] for prompt in self.prompts])
        same = (heads == heads[0]).all(0)
        shared = int(shortest if same.all() else same.argmin())
        return shared if shared >= SHARED else 0

    def _new_cache(self, size: int) -> DynamicCache:
        cache = DynamicCache(config=_inner(self.model).config)
        cache.layers = [_Layer(size) if type(layer) is DynamicLayer else layer for layer in cache.layers]
        return cache

    def _forward(self, ids_BP: Tensor, mask_BS: Tensor | None, positions_BP: Tensor | None) -> Tensor:
        """The logits after the last token, (B, V)."""
        arguments: dict[str, Any] = {"input_ids": ids_BP, "use_cache": True, self.cache_name: self.cache}
        if mask_BS is not None:
            arguments["attention_mask"] = mask_BS
        if positions_BP is not None and "position_ids" in self.names:
            arguments["position_ids"] = positions_BP
        if "logits_to_keep" in self.names:
            arguments["logits_to_keep"] = 1
        return self.model(**arguments).logits[:, -1]

    def _choose(self, logits_BV: Tensor, draws_B: Tensor | None) -> Tensor:
        """Each row's next token: the likeliest, or the one that its uniform number falls on."""
        if draws_B is None:
            return logits_BV.argmax(-1)
        cumulated = (logits_BV.double() / self.decoding.temperature).softmax(-1).cumsum(-1)
        found = torch.searchsorted(cumulated, draws_B[:, None] * cumulated[:, -1:], right=True).squeeze(1)
        return found.clamp(max=logits_BV.shape[-1] - 1)

    def _draws(self) -> Tensor | None:
        if self.decoding.temperature == 0 or self.decoding.draws is None:
            return None
        return torch.as_tensor(
            self.decoding.draws[self.places].reshape(-1, self.decoding.max_new_tokens), device=self.device
        )

    def _guard(self, guarded: ExitStack, running: Tensor) -> None:
        rows = self.places[running.cpu().numpy() // self.decoding.samples]
        guarded.enter_context(self.around(rows, torch.zeros(len(rows), 1, dtype=torch.bool, device=self.device)))


def _inner(model: nn.Module) -> Any:
    """The transformers model inside a PEFT wrapper."""
    return model.get_base_model() if hasattr(model, "peft_config") else model  # type: ignore[operator]
