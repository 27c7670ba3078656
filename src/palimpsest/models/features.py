"""Frozen features of texts and relations, computed once and kept in the cache.

A text is the encoder's sentence vector.  A relation is three means of the encoder's last states, one behind the other:
over the words of the head, of the tail (as with the entity markers of Soares et al. 2019), and of the whole sentence.
Knows nothing of episodes.  Shapes: M inputs, V views, D dimensions of the encoder.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import lru_cache
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import torch

from palimpsest.core import cache
from palimpsest.core.files import sha256_of
from palimpsest.data.relations import Relation, only, semifactuals
from palimpsest.models.encoder import Encoder
from palimpsest.models.retrieval import checked

_VERSION = 2  # changes when the same input would get other features


def text_features(texts: Sequence[str], encoder: Encoder) -> np.ndarray:
    """(M, D) float32 sentence vectors of length one."""
    return _kept(["text", list(texts)], encoder, lambda: encoder.embed(texts))


def vectors_of(x: Any, encoder: str) -> np.ndarray:
    """(M, D) of M texts by the encoder of that name, or of M vectors, which stay as they are."""
    if len(x) and all(isinstance(text, str) for text in x):
        return text_features(list(x), _loaded(encoder))
    return checked(x, "inputs")


@lru_cache(maxsize=2)
def _loaded(encoder: str) -> Encoder:
    return Encoder.load(encoder)


def relation_features(
    relations: Sequence[Relation], encoder: Encoder, *, views: bool = False, seed: int = 0
) -> np.ndarray:
    """(M, 3 D) float32, or (M, 4, 3 D) with three semi-factual views behind the original (`data.relations`)."""
    if views:
        made = semifactuals(relations, seed=seed)
        each = list(chain.from_iterable((one, *others) for one, others in zip(relations, made, strict=True)))
        return relation_features(each, encoder).reshape(len(relations), 4, -1)
    key = [[list(one.words), *one.head, *one.tail] for one in relations]
    return _kept(["relation", key], encoder, lambda: _span_states(relations, encoder))


def _span_states(relations: Sequence[Relation], encoder: Encoder, batch_size: int = 64) -> np.ndarray:
    """Each of the three parts has length one."""
    transformer: Any = encoder.model[0].auto_model
    tokenizer = encoder.model.tokenizer
    longest = int(encoder.model.get_max_seq_length() or 256)
    order = sorted(range(len(relations)), key=lambda row: len(relations[row].words))
    found = np.empty((len(relations), 3, encoder.dimensions), dtype=np.float32)
    for start in range(0, len(order), batch_size):
        rows = order[start : start + batch_size]
        words = [_around(relations[row], longest // 2) for row in rows]
        batch = tokenizer(
            [list(one.words) for one in words],
            is_split_into_words=True,
            padding=True,
            truncation=True,
            max_length=longest,
            return_tensors="pt",
        )
        with torch.inference_mode():
            states = transformer(**batch.to(transformer.device)).last_hidden_state.float().cpu()
        for line, (row, one) in enumerate(zip(rows, words, strict=True)):
            of = np.array([-1 if word is None else word for word in batch.word_ids(line)])
            for part, span in enumerate((one.head, one.tail, (0, len(one.words)))):
                inside = (of >= span[0]) & (of < span[1])
                mean = states[line, inside if inside.any() else of >= 0].mean(0)  # a name may be of no known token
                found[row, part] = (mean / mean.norm()).numpy()
    return found.reshape(len(relations), -1)


def _around(relation: Relation, most: int) -> Relation:
    """The `most` words nearest to a mention, where a sentence is so long that a mention would be cut off."""
    if len(relation.words) <= most:
        return relation
    places = np.arange(len(relation.words))
    away = [np.maximum(span[0] - places, places - span[1] + 1).clip(0) for span in (relation.head, relation.tail)]
    kept = np.zeros(len(places), dtype=bool)
    kept[np.argsort(np.minimum(*away), kind="stable")[:most]] = True
    return only(relation, kept)


def _kept(key: object, encoder: Encoder, compute: Callable[[], np.ndarray]) -> np.ndarray:
    def build(folder: Path) -> None:
        np.save(folder / "features.npy", compute())

    whole = [_VERSION, encoder.source, sha256_of(key)]
    return cache.cached("features", whole, build, lambda folder: np.load(folder / "features.npy"))
