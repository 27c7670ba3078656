"""`LM`: a causal language model with its tokenizer, and all that is asked of one: score, answer, embed, save, copy.

Every audit goes through it, so speed is won here once: rows of similar length together, a token budget instead of a
batch size, a cache of keys and values.  No answer depends on the batch size or on the order of the rows.
Methods treat an `LM` as immutable: they train a `copy`.  How models are read, scored and decoded is beside this file.
"""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, cast, overload

import numpy as np
import torch

from palimpsest.core.errors import InputError
from palimpsest.core.files import atomic_folder, sha256_of
from palimpsest.core.seeds import derive, numpy_rng
from palimpsest.data.batches import Encoded
from palimpsest.models import configs, score, storage
from palimpsest.models.encode import Pairs, Rows, bos_length, cut_prompt, encode_pairs, encode_prompts, read_pairs
from palimpsest.models.generate import Decoding, decode
from palimpsest.models.guard import Guard, Prepared, load_guard, save_guard
from palimpsest.models.tokenizers import train_bpe

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerFast

UNBOUNDED = 2**20  # the context length of a model that names none


@dataclass(frozen=True, eq=False)
class LM:
    """A causal language model and its tokenizer; `source` says where it is from, `guard` stands in front of it."""

    model: PreTrainedModel = field(repr=False)
    tokenizer: PreTrainedTokenizerFast = field(repr=False)
    source: str = ""
    guard: Guard | None = None

    @staticmethod
    def load(
        path: str | Path,
        *,
        device: str | torch.device | None = None,
        dtype: str | torch.dtype | None = None,
        trust_remote_code: bool = False,
    ) -> LM:
        """Load a model's folder, a PEFT adapter's folder (with its base model), or ``org/name`` from the hub.

        Weights come from safetensors only and keep the dtype they were saved in unless `dtype` is given.  A tokenizer
        without a padding token pads with its end-of-sequence token.  A guard saved beside the weights is attached.
        `InputError` if there is no such folder, something is missing in it, its weights are pickles, or a key of the
        checkpoint does not fit the model.
        """
        model, tokenizer = storage.load_model(path, dtype=dtype, trust_remote_code=trust_remote_code)
        embedded = cast(Any, model.get_input_embeddings()).num_embeddings
        if len(tokenizer) > embedded:
            raise InputError(f"{path}: the tokenizer has {len(tokenizer)} tokens, the model only {embedded}")
        guard = load_guard(path) if Path(path).is_dir() else None
        lm = LM(model, tokenizer, str(path), guard)
        return lm if device is None else lm.to(device)

    @staticmethod
    def build(
        texts: Rows,
        config: str | dict[str, Any] | PretrainedConfig = "llama-tiny",
        *,
        vocab_size: int = 1024,
        max_length: int = 256,
        seed: int = 0,
    ) -> LM:
        """An untrained model: a BPE tokenizer trained on `texts`, and fresh float32 weights drawn from `seed`.

        `config` is a name of models/configs.py (``llama-tiny``, ``gpt2-mini``, ...), a transformers config, or a dict
        with its fields.  `vocab_size` is the most tokens there may be; `max_length` is the context of a named config.
        """
        from transformers import AutoModelForCausalLM

        full = configs.config(config, vocab_size=vocab_size, max_length=max_length)
        tokenizer = train_bpe(
            _whole_texts(texts),
            vocab_size=vocab_size,
            max_length=getattr(full, "max_position_embeddings", max_length),
            model_type=full.model_type,
        )
        full.vocab_size = len(tokenizer)  # fewer than wanted where the texts offer fewer merges
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(derive(seed, "weights"))
            model = AutoModelForCausalLM.from_config(full, dtype=torch.float32)
        name = config if isinstance(config, str) else full.model_type
        return LM(model.eval(), tokenizer, f"built:{name}")

    @property
    def max_length(self) -> int:
        """The most tokens the model can see at once."""
        return int(getattr(self.model.config.get_text_config(), "max_position_embeddings", None) or UNBOUNDED)

    @property
    def device(self) -> torch.device:
        return next(self.model.parameters()).device

    @property
    def num_parameters(self) -> int:
        """Weights, tied ones counted once."""
        return sum(parameter.numel() for parameter in self.model.parameters())

    @property
    def weights_sha256(self) -> str:
        """SHA-256 of the weights in canonical form.  Computed on every call, so it is never stale."""
        return storage.weights_sha256(self.model)

    @property
    def sha256(self) -> str:
        """SHA-256 of what answers: of weights and configuration, and of the guard where there is one."""
        parts: list[Any] = [self.weights_sha256, storage.behaviour(self.model)]
        if self.guard is not None:
            settings, tensors = self.guard.state()
            hashes = {name: hashlib.sha256(_bytes(tensor)).hexdigest() for name, tensor in sorted(tensors.items())}
            parts += [settings, hashes]
        return sha256_of(parts)

    def pairs(self, rows: Rows) -> list[tuple[str, str]]:
        """The rows as (prompt, completion) the way this model reads them: conversations by its chat template."""
        found = read_pairs(rows, self.tokenizer)
        return list(zip(found.prompts, found.completions, strict=True))

    def encode(self, rows: Rows, *, max_length: int | None = None) -> Encoded:
        """Rows as tokens: ``<bos> prompt completion <eos>``; completions are scored (with `<eos>`), documents whole.

        A tokenizer without `<bos>` leaves it out: a document's first token then has no prediction.  Rows longer than
        `max_length` (the model's context by default) are cut at the end of the completion, but a completion may always
        have half the room, for which a prompt gives up its beginning; so a question never loses its answer's start.
        A row without any token to score stays, unscored; if all are such, `InputError`.  No guard acts here.
        """
        return self._encode(read_pairs(rows, self.tokenizer), max_length)

    def token_logprobs(self, rows: Rows | Encoded, *, batch_size: int | None = None) -> list[np.ndarray]:
        """Log-probability (nats) of each scored token, N arrays; a guard sees the prompts (a document's is empty).

        Rows that are `Encoded` already are scored as they are, which a guarded model cannot do (`InputError`).
        """
        if isinstance(rows, Encoded):
            if self.guard is not None:
                raise InputError("a guarded model scores texts, not tokens: its guard must see the prompts")
            spans = [(0, 0)] * len(rows)
            return score.token_logprobs(self.model, rows, spans, rows=batch_size)
        pairs = read_pairs(rows, self.tokenizer)
        prepared = self._prepare(pairs.prompts)
        pairs = replace(pairs, prompts=list(prepared.prompts))
        encoded = self._encode(pairs, None)
        spans = [
            (bos_length(self.tokenizer, ids), start) if prompt else (0, 0)
            for prompt, ids, start in zip(pairs.prompts, encoded.ids, encoded.starts, strict=True)
        ]
        return score.token_logprobs(self.model, encoded, spans, around=prepared.active, rows=batch_size)

    def nll(self, rows: Rows | Encoded, *, batch_size: int | None = None) -> np.ndarray:
        """Mean negative log-likelihood (nats) a scored token of each row, (N,) float64; NaN for a row without any."""
        found = self.token_logprobs(rows, batch_size=batch_size)
        return np.array([-row.mean(dtype=np.float64) if len(row) else np.nan for row in found], dtype=np.float64)

    @overload
    def generate(  # type: ignore[overload-overlap]  # samples=1 is also an int, and means the first
        self,
        prompts: Sequence[str],
        *,
        max_new_tokens: int = ...,
        stop: Sequence[str] | str = ...,
        temperature: float = ...,
        samples: Literal[1] = ...,
        seed: int = ...,
        batch_size: int | None = ...,
    ) -> list[str]: ...

    @overload
    def generate(
        self,
        prompts: Sequence[str],
        *,
        max_new_tokens: int = ...,
        stop: Sequence[str] | str = ...,
        temperature: float = ...,
        samples: int,
        seed: int = ...,
        batch_size: int | None = ...,
    ) -> list[list[str]]: ...

    def generate(
        self,
        prompts: Sequence[str],
        *,
        max_new_tokens: int = 32,
        stop: Sequence[str] | str = (),
        temperature: float = 0.0,
        samples: int = 1,
        seed: int = 0,
        batch_size: int | None = None,
    ) -> list[str] | list[list[str]]:
        """Continue each prompt: up to the end-of-sequence token, a `stop` string (not returned), or `max_new_tokens`.

        Greedy at temperature 0.  With `samples` above 1, a list of that many answers a prompt; sample s of prompt i
        depends on (`seed`, i, s) only.  A prompt longer than the context less `max_new_tokens` keeps its end (and
        its `<bos>`).  Settings in the model's generation config other than its end-of-sequence tokens are not used.
        """
        stops = (stop,) if isinstance(stop, str) else tuple(stop)
        if isinstance(prompts, str) or not all(isinstance(prompt, str) for prompt in prompts):
            raise InputError("generate wants a list of texts")
        if not all(stops):
            raise InputError("a stop string must not be empty")
        prepared = self._prepare(prompts)
        ids = encode_prompts(self.tokenizer, prepared.prompts)
        stopped = (lambda rows: [_cut(text, stops) is not None for text in self._decode(rows)]) if stops else None
        decoding = self._decoding(len(ids), max_new_tokens, temperature, samples, seed, stopped)
        answers = self._continue(ids, prepared, decoding, batch_size)
        texts = iter(self._decode([answer for group in answers for answer in group]))
        groups = [[_until(next(texts), stops) for _ in group] for group in answers]
        return groups if samples > 1 else [group[0] for group in groups]

    def generate_ids(
        self,
        prompts: Sequence[np.ndarray],
        *,
        max_new_tokens: int = 32,
        temperature: float = 0.0,
        seed: int = 0,
        batch_size: int | None = None,
    ) -> list[np.ndarray]:
        """`generate` on tokens: each prompt (with its `<bos>`, if it has one) as an array, the new tokens as an array.

        The end-of-sequence token is not returned.  A guard sees prompts as text; those it rewrites are tokenised anew.
        """
        ids = [np.asarray(prompt, dtype=np.int64) for prompt in prompts]
        for number, prompt in enumerate(ids):
            if prompt.ndim != 1 or len(prompt) == 0:
                raise InputError(f"prompt {number} has shape {prompt.shape}; wanted at least one token in a row")
        prepared = Prepared([])
        if self.guard is not None:
            texts = self._decode(ids)
            prepared = self._prepare(texts)
            changed = [row for row, text in enumerate(texts) if prepared.prompts[row] != text]
            rewritten = encode_prompts(self.tokenizer, [prepared.prompts[row] for row in changed])
            for row, new in zip(changed, rewritten, strict=True):
                ids[row] = new
        decoding = self._decoding(len(ids), max_new_tokens, temperature, 1, seed, None)
        return [group[0] for group in self._continue(ids, prepared, decoding, batch_size)]

    def embed(self, texts: Sequence[str], *, layer: int = -1) -> np.ndarray:
        """Hidden states after `layer` (0 is the embedding, -1 the last), averaged over a text's tokens: (N, D) float32.

        The special tokens around the text are not averaged.  No guard acts here.
        """
        pairs = Pairs([""] * len(texts), list(texts), [False] * len(texts))
        encoded = self._encode(pairs, None)
        spans = []
        for ids in encoded.ids:
            first = bos_length(self.tokenizer, ids)
            last = len(ids) - int(len(ids) > first and ids[-1] == self.tokenizer.eos_token_id)
            spans.append((first, last) if last > first else (0, len(ids)))
        return score.mean_hidden(self.model, encoded, spans, layer)

    def save(self, folder: str | Path, *, merge: bool = True) -> None:
        """Write weights (safetensors), config, generation config, tokenizer and guard; the folder appears whole.

        It loads with ``AutoModelForCausalLM.from_pretrained`` and ``AutoTokenizer.from_pretrained``.  A PEFT adapter is
        merged into a copy of the weights; with ``merge=False`` the adapter alone is written.
        """
        with atomic_folder(folder) as temporary:
            storage.save_model(storage.merged(self.model) if merge else self.model, self.tokenizer, temporary)
            if self.guard is not None:
                save_guard(self.guard, temporary)

    def copy(self) -> LM:
        """The same model with weights of its own, without gradients; tokenizer and guard, never changed, are shared."""
        model = copy.deepcopy(self.model)
        model.zero_grad(set_to_none=True)
        return self.with_model(model)

    def with_model(self, model: Any) -> LM:
        """These weights (not a copy) with the same tokenizer and guard."""
        return replace(self, model=model)

    def with_guard(self, guard: Guard | None) -> LM:
        """The same model (not a copy) behind another guard, or behind none."""
        return replace(self, guard=guard)

    def to(self, device: str | torch.device) -> LM:
        """Move the weights, in place as torch does, and return the model."""
        self.model.to(device)  # type: ignore[arg-type]
        return self

    def _prepare(self, prompts: Sequence[str]) -> Prepared:
        if self.guard is None:
            return Prepared(prompts)
        prepared = self.guard.prepare(self, prompts)
        if len(prepared.prompts) != len(prompts):
            raise ValueError(f"{self.guard!r:.60} returned {len(prepared.prompts)} prompts for {len(prompts)}")
        return prepared

    def _encode(self, pairs: Pairs, max_length: int | None) -> Encoded:
        return encode_pairs(self.tokenizer, pairs, self.max_length if max_length is None else max_length)

    def _decode(self, rows: Sequence[Any]) -> list[str]:
        if not rows:
            return []
        return self.tokenizer.batch_decode(list(rows), skip_special_tokens=True, clean_up_tokenization_spaces=False)

    def _decoding(
        self, prompts: int, max_new_tokens: int, temperature: float, samples: int, seed: int, stopped: Any
    ) -> Decoding:
        ends = self.model.generation_config.eos_token_id if self.model.generation_config else None
        ends = [] if ends is None else ends if isinstance(ends, list) else [ends]
        draws = None
        if temperature > 0:
            draws = np.empty((prompts, samples, max(max_new_tokens, 0)))
            for prompt, sample in np.ndindex(prompts, samples):
                draws[prompt, sample] = numpy_rng(seed, "generate", prompt, sample).random(max_new_tokens)
        return Decoding(
            max_new_tokens=max_new_tokens,
            pad_id=int(self.tokenizer.pad_token_id),
            eos_ids=tuple(sorted({*ends, self.tokenizer.eos_token_id} - {None})),
            temperature=temperature,
            samples=samples,
            draws=draws,
            stopped=stopped,
        )

    def _continue(
        self, ids: list[np.ndarray], prepared: Prepared, decoding: Decoding, batch_size: int | None
    ) -> list[list[np.ndarray]]:
        room = self.max_length - decoding.max_new_tokens
        if room < 2 and ids:
            raise InputError(
                f"max_new_tokens={decoding.max_new_tokens} leaves no room for a prompt in {self.max_length} tokens"
            )
        ids = [cut_prompt(self.tokenizer, row, room) for row in ids]
        spans = [(bos_length(self.tokenizer, row), len(row)) for row in ids]
        return decode(self.model, ids, spans, decoding, around=prepared.active, rows=batch_size)


def _whole_texts(rows: Rows) -> list[str]:
    """Rows as running text, before there is a tokenizer to ask for a chat template."""
    import datasets

    if isinstance(rows, datasets.Dataset):
        from palimpsest.data import records

        rows = records.pairs(rows)
    return [row if isinstance(row, str) else "".join(row) for row in rows]


def _cut(text: str, stops: Sequence[str]) -> str | None:
    """`text` before the stop string that was completed first; None if there is none in it."""
    found = [(text.find(stop) + len(stop), text.find(stop)) for stop in stops if stop in text]
    return text[: min(found)[1]] if found else None


def _until(text: str, stops: Sequence[str]) -> str:
    cut = _cut(text, stops)
    return text if cut is None else cut


def _bytes(tensor: torch.Tensor) -> bytes:
    return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
