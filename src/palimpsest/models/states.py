"""What a model's layers hold at the end of a prompt.

Knows nothing of what is read off these states.  Shapes: N prompts, B rows, T tokens, L layers (0 is the embedding), D
hidden units.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from palimpsest.models.anatomy import base_of
from palimpsest.models.encode import cut_prompt, encode_prompts
from palimpsest.models.score import by_tokens, evaluating

if TYPE_CHECKING:
    from palimpsest.models.lm import LM


def last_states(lm: LM, prompts: Sequence[str]) -> np.ndarray:
    """(L, N, D) float64 hidden states at the last token of each prompt; no guard acts here."""
    found: list[Any] = [None] * len(prompts)
    decoder = decoder_of(lm.model)
    with evaluating(lm.model):
        for places, tokens, last in prompt_batches(lm, prompts):
            states = decoder(
                input_ids=tokens, attention_mask=torch.ones_like(tokens), use_cache=False, output_hidden_states=True
            ).hidden_states
            lines = torch.arange(len(places), device=lm.device)
            for place, state in zip(places, torch.stack([h[lines, last] for h in states], 1), strict=True):
                found[place] = state.double().cpu().numpy()
    return np.stack(found, 1)


def prompt_batches(lm: LM, prompts: Sequence[str]) -> Iterator[tuple[np.ndarray, Tensor, Tensor]]:
    """(places, tokens (B, T) padded on the right, positions (B,) of each prompt's last token), until all were there."""
    ids = [cut_prompt(lm.tokenizer, row, lm.max_length) for row in encode_prompts(lm.tokenizer, prompts)]
    lengths = np.array([len(row) for row in ids])
    for places in by_tokens(lengths):
        padded = np.full((len(places), int(lengths[places].max())), int(lm.tokenizer.pad_token_id or 0), dtype=np.int64)
        for line, place in enumerate(places):
            padded[line, : lengths[place]] = ids[place]
        yield places, torch.as_tensor(padded, device=lm.device), torch.as_tensor(lengths[places] - 1, device=lm.device)


def decoder_of(model: nn.Module) -> Any:
    """The model without its output head."""
    return base_of(model).base_model
