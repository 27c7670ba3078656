"""Encoders that put pictures and texts into one space: any CLIP from a folder or the hub, or a small one trained here.

Both answer with vectors of length one, so that a dot product is a cosine similarity.  Knows nothing of what the
similarities are for.
Shapes: M pictures, N texts, B a batch, D dimensions; pictures are (M, channels, height, width) uint8.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from palimpsest.core.errors import InputError
from palimpsest.core.fit import fit
from palimpsest.core.seeds import numpy_rng, seed_everything

_TOGETHER = 256  # pictures embedded at once
_BATCH, _LR = 128, 5e-3  # of the small one


class VisionLanguage(Protocol):
    """What an audit asks of CLIP."""

    source: str

    @property
    def temperature(self) -> float: ...

    def images(self, pictures: np.ndarray) -> np.ndarray:
        """(M, D) float32, of length one."""

    def texts(self, texts: Sequence[str]) -> np.ndarray:
        """(N, D) float32, of length one."""


@dataclass(frozen=True)
class Clip:
    """A pretrained CLIP of transformers."""

    model: Any
    tokenizer: Any
    mean: Tensor  # (3, 1, 1)
    deviation: Tensor
    source: str

    @staticmethod
    def load(name: str) -> Clip:
        """From a folder or by its name on the hub, safetensors only.  Raises InputError for what is no CLIP."""
        from transformers import AutoTokenizer, CLIPConfig, CLIPImageProcessor, CLIPModel
        from transformers.image_utils import OPENAI_CLIP_MEAN, OPENAI_CLIP_STD

        try:
            settings = CLIPImageProcessor.get_image_processor_dict(name)[0]
        except (OSError, ValueError):
            settings = {}
        try:
            if not isinstance(CLIPConfig.get_config_dict(name)[0].get("text_config"), dict):
                raise InputError(f"{name}: its config.json is not that of a CLIP")
            model = CLIPModel.from_pretrained(name, use_safetensors=True).eval()
            tokenizer = AutoTokenizer.from_pretrained(name)
        except (OSError, ValueError) as error:
            raise InputError(f"cannot load the CLIP '{name}': {str(error).splitlines()[0]}") from None
        moments = (settings.get("image_mean", OPENAI_CLIP_MEAN), settings.get("image_std", OPENAI_CLIP_STD))
        mean, deviation = (torch.tensor(moment)[:, None, None] for moment in moments)
        return Clip(model, tokenizer, mean, deviation, name)

    @property
    def temperature(self) -> float:
        return float(1 / self.model.logit_scale.detach().exp())

    def images(self, pictures: np.ndarray) -> np.ndarray:
        side = self.model.config.vision_config.image_size
        found = []
        with torch.inference_mode():
            for start in range(0, len(pictures), _TOGETHER):
                x = torch.from_numpy(pictures[start : start + _TOGETHER]).float() / 255
                x = x.expand(-1, 3, -1, -1)
                x = F.interpolate(x, (side, side), mode="bicubic", antialias=True).clamp(0, 1)
                seen = self.model.vision_model(pixel_values=(x - self.mean) / self.deviation).pooler_output
                found.append(F.normalize(self.model.visual_projection(seen), dim=1))
        return torch.cat(found).numpy()

    def texts(self, texts: Sequence[str]) -> np.ndarray:
        longest = self.model.config.text_config.max_position_embeddings
        tokens = self.tokenizer(list(texts), padding=True, truncation=True, max_length=longest, return_tensors="pt")
        with torch.inference_mode():
            read = self.model.text_model(input_ids=tokens["input_ids"], attention_mask=tokens["attention_mask"])
            return F.normalize(self.model.text_projection(read.pooler_output), dim=1).numpy()


class Towers(nn.Module):
    """CLIP's two towers and temperature (Radford et al. 2021): two convolutions, and the mean of word vectors."""

    def __init__(self, words: int, width: int = 64, shape: tuple[int, int, int] = (3, 20, 20)):
        super().__init__()
        channels, height, wide = shape
        places = (height // 2 + 1) // 2 * ((wide // 2 + 1) // 2)
        self.image = nn.Sequential(
            nn.Conv2d(channels, 32, 4, 2, 1),
            nn.GELU(),
            nn.Conv2d(32, width, 3, 2, 1),
            nn.GELU(),
            nn.Flatten(),
            nn.Linear(places * width, width),
        )
        self.words = nn.EmbeddingBag(words, width, mode="mean", padding_idx=0)
        self.text = nn.Sequential(nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width))
        self.scale = nn.Parameter(torch.tensor(1 / 0.07).log())

    def images(self, pixels: Tensor) -> Tensor:
        """(B, channels, height, width) -> (B, D), of length 1."""
        return F.normalize(self.image(pixels), dim=1)

    def texts(self, ids: Tensor) -> Tensor:
        """(B, words), padded with 0 -> (B, D), of length 1."""
        return F.normalize(self.text(self.words(ids)), dim=1)

    def forward(self, batch: dict[str, Tensor]) -> Tensor:
        """The symmetric InfoNCE loss."""
        return info_nce(self.scale.exp().clamp(max=100) * self.images(batch["pixels"]) @ self.texts(batch["ids"]).T)


