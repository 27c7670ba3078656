"""A small encoder that has learnt to label texts: one linear head a field on the pooled output of any HF encoder.

A class field is learnt by cross-entropy, a scale by squared error, all with equal weight (Biomed-Enriched).  A student
is a handful of files, which can also stand as the rows of a table and so travel with whatever needs it.
Shapes: B rows, T tokens, D width, K outputs of all heads together.
"""

from __future__ import annotations

import json
import math
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from palimpsest.core.errors import InputError
from palimpsest.core.files import write_json
from palimpsest.core.fit import fit
from palimpsest.core.seeds import numpy_rng, seed_everything
from palimpsest.curate.labels import Field, Schema
from palimpsest.models.encoder import PACKAGED, packaged, quiet

Array = np.ndarray[Any, Any]
POOLINGS = ("first", "mean")
_EVERY = 100  # steps between two checkpoints
_FILES = ("student.json", "heads.safetensors")  # besides those of the encoder and its tokenizer


@dataclass(frozen=True)
class Course:
    """How a student is taught; the defaults are the paper's sister model's where they suit a small encoder too."""

    epochs: int = 3
    lr: float = 1e-4
    batch: int = 8
    length: int = 512  # tokens of a text that are read
    pooling: str = "first"  # what stands for a text: the first token's output, or the "mean" over all
    seed: int = 0


class Heads(nn.Module):
    """(B, T) ids and mask -> (B, K): the logits of each class field and the value of each scale, field after field."""

    def __init__(self, encoder: Any, schema: Schema, pooling: str):
        super().__init__()
        self.encoder: Any = encoder
        self.pooling = pooling
        width = int(encoder.config.hidden_size)
        self.out = nn.Linear(width, sum(_outputs(field) for field in schema.fields))
        with torch.no_grad():  # a scale starts from its middle: the way there is long at a small learning rate
            for field, part in _parts(schema):
                if field.scale:
                    self.out.bias[part] = float(np.mean(_points(field)))

    def forward(self, ids: Tensor, mask: Tensor) -> Tensor:
        hidden = self.encoder(input_ids=ids, attention_mask=mask).last_hidden_state
        if self.pooling == "first":
            pooled = hidden[:, 0]
        else:
            weights = mask[..., None].to(hidden.dtype)
            pooled = (hidden * weights).sum(1) / weights.sum(1)
        found: Tensor = self.out(pooled)
        return found


@dataclass(frozen=True)
class Student:
    """A trained student."""

    model: Heads
    tokenizer: Any
    schema: Schema
    length: int

    def label(self, texts: Sequence[str], contexts: Sequence[str] = (), *, batch: int = 32) -> dict[str, Array]:
        """By class field (N, classes) probabilities, by scale (N,) values, and "truncated" (N,) bool."""
        both = [_joined(text, context) for text, context in zip(texts, contexts or [""] * len(texts), strict=True)]
        device = next(self.model.parameters()).device
        outputs = np.empty((len(both), self.model.out.out_features), np.float32)
        truncated = np.zeros(len(both), bool)
        order = np.argsort([-len(text) for text in both], kind="stable")  # rows of similar length together
        self.model.eval()
        for start in range(0, len(order), batch):
            rows = order[start : start + batch]
            encoded = _encode(self.tokenizer, [both[row] for row in rows], self.length)
            with torch.inference_mode():
                found = self.model(encoded["ids"].to(device), encoded["mask"].to(device))
            outputs[rows] = found.float().cpu().numpy()
            truncated[rows] = encoded["truncated"].numpy()
        labels: dict[str, Array] = {"truncated": truncated}
        for field, part in _parts(self.schema):
            if field.scale:
                labels[field.name] = outputs[:, part.start].astype(np.float64)
            else:
                labels[field.name] = _softmax(outputs[:, part].astype(np.float64))
        return labels

    def save(self, folder: Path) -> None:
        from safetensors.torch import save_file

        with quiet():
            self.model.encoder.save_pretrained(folder)
        self.tokenizer.save_pretrained(folder)
        save_file(self.model.out.state_dict(), folder / _FILES[1])
        told = {"schema": self.schema.to_json(), "pooling": self.model.pooling, "length": self.length}
        write_json(folder / _FILES[0], told)

    @staticmethod
    def load(folder: str | Path) -> Student:
        """Raises `InputError` for a folder that no student was saved to."""
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        folder = Path(folder)
        try:
            told = json.loads((folder / _FILES[0]).read_text(encoding="utf-8"))
            schema = Schema.from_json(told["schema"])
            encoder, tokenizer = _encoder(str(folder))
            model = Heads(encoder, schema, told["pooling"])
            model.out.load_state_dict(load_file(folder / _FILES[1]))
        except (OSError, KeyError, ValueError, RuntimeError, SafetensorError) as error:
            raise InputError(f"{folder}: not a student ({str(error).splitlines()[0]})") from None
        return Student(model.eval().to(_device()), tokenizer, schema, int(told["length"]))

    def pack(self) -> dict[str, bytes]:
        """The files that `save` writes, by name."""
        with tempfile.TemporaryDirectory() as name:
            self.save(Path(name))
            return {path.name: path.read_bytes() for path in sorted(Path(name).iterdir())}

    @staticmethod
    def unpack(files: Mapping[str, bytes]) -> Student:
        with tempfile.TemporaryDirectory() as name:
            for file, content in files.items():
                (Path(name) / file).write_bytes(content)
            return Student.load(name)


