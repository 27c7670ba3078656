"""RAML: a few-shot classifier of texts that looks things up: each text fetches passages and is fused with them.

"Retrieval-Augmented Meta Learning for Low-Resource Text Classification", 2023 (arXiv:2309.04979).  A fusion network
sees the text, each passage and both together, weighs the passages against an empty slot ("use nothing"), and a gate
lets what they add into the text's vector; the nearest prototype answers.  Only the abstract could be read: the formulas
are our reconstruction.  Needs a corpus of unlabelled passages; without one the empty slot alone is left, and what
remains is a prototypical network.  The encoder is frozen, so a passage's vector never goes stale.
Shapes: M texts, k passages of a text, P passages of the corpus, D dimensions of the encoder, d of the fused vector.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from palimpsest.core.errors import InputError, unknown
from palimpsest.core.files import write_json
from palimpsest.core.methods import method
from palimpsest.core.watch import Watch
from palimpsest.data.episodes import Episodes
from palimpsest.data.tasks import Examples, Task, TaskStream
from palimpsest.learn.fewshot.episodic import (
    Batch,
    Episodic,
    FittedEpisodic,
    Network,
    class_means,
    cross_entropy,
    squared_distances,
)
from palimpsest.models.convnet import SPREAD
from palimpsest.models.encoder import PACKAGED
from palimpsest.models.features import vectors_of
from palimpsest.models.retrieval import NONE, DenseIndex, overlapping

FUSIONS = ("attention", "mean")


@dataclass(frozen=True, eq=False)
class Corpus:
    """Passages and their unit vectors (P, D).  A passage whose cosine to a text is `copies` or more is its copy."""

    passages: tuple[str, ...]
    index: DenseIndex
    copies: float = 0.98

    @staticmethod
    def of(passages: Sequence[str], retriever: str = PACKAGED, copies: float = 0.98) -> Corpus:
        """Embed passages; InputError if there are none or one is empty."""
        for number, passage in enumerate(passages):
            if not isinstance(passage, str) or not passage.strip():
                raise InputError(f"passage {number} of the corpus is {passage!r:.40}; wanted a text")
        if not len(passages):
            raise InputError("the corpus is empty: there is nothing to retrieve")
        return Corpus(tuple(passages), DenseIndex(_unit(vectors_of(passages, retriever))), copies)

    def beside(self, vectors: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
        """(M, 1 + k, D): each text's vector and, behind it, those of its k nearest passages; their rows (M, k).

        A copy of the text is no knowledge beside it, and is passed over; a place that nothing is left for is all zeros.
        """
        if len(self.passages) < k:
            raise InputError(f"the corpus has {len(self.passages)} passages; {k} are wanted for each text")
        queries = _unit(vectors)
        barred: list[list[int]] = [[] for _ in queries]
        while True:
            found = self.index.search(queries, k, barred)
            copies = found.scores >= self.copies
            if not copies.any():
                break
            barred = [out + rows[bad].tolist() for out, rows, bad in zip(barred, found.rows, copies, strict=True)]
        near = np.where((found.rows == NONE)[..., None], np.float32(0), self.index.vectors[found.rows])
        return np.concatenate([vectors[:, None].astype(np.float32), near], axis=1), found.rows

    def without(self, rows: Sequence[int]) -> Corpus:
        """The corpus with some passages taken out: nothing of them is left."""
        gone = set(rows)
        kept = tuple(passage for row, passage in enumerate(self.passages) if row not in gone)
        return replace(self, passages=kept, index=self.index.without(rows))


@dataclass(frozen=True, eq=False)
class Lookup:
    """What M texts were given and how much of it was used."""

    rows: np.ndarray  # (M, k) of the corpus; -1 where nothing was found
    weights: np.ndarray  # (M, k + 1): attention; the last is that of the empty slot
    gate: np.ndarray  # (M,) mean over dimensions, 0 to 1


@method(verb="learn", paper="raml")
@dataclass(frozen=True, kw_only=True)
class RAML(Episodic):
    """Retrieval-augmented meta-learning: texts are fused with passages they fetch, and nearest prototypes answer.

    Inputs are texts, their vectors (M, D) by the encoder `retriever`, or (M, 1 + k, D) vectors with passages that were
    found in another way.
    """

    inputs: ClassVar[tuple[str, ...]] = ("features", "texts")

    corpus: str = ""  # file of passages: .txt, or rows with a column "text"
    retriever: str = PACKAGED  # the frozen encoder of texts and passages
    passages: int = 5  # k
    dimensions: int = 128
    fusion: Literal["attention", "mean"] = "attention"  # "mean": all passages alike, no empty slot and no gate
    empty_slot: bool = True
    joint: bool = True  # the view of text and passage together
    dropped: float = 0.2  # share of training texts whose passages are all withheld
    contrast: float = 0.1  # weight of the supervised contrastive loss
    contrast_temperature: float = 0.1
    entropy: float = 0.01  # weight of the attention's entropy at the start; 0 from the middle of training on
    copies: float = 0.98  # cosine from which a passage counts as a copy of the text

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.fusion not in FUSIONS:
            raise unknown("fusion", self.fusion, FUSIONS)
        if self.passages < 1 or self.dimensions < 1 or not 0 <= self.dropped < 1 or self.contrast_temperature <= 0:
            raise InputError(
                f"passages={self.passages}, dimensions={self.dimensions}, dropped={self.dropped}, "
                f"contrast_temperature={self.contrast_temperature} are out of range"
            )

    def build(self, x: Any, way: int) -> nn.Module:
        return Network(Fusion(x.shape[-1], self))

    def scores(self, network: Any, support: Tensor, labels: Tensor, query: Tensor, way: int) -> Tensor:
        return -squared_distances(query, class_means(support, labels, way))

    def loss(self, network: Any, batch: Batch, way: int) -> tuple[Tensor, dict[str, Tensor]]:
        both = torch.cat([batch["support"], batch["query"]], 1)
        parts = network.encoder.fused(both)
        shots = batch["support"].shape[1]
        support, query = parts.vectors[:, :shots], parts.vectors[:, shots:]
        of, labels = batch["support_labels"], batch["labels"]
        nll = cross_entropy(self.scores(network, support, of, query, way), labels)
        apart = contrastive(parts.vectors, torch.cat([of, labels], 1), self.contrast_temperature)
        spread = entropy(parts.weights).mean()
        done = int(batch["number"][0]) / max(self.steps * self.episodes, 1)
        value = nll + self.contrast * apart - self.entropy * max(0.0, 1 - 2 * done) * spread
        logs = {"nll": nll, "contrast": apart, "attention_entropy": spread, "empty": parts.weights[..., -1].mean()}
        return value, {name: number.detach() for name, number in logs.items()}

    def meta_fit(
        self, stream: TaskStream, *, passages: Sequence[str] | None = None, watch: Watch | None = None
    ) -> FittedRAML:
        """Train on the episodes of `stream`; the corpus is `passages`, else what the file `corpus` holds.

        Where inputs are texts, passages that share a run of eight words with one of them are left out of the corpus.
        """
        if passages is None and self.corpus:
            from palimpsest.data.records import documents
            from palimpsest.data.sources import read

            passages = documents(read(self.corpus, wanted="documents"))
        if passages is not None and isinstance(stream, Episodes):
            pools = [pool.x for pool in (stream.pool, stream.query_from) if pool is not None]
            texts = [text for x in pools for text in x if isinstance(text, str)]
            if texts:
                passages = [p for p, bad in zip(passages, overlapping(passages, texts), strict=True) if not bad]
        corpus = None if passages is None else Corpus.of(passages, self.retriever, self.copies)
        fitted = super().meta_fit(_Looked(stream, self, corpus).whole(), watch=watch)
        return FittedRAML(self, fitted.network, fitted.shape, fitted.way, corpus)

    def read(self, folder: Path) -> FittedRAML:
        fitted = super().read(folder)
        path = folder / "passages.json"
        corpus = None
        if path.is_file():
            texts = tuple(json.loads(path.read_text(encoding="utf-8")))
            corpus = Corpus(texts, DenseIndex.load(folder / "passages.safetensors"), self.copies)
        return FittedRAML(self, fitted.network, fitted.shape, fitted.way, corpus)

    def look_up(self, x: Any, corpus: Corpus | None) -> tuple[np.ndarray, np.ndarray]:
        """(M, 1 + k, D) inputs of the network and the rows (M, k) of their passages."""
        if np.ndim(x) == 3:
            return np.asarray(x), np.full((len(x), np.shape(x)[1] - 1), NONE)
        vectors = vectors_of(x, self.retriever)
        if corpus is not None:
            return corpus.beside(vectors, self.passages)
        rows = np.full((len(vectors), self.passages), NONE)
        return np.concatenate([vectors[:, None], np.zeros((*rows.shape, vectors.shape[1]), vectors.dtype)], 1), rows


@dataclass(frozen=True, eq=False)
class FittedRAML(FittedEpisodic):
    """A meta-trained fusion network and the corpus that it looks things up in."""

    corpus: Corpus | None = None

    def embed(self, x: Any) -> Tensor:
        """(M, d) of M texts, vectors, or vectors with passages."""
        if np.ndim(x) == 2 and np.shape(x)[1:] != self.shape[1:]:
            raise InputError(f"inputs have the shape {np.shape(x)[1:]}; the learner was trained on {self.shape[1:]}")
        return super().embed(self.learner.look_up(x, self.corpus)[0])  # type: ignore[attr-defined]

    def lookup(self, x: Any) -> Lookup:
        """Which passages M inputs were given and with what weight."""
        inputs, rows = self.learner.look_up(x, self.corpus)  # type: ignore[attr-defined]
        with torch.no_grad():
            parts = self.network.encoder.fused(torch.from_numpy(inputs).float())  # type: ignore[operator, union-attr]
        return Lookup(rows, parts.weights.numpy(), parts.gate.mean(-1).numpy())

    def over(self, corpus: Corpus | Sequence[str] | None) -> FittedRAML:
        """The same network over other passages; None: over none."""
        learner: Any = self.learner
        if corpus is not None and not isinstance(corpus, Corpus):
            corpus = Corpus.of(corpus, learner.retriever, learner.copies)
        return replace(self, corpus=corpus)

    def write(self, folder: Path) -> None:
        super().write(folder)
        if self.corpus is not None:
            self.corpus.index.save(folder / "passages.safetensors")
            write_json(folder / "passages.json", list(self.corpus.passages))


@dataclass(frozen=True)
class Fused:
    vectors: Tensor  # (..., d)
    weights: Tensor  # (..., k + 1), the last of the empty slot
    gate: Tensor  # (..., d)


class Fusion(nn.Module):
    """(..., 1 + k, D) a text and its passages -> (..., d).  A passage of zeros is none.

    Vectors are scaled to the length sqrt(D), so that their entries are of the size that layers expect.
    """

    def __init__(self, size: int, options: RAML):
        super().__init__()
        d = options.dimensions
        self.dimensions, self.options = d, options
        self.own = nn.Linear(size, d)
        self.query, self.key = nn.Linear(size, d, bias=False), nn.Linear(size, d, bias=False)
        self.together = nn.Linear(4 * size, d)
        self.judge, self.score = nn.Linear(d, d), nn.Linear(d, 1, bias=False)
        self.empty = nn.Parameter(torch.zeros(()))
        self.value = nn.Linear(size + d if options.joint else size, d)
        self.gate = nn.Linear(size + d, d)
        self.norm = nn.LayerNorm(d)
        nn.init.constant_(self.norm.weight, (SPREAD / (2 * d)) ** 0.5)  # two random vectors are then SPREAD apart

    def forward(self, x: Tensor) -> Tensor:
        return self.fused(x).vectors

    def fused(self, x: Tensor) -> Fused:
        options = self.options
        x = F.normalize(x.to(self.own.weight.dtype), dim=-1) * x.shape[-1] ** 0.5
        h, p = x[..., 0, :], x[..., 1:, :]
        there = p.abs().sum(-1) > 0  # (..., k)
        if self.training and options.dropped:
            there = there & (torch.rand(h.shape[:-1]) >= options.dropped).to(x.device)[..., None]
        around = h[..., None, :].expand_as(p)
        views = p
        s = (self.query(around) * self.key(p)).sum(-1) / self.dimensions**0.5
        if options.joint:
            u = torch.tanh(self.together(torch.cat([around, p, around * p, (around - p).abs()], -1)))
            s = s + self.score(torch.tanh(self.judge(u))).squeeze(-1)
            views = torch.cat([p, u], -1)
        weights = self._weights(s, there)
        r = (weights[..., :-1, None] * self.value(views)).sum(-2)
        gate = torch.sigmoid(self.gate(torch.cat([h, r], -1))) if options.fusion == "attention" else torch.ones_like(r)
        return Fused(self.norm(self.own(h) + gate * r), weights, gate)

    def _weights(self, s: Tensor, there: Tensor) -> Tensor:
        """(..., k + 1) from scores and which passages there are (..., k); without any, the empty slot has it all."""
        some = there.any(-1, keepdim=True)
        if self.options.fusion == "mean":
            given = there.to(s.dtype)
            return torch.cat([given / given.sum(-1, keepdim=True).clamp_min(1), (~some).to(s.dtype)], -1)
        slot = self.empty.to(s.dtype).expand_as(some)
        if not self.options.empty_slot:
            slot = torch.where(some, -torch.inf, slot)
        return torch.cat([s.masked_fill(~there, -torch.inf), slot], -1).softmax(-1)


@dataclass(frozen=True)
class _Looked(TaskStream):
    """A stream whose inputs are texts with their passages."""

    stream: TaskStream
    learner: RAML
    corpus: Corpus | None

    def whole(self) -> TaskStream:
        """Episodes of one pool look everything up once; other streams task by task."""
        if not isinstance(self.stream, Episodes):
            return self
        other = self.stream.query_from
        return self.stream.over(self._found(self.stream.pool).x, None if other is None else self._found(other).x)

    def __len__(self) -> int:
        return len(self.stream)

    def task(self, index: int) -> Task:
        task = self.stream.task(index)
        return replace(task, support=self._found(task.support), query=self._found(task.query))

    def _found(self, examples: Examples) -> Examples:
        return replace(examples, x=self.learner.look_up(examples.x, self.corpus)[0])


def entropy(weights: Tensor) -> Tensor:
    """(...) nats of weights (..., k + 1); those that are 0 add nothing, and no NaN to the gradient."""
    return -(weights * weights.clamp_min(1e-12).log()).sum(-1)


def contrastive(vectors: Tensor, labels: Tensor, temperature: float = 0.1) -> Tensor:
    """Supervised contrastive loss within each episode, of vectors (E, T, d) and labels (E, T).

    Khosla et al. 2020 (arXiv:2004.11362), their L_out; a vector alone in its class has no positive and is left out.
    """
    z = F.normalize(vectors, dim=-1)
    self_pairs = torch.eye(z.shape[1], dtype=torch.bool, device=z.device)
    log_shares = (z @ z.transpose(1, 2) / temperature).masked_fill(self_pairs, -torch.inf).log_softmax(-1)
    positive = (labels[:, :, None] == labels[:, None]) & ~self_pairs
    counts = positive.sum(-1)
    each = -torch.where(positive, log_shares, 0.0).sum(-1) / counts.clamp_min(1)
    return each[counts > 0].mean() if bool((counts > 0).any()) else vectors.sum() * 0


def _unit(vectors: np.ndarray) -> np.ndarray:
    lengths = np.linalg.norm(vectors, axis=1, keepdims=True)
    return vectors / np.maximum(lengths, 1e-12)