def info_nce(logits: Tensor) -> Tensor:
    """Of (B, B) logits whose diagonal holds the true pairs: the mean of both cross-entropies."""
    right = torch.arange(len(logits))
    return (F.cross_entropy(logits, right) + F.cross_entropy(logits.T, right)) / 2


def pixels_of(pictures: np.ndarray) -> Tensor:
    """uint8 as floats from -1 to 1."""
    return torch.from_numpy(pictures).float() / 127.5 - 1


@dataclass(frozen=True)
class SmallClip:
    """`Towers` with the words that they know; others count for nothing."""

    towers: Towers
    vocabulary: dict[str, int]
    source: str = "trained here"

    @staticmethod
    def train(pictures: np.ndarray, captions: Sequence[str], *, steps: int = 400, seed: int = 0) -> SmallClip:
        """A small CLIP trained on pictures (M, channels, height, width) uint8 with their captions, for `steps` batches.

        Raises InputError where fewer than two captions differ.
        """
        if len(set(captions)) < 2:
            raise InputError("all captions are the same: pictures and texts cannot be matched by them")
        vocabulary = {word: 1 + n for n, word in enumerate(sorted({w for one in captions for w in split(one)}))}
        ids = _ids(captions, vocabulary)
        seed_everything(seed, "towers")
        towers = Towers(1 + len(vocabulary), shape=pictures.shape[1:])  # type: ignore[arg-type]  # of a checked array

        def batches(step: int) -> dict[str, Tensor]:
            rows = numpy_rng(seed, "pairs", step).integers(len(pictures), size=_BATCH)
            return {"ids": ids[torch.from_numpy(rows)], "pixels": pixels_of(pictures[rows])}

        def loss(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
            found: Tensor = model(batch)
            return found

        fit(towers, loss, batches, steps=steps, lr=_LR, betas=(0.9, 0.98), weight_decay=0.2, warmup=steps // 20,
            schedule="cosine", seed=seed, precision="fp32", progress="")  # fmt: skip
        return SmallClip(towers.eval(), vocabulary)

    @property
    def temperature(self) -> float:
        return float(1 / self.towers.scale.detach().exp().clamp(max=100))

    def images(self, pictures: np.ndarray) -> np.ndarray:
        starts = range(0, len(pictures), _TOGETHER)
        with torch.inference_mode():
            found = [self.towers.images(pixels_of(pictures[start : start + _TOGETHER])) for start in starts]
        return torch.cat(found).numpy()

    def texts(self, texts: Sequence[str]) -> np.ndarray:
        with torch.inference_mode():
            return self.towers.texts(_ids(texts, self.vocabulary)).numpy()


def split(text: str) -> list[str]:
    """The words of a caption, without regard to case or to the marks that join them."""
    return text.lower().replace("_", " ").replace("-", " ").replace("/", " ").split()


def _ids(texts: Sequence[str], vocabulary: dict[str, int]) -> Tensor:
    """(N, longest) int64; 0 is padding."""
    rows = [[vocabulary[word] for word in split(text) if word in vocabulary] for text in texts]
    ids = torch.zeros((len(rows), max(1, *map(len, rows))), dtype=torch.int64)
    for row, words in enumerate(rows):
        ids[row, : len(words)] = torch.tensor(words, dtype=torch.int64)
    return ids
