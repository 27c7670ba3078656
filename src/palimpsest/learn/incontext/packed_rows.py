"""Whole rows of a table as single positions of any causal language model: what a small one learns in a minute.

A row is the sum over its columns of (embedding of the number) x (vector of the column), plus the embedding of its
label: the very tokens of the prompt, folded into one position.  Labelled rows see all labelled rows, a query sees these
and itself, and all stand at position 0: the order of rows says nothing.  The paper (Dong et al. 2025, arXiv:2509.06806)
writes rows as text (`table_prompts`); folding them is ours, for models too small to learn what belongs to which row.
Shapes: B tables, N rows (S labelled, then Q queries), F columns, C labels, W width of the model.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from palimpsest.core.errors import InputError
from palimpsest.core.seeds import derive, torch_rng
from palimpsest.data.tables import IGNORE
from palimpsest.learn.incontext.table_prompts import CUT, LABELS, MIDDLE, NUMBERS, SCALE, number_tokenizer
from palimpsest.models import configs
from palimpsest.models.lm import LM

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

_CONTEXT = 2048  # tokens of a fresh model, for prompts


class PackedRows(nn.Module):
    """A causal language model (its own weights, trained along) with a vector for each column."""

    numbers: Tensor

    def __init__(self, model: Any, tokenizer: PreTrainedTokenizerFast, columns: Tensor, labels: int):
        """`columns`: (F, W).  `InputError` unless numbers up to 999 are single tokens."""
        super().__init__()
        self.model = model
        self.columns = nn.Parameter(columns.to(next(model.parameters()).device))
        self.labels = labels
        tokens = torch.tensor(single_tokens(tokenizer, NUMBERS), device=self.columns.device)
        self.register_buffer("numbers", tokens, persistent=False)

    def forward(self, cells: Tensor, present: Tensor, y: Tensor) -> Tensor:
        """(B, Q, C) logits of the labels of the rows after the first S.

        cells: (B, S + Q, F) integers 0 to 999; present: (B, F), which columns there are; y: (B, S) labels.
        """
        shots = y.shape[1]
        embedding = self.model.get_input_embeddings()
        scale = present / present.sum(1, keepdim=True).clamp(min=1).sqrt()
        vectors = self.columns[None] * scale[..., None]  # (B, F, W)
        values = embedding(self.numbers[cells])
        rows = torch.einsum("bnfw,bfw->bnw", values, vectors.to(values.dtype))
        rows = torch.cat([rows[:, :shots] + embedding(self.numbers[y]), rows[:, shots:]], dim=1)
        found = self.model(
            inputs_embeds=rows,
            attention_mask=self._mask(rows, shots),
            position_ids=torch.zeros(rows.shape[:2], dtype=torch.int64, device=rows.device),
            use_cache=False,
            logits_to_keep=rows.shape[1] - shots,
        )
        return found.logits[..., self.numbers[: self.labels]]

    def _mask(self, rows: Tensor, shots: int) -> Tensor:
        """(1, 1, N, N): who sees whom; added to the scores where the model's attention does not take truth values."""
        seen = torch.eye(rows.shape[1], dtype=torch.bool, device=rows.device)
        seen[:, :shots] = True
        seen = seen[None, None]
        if self.model.config._attn_implementation == "sdpa":
            return seen
        unseen = torch.finfo(rows.dtype).min
        return torch.zeros(seen.shape, dtype=rows.dtype, device=rows.device).masked_fill(~seen, unseen)


def packed_loss(model: nn.Module, batch: dict[str, Any]) -> tuple[Tensor, dict[str, Tensor]]:
    """Mean negative log-likelihood (nats) of the queries' labels, and their accuracy, on a batch of `Tables`."""
    shots = batch["shots"]
    logits = model(packed_integers(batch["x"], shots), batch["present"], batch["y"][:, :shots]).flatten(0, 1).float()
    labels = batch["y"][:, shots:].flatten()
    asked = (labels != IGNORE).sum().clamp(min=1)
    value = F.cross_entropy(logits, labels, ignore_index=IGNORE, reduction="sum") / asked
    return value, {"accuracy": (logits.detach().argmax(-1) == labels).sum() / asked}


def packed_integers(x: Tensor, shots: int) -> Tensor:
    """`table_prompts.integers` of (B, N, F) numbers without gaps, by the first `shots` rows of each table."""
    spread, mean = torch.std_mean(x[:, :shots], dim=1, keepdim=True)
    z = ((x - mean) / spread.clamp(min=1e-6)).clamp(-CUT, CUT)
    return (SCALE * z + MIDDLE).long().clamp(0, NUMBERS - 1)


def column_vectors(features: int, width: int, seed: int) -> Tensor:
    """(F, W) fresh ones: random signs, so that numbers keep their size and columns stay apart."""
    return torch.randint(2, (features, width), generator=torch_rng(seed, "columns")).float() * 2 - 1


def single_tokens(tokenizer: PreTrainedTokenizerFast, count: int) -> list[int]:
    """The tokens of the numbers 0 .. `count` - 1.  `InputError` if one takes several."""
    ids = [tokenizer.encode(str(number), add_special_tokens=False) for number in range(count)]
    broken = next((number for number, found in enumerate(ids) if len(found) != 1), None)
    if broken is not None:
        raise InputError(
            f"the model's tokenizer writes {broken} as {len(ids[broken])} tokens; packed rows need one: "
            "choose layout='prompt'"
        )
    return [found[0] for found in ids]


def fresh(base: str, seed: int) -> LM:
    """An untrained model of a named configuration that reads numbers, neighbours in value having similar embeddings.

    Without that it would first have to learn the order of a thousand tokens.  The digits are labels, and stay apart:
    with neighbouring embeddings training does not leave chance in hundreds of steps.
    """
    from transformers import AutoModelForCausalLM

    tokenizer = number_tokenizer(_CONTEXT)
    config = configs.config(base, vocab_size=len(tokenizer), max_length=_CONTEXT)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(derive(seed, "weights"))
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    with torch.no_grad():
        table = model.get_input_embeddings().weight
        values = single_tokens(tokenizer, NUMBERS)[LABELS:]
        table[values] = table.std() * _smooth(table.shape[1], seed)[LABELS:]
    return LM(model, tokenizer, f"built:{base}")


def _smooth(width: int, seed: int) -> Tensor:
    """(1000, W) waves over the number, of variance 1; inner products fall off with distance."""
    generator = torch_rng(seed, "numbers")
    z = (torch.arange(NUMBERS) - MIDDLE) / SCALE
    frequency = torch.randn(width, generator=generator)
    phase = 2 * torch.pi * torch.rand(width, generator=generator)
    return 2**0.5 * torch.cos(z[:, None] * frequency + phase)