def train(
    rows: Sequence[Mapping[str, Any]],
    schema: Schema,
    encoder: str,
    course: Course,
    *,
    checkpoint: Path | None = None,
    progress: str = "",
) -> Student:
    """A student of rows with "text", "context" and one label a field, from the encoder in a folder, on the hub, or
    packaged.

    AdamW without weight decay, a tenth of the steps warm-up, then linear decay.  Raises `InputError`.
    """
    if course.pooling not in POOLINGS:
        raise InputError(f"pooling must be one of {', '.join(POOLINGS)}, not '{course.pooling}'")
    if min(course.epochs, course.batch, course.length) < 1:
        raise InputError(
            f"epochs, batch and length must be at least 1, not {course.epochs}, {course.batch}, {course.length}"
        )
    body, tokenizer = _encoder(encoder)
    longest = getattr(body.config, "max_position_embeddings", course.length)
    length = min(course.length, longest - _reserved(body.config))
    seed_everything(course.seed, "heads")
    model = Heads(body, schema, course.pooling).to(_device())
    encoded = _encode(tokenizer, [_joined(row["text"], row.get("context") or "") for row in rows], length)
    targets = _targets(rows, schema)
    size = min(course.batch, len(rows))
    steps = course.epochs * math.ceil(len(rows) / size)

    def batches(step: int) -> dict[str, Tensor]:
        picked = torch.from_numpy(_rows_of(step, size, len(rows), course.seed))
        width = int(encoded["mask"][picked].sum(1).max())
        return {
            "ids": encoded["ids"][picked, :width],
            "mask": encoded["mask"][picked, :width],
            "targets": targets[picked],
        }

    def loss(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
        return _loss(model(batch["ids"], batch["mask"]), batch["targets"], schema)

    fit(
        model, loss, batches, steps=steps, lr=course.lr, warmup=max(1, steps // 10), schedule="linear",
        seed=course.seed, checkpoint=checkpoint, every=_EVERY, progress=progress,
    )  # fmt: skip
    return Student(model.eval(), tokenizer, schema, length)


def _loss(outputs: Tensor, targets: Tensor, schema: Schema) -> Tensor:
    """(B, K) outputs and (B, fields) targets -> the sum over fields of their mean losses."""
    total = outputs.new_zeros(())
    for place, (field, part) in enumerate(_parts(schema)):
        if field.scale:
            total = total + nn.functional.mse_loss(outputs[:, part.start].float(), targets[:, place])
        else:
            total = total + nn.functional.cross_entropy(outputs[:, part].float(), targets[:, place].long())
    return total


def _targets(rows: Sequence[Mapping[str, Any]], schema: Schema) -> Tensor:
    """(N, fields) float32: the number of a class, the point of a scale."""
    places = {field.name: {label: place for place, label in enumerate(field.points)} for field in schema.fields}
    return torch.tensor(
        [
            [float(row[field.name] if field.scale else places[field.name][row[field.name]]) for field in schema.fields]
            for row in rows
        ]
    )


def _rows_of(step: int, size: int, rows: int, seed: int) -> Array:
    """(B,) the rows of a step: epoch by epoch, each in its own order; the last batch of an epoch runs into the next."""
    places = np.arange(step * size, (step + 1) * size)
    orders = {epoch: numpy_rng(seed, "epoch", int(epoch)).permutation(rows) for epoch in np.unique(places // rows)}
    return np.array([orders[place // rows][place % rows] for place in places])


def _joined(text: str, context: str) -> str:
    return f"{context}\n{text}" if context else text or " "


def _encode(tokenizer: Any, texts: list[str], length: int) -> dict[str, Tensor]:
    """Right-padded ids and mask, (B, T), and which texts lost their end, (B,)."""
    found = tokenizer(
        texts, truncation=True, max_length=length, padding=True, return_tensors="pt", return_overflowing_tokens=False
    )
    truncated = torch.tensor([bool(encoding.overflowing) for encoding in found.encodings])
    return {"ids": found["input_ids"], "mask": found["attention_mask"], "truncated": truncated}


def _outputs(field: Field) -> int:
    return 1 if field.scale else len(field.points)


def _parts(schema: Schema) -> Iterator[tuple[Field, slice]]:
    """Each field with its columns of the outputs."""
    start = 0
    for field in schema.fields:
        yield field, slice(start, start + _outputs(field))
        start += _outputs(field)


def _points(field: Field) -> list[int]:
    return [int(point) for point in field.points]


def _softmax(logits: Array) -> Array:
    raised = np.exp(logits - logits.max(axis=1, keepdims=True))
    found: Array = raised / raised.sum(axis=1, keepdims=True)
    return found


def _reserved(config: Any) -> int:
    """Positions that RoBERTa's kind keeps for padding."""
    return int(config.pad_token_id) + 1 if config.model_type in ("roberta", "xlm-roberta", "camembert") else 0


def _device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


def _encoder(name: str) -> tuple[Any, Any]:
    """The encoder and its tokenizer, which pads on the right: a row's positions do not depend on its batch."""
    from transformers import AutoModel, AutoTokenizer

    path = packaged() if name == PACKAGED else name
    try:
        with quiet():
            model = AutoModel.from_pretrained(path, use_safetensors=True, dtype=torch.float32)
        tokenizer = AutoTokenizer.from_pretrained(path, padding_side="right", truncation_side="right")
    except (OSError, ValueError) as error:
        raise InputError(f"{name}: not an encoder ({str(error).splitlines()[0]})") from None
    if not tokenizer.is_fast or not hasattr(model.config, "hidden_size"):
        raise InputError(f"{name}: {type(model).__name__} cannot be a student; wanted an encoder with a fast tokenizer")
    return model, tokenizer
