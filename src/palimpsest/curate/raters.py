"""Models as raters: a classifier's expected class, and a language model's surprise, as score columns.

Any sequence classifier of `transformers` will do: the four PRRC raters of meta-rater (Zhuang et al. 2025), that of
FineWeb-Edu, or one's own.  The expected class, not the most likely one, is the score: it keeps the model's doubts.
Weights are read as safetensors, and no code that lies beside them is run.
"""

from __future__ import annotations

import threading
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import numpy as np

from palimpsest.core.errors import InputError
from palimpsest.core.methods import method
from palimpsest.curate.engine import add, text_column
from palimpsest.curate.pool import require_daft

if TYPE_CHECKING:
    from daft import DataFrame

_loading = threading.Lock()  # Daft asks from several threads at once


@method(verb="curate", paper="meta_rater", name="classifier")
@dataclass(frozen=True)
class Classifier:
    """Add the expected class of each document under a sequence classifier, as ``score_NAME``.

    The expectation of the class numbers (0 to 5, say); of two classes the probability of the second; of a model with a
    single output that output.
    """

    model: str = ""  # folder or hub name
    name: str = "classifier"  # of the column, behind score_
    text: str = "text"  # column
    length: int = 512  # tokens of a document that are read
    batch: int = 32

    def __call__(self, pool: DataFrame) -> DataFrame:
        daft = require_daft()

        @daft.func.batch(return_dtype=daft.DataType.float64(), use_process=False)
        def rated(texts: Any) -> Any:
            return self.rate([text or "" for text in texts.to_pylist()])

        return add(pool, {f"score_{self.name}": rated(text_column(pool, self.text))})

    def rate(self, texts: list[str]) -> np.ndarray:
        """(N,) expected classes."""
        import torch

        model, tokenizer = _classifier(self.model)
        found = np.empty(len(texts))
        order = np.argsort([-len(text) for text in texts], kind="stable")  # rows of similar length together
        for start in range(0, len(order), self.batch):
            rows = order[start : start + self.batch]
            picked = [texts[row] for row in rows]
            batch = tokenizer(picked, truncation=True, max_length=self.length, padding=True, return_tensors="pt")
            with torch.inference_mode():
                logits = model(**batch.to(model.device)).logits.float()
            if logits.shape[1] > 1:
                logits = logits.softmax(-1) @ torch.arange(logits.shape[1], dtype=torch.float32, device=logits.device)
            found[rows] = logits.reshape(len(rows)).cpu().numpy()
        return found


@method(verb="curate", paper="meta_rater", name="perplexity")
@dataclass(frozen=True)
class Perplexity:
    """Add ``score_surprise``: a language model's mean nats a token of each document, better when lower."""

    model: str = ""  # folder or hub name
    text: str = "text"  # column

    def __call__(self, pool: DataFrame) -> DataFrame:
        daft = require_daft()

        @daft.func.batch(return_dtype=daft.DataType.float64(), use_process=False)
        def surprise(texts: Any) -> Any:
            return np.asarray(_language_model(self.model).nll([text or " " for text in texts.to_pylist()]), np.float64)

        return add(pool, {"score_surprise": surprise(text_column(pool, self.text))})


def _language_model(path: str) -> Any:
    with _loading:
        return _loaded_language_model(path)


def _classifier(path: str) -> tuple[Any, Any]:
    with _loading:
        return _loaded_classifier(path)


@lru_cache(maxsize=1)
def _loaded_language_model(path: str) -> Any:
    """Loaded once a process."""
    from palimpsest.models.lm import LM

    if not path:
        raise InputError("wanted model: a folder or hub name of a causal language model")
    return LM.load(path)


@lru_cache(maxsize=1)
def _loaded_classifier(path: str) -> tuple[Any, Any]:
    """Loaded once a process."""
    import torch
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    if not path:
        raise InputError("wanted model: a folder or hub name of a sequence classifier")
    try:
        model = AutoModelForSequenceClassification.from_pretrained(path, use_safetensors=True)
        # padded on the right, a row's positions do not depend on the other rows of its batch
        tokenizer = AutoTokenizer.from_pretrained(path, padding_side="right")
    except (OSError, ValueError) as error:
        raise InputError(f"{path}: not a sequence classifier ({str(error).splitlines()[0]})") from error
    return model.eval().to("cuda" if torch.cuda.is_available() else "cpu"), tokenizer
