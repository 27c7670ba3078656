"""An encoder-decoder with its tokenizer, and what it answers when it reads several documents at once.

Each document is read by itself, together with the question; the readings are mixed by the documents' weights at every
token of the answer (RAG-token of Lewis et al. 2020, arXiv:2005.11401) or once for the whole answer (RAG-sequence).
Knows nothing of where documents come from.
Shapes: B questions, K documents of each, T tokens read, L tokens answered, V tokens of the vocabulary.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from palimpsest.core.errors import InputError
from palimpsest.core.seeds import seed_everything
from palimpsest.data.batches import IGNORE
from palimpsest.models.storage import PICKLES, quiet
from palimpsest.models.tokenizers import train_bpe

Marginal = Literal["token", "sequence"]


@dataclass(frozen=True, eq=False)
class Seq2Seq:
    """Treated as immutable: what trains takes a copy."""

    model: Any  # of transformers, an encoder-decoder
    tokenizer: Any

    @staticmethod
    def build(
        texts: Iterable[str], *, width: int = 64, layers: int = 2, heads: int = 4, vocab_size: int = 1024, seed: int = 0
    ) -> Seq2Seq:
        """A small T5 with fresh weights, and a tokenizer trained on `texts`."""
        from transformers import T5Config, T5ForConditionalGeneration

        if width < 1 or layers < 1 or heads < 1 or width % heads:
            raise InputError(f"width={width} must be a multiple of heads={heads}, and layers={layers} at least 1")
        tokenizer = train_bpe(texts, vocab_size=vocab_size)
        config = T5Config(
            vocab_size=len(tokenizer),
            d_model=width,
            d_kv=width // heads,
            d_ff=2 * width,
            num_layers=layers,
            num_decoder_layers=layers,
            num_heads=heads,
            dropout_rate=0.0,
            pad_token_id=tokenizer.pad_token_id,
            eos_token_id=tokenizer.eos_token_id,
        )
        config.decoder_start_token_id = (
            tokenizer.pad_token_id
        )  # the attribute is of generation, not an argument of T5's
        seed_everything(seed, "reader")
        return Seq2Seq(T5ForConditionalGeneration(config).eval(), tokenizer)

    @staticmethod
    def load(path: str | Path) -> Seq2Seq:
        """An encoder-decoder from a folder or the hub: safetensors only, no code of its own.  Raises InputError."""
        from transformers import AutoModelForSeq2SeqLM, AutoTokenizer

        folder = Path(path)
        if (
            folder.is_dir()
            and not list(folder.glob("*.safetensors"))
            and any(folder.glob(f"*{end}") for end in PICKLES)
        ):
            raise InputError(f"{path} has only pickled weights, which can run code when loaded; wanted safetensors")
        local = {"local_files_only": folder.is_dir()}
        with quiet():
            try:
                model = AutoModelForSeq2SeqLM.from_pretrained(str(path), use_safetensors=True, **local)
                tokenizer = AutoTokenizer.from_pretrained(str(path), **local)
            except (OSError, ValueError, KeyError) as error:
                raise InputError(f"{path} is no encoder-decoder: {str(error).splitlines()[0]}") from None
        return Seq2Seq(model.eval(), tokenizer)

    def save(self, folder: Path) -> None:
        with quiet():
            self.model.save_pretrained(folder)
            self.tokenizer.save_pretrained(folder)

    def copy(self) -> Seq2Seq:
        return Seq2Seq(copy.deepcopy(self.model), self.tokenizer)

    @cached_property
    def mask(self) -> str:
        """What stands for the answer in a question: the mask of a denoiser, a sentinel of T5, or a word."""
        if self.tokenizer.mask_token:
            return str(self.tokenizer.mask_token)
        return "<extra_id_0>" if "<extra_id_0>" in self.tokenizer.get_vocab() else "[MASK]"

    @cached_property
    def _ids(self) -> Any:
        @lru_cache(maxsize=2**17)
        def ids(text: str) -> tuple[int, ...]:
            return tuple(self.tokenizer(text, add_special_tokens=False)["input_ids"])

        return ids

    def ids(self, text: str) -> tuple[int, ...]:
        """Tokens without specials."""
        return self._ids(text)

    def read(self, documents: Sequence[Sequence[str]], questions: Sequence[str], most: int) -> dict[str, Tensor]:
        """`input_ids` and `attention_mask` (B, K, T): each of K documents, then the question.

        A document gives up its end so that `most` tokens hold both; a question that alone is longer loses its own end.
        """
        rows = []
        for own, question in zip(documents, questions, strict=True):
            asked = self.ids(question)[: most - 1]
            rows += [(*self.ids(one)[: most - 1 - len(asked)], *asked, self.tokenizer.eos_token_id) for one in own]
        ids = _padded(rows, self.tokenizer.pad_token_id)
        mask = _padded([(1,) * len(row) for row in rows], 0)
        shape = (len(questions), -1, ids.shape[1])
        return {"input_ids": ids.view(shape), "attention_mask": mask.view(shape)}

    def targets(self, answers: Sequence[str], most: int = 64) -> Tensor:
        """(B, L) labels with the end of the sequence, IGNORE behind it; InputError for more than `most` tokens."""
        rows = [(*self.ids(answer), self.tokenizer.eos_token_id) for answer in answers]
        longest = max(range(len(rows)), key=lambda row: len(rows[row]))
        if len(rows[longest]) > most:
            raise InputError(f"{answers[longest]!r:.60} has {len(rows[longest])} tokens; at most {most} are written")
        return _padded(rows, IGNORE)

    def generate(self, read: dict[str, Tensor], log_weights: Tensor, *, most: int = 32) -> list[str]:
        """The greedy answer to each of B questions under the mixture at every token, at most `most` tokens."""
        model, eos = self.model, self.tokenizer.eos_token_id
        count = len(log_weights)
        written = torch.full((count, 1), int(model.config.decoder_start_token_id))
        open_ = torch.ones(count, dtype=torch.bool)
        with torch.no_grad():
            states = encoded(model, read)
            while bool(open_.any()) and written.shape[1] <= most:
                logits = decoded(model, states, read["attention_mask"], written)[:, :, -1]
                mixed = (logits.log_softmax(-1) + log_weights[..., None]).logsumexp(1)
                token = torch.where(open_, mixed.argmax(-1), eos)
                written = torch.cat([written, token[:, None]], 1)
                open_ = open_ & (token != eos)
        return [text.strip() for text in self.tokenizer.batch_decode(written[:, 1:], skip_special_tokens=True)]


def encoded(model: nn.Module, read: dict[str, Tensor]) -> Tensor:
    """(B, K, T, hidden) of what is read."""
    ids, mask = (read[name].flatten(0, 1) for name in ("input_ids", "attention_mask"))
    states = model.get_encoder()(input_ids=ids, attention_mask=mask).last_hidden_state  # type: ignore[operator]
    return states.unflatten(0, read["input_ids"].shape[:2])


def decoded(model: nn.Module, states: Tensor, mask: Tensor, written: Tensor) -> Tensor:
    """(B, K, L, V) logits after each of the tokens `written` (B, L), for each document."""
    from transformers.modeling_outputs import BaseModelOutput

    count = states.shape[1]
    out = model(
        encoder_outputs=BaseModelOutput(last_hidden_state=states.flatten(0, 1)),
        attention_mask=mask.flatten(0, 1),
        decoder_input_ids=written.repeat_interleave(count, 0),
        use_cache=False,
    )
    return out.logits.unflatten(0, states.shape[:2])


def marginal_logprobs(
    model: nn.Module, read: dict[str, Tensor], log_weights: Tensor, labels: Tensor, marginal: Marginal = "token"
) -> Tensor:
    """(B,) log-probabilities of answers (B, L), IGNORE where padded, given documents of log-weights (B, K)."""
    states = encoded(model, read)
    written = model.prepare_decoder_input_ids_from_labels(labels=labels)  # type: ignore[operator]
    return mixed(decoded(model, states, read["attention_mask"], written), log_weights, labels, marginal)


def mixed(logits: Tensor, log_weights: Tensor, labels: Tensor, marginal: Marginal = "token") -> Tensor:
    """(B,) from logits (B, K, L, V): the product over tokens of sums over documents, or the sum of products."""
    given = labels != IGNORE
    wanted = labels.clamp_min(0)[:, None, :, None].expand(*logits.shape[:3], 1)
    each = F.log_softmax(logits, -1).gather(-1, wanted).squeeze(-1)  # (B, K, L)
    if marginal == "sequence":
        return (each.masked_fill(~given[:, None], 0.0).sum(-1) + log_weights).logsumexp(1)
    return (each + log_weights[..., None]).logsumexp(1).masked_fill(~given, 0.0).sum(-1)


def _padded(rows: Sequence[Sequence[int]], value: int) -> Tensor:
    found = torch.full((len(rows), max(map(len, rows))), value)
    for line, row in enumerate(rows):
        found[line, : len(row)] = torch.tensor(row)
    return found
