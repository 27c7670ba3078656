"""What the episodic learners share: one loop over training episodes, one way to adapt, hundreds of episodes at once.

A learner of this room says how a network is built, how the queries of an episode are scored against its support, and
what the loss of that is.  Knows nothing of where episodes come from.
Shapes: E episodes, S supports of an episode, Q queries, N classes, d dimensions of the embedding.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional as F

from palimpsest.core.errors import InputError
from palimpsest.core.files import write_json
from palimpsest.core.methods import info_of
from palimpsest.core.seeds import seed_everything
from palimpsest.core.watch import Watch
from palimpsest.data.episodes import Episodes, Rows
from palimpsest.data.tasks import Task, TaskStream, pick
from palimpsest.learn.learner import Learner
from palimpsest.models.convnet import ConvNet, halves, network_for

Batch = dict[str, Tensor]

_EMBEDDED = 512  # inputs embedded at once when nothing is trained
_GRAM = 8192  # rows of the largest pool whose products are all computed: 256 MB
_LOOKED_UP = 128  # episodes whose products are looked up together
_SCORED = 2**19  # numbers of query embeddings scored at once: they stay in the processor's cache


class Network(nn.Module):
    """An encoder of inputs, and whatever else a learner trains beside it.  Views (B, V, D) are embedded one by one."""

    def __init__(self, encoder: nn.Module, **parts: nn.Module | nn.Parameter):
        super().__init__()
        self.encoder = encoder
        for name, part in parts.items():
            setattr(self, name, part)

    @property
    def dimensions(self) -> int:
        return int(self.encoder.dimensions)  # type: ignore[arg-type]

    def forward(self, x: Tensor) -> Tensor:
        """(..., shape of an input) -> (..., d)"""
        return self.encoder(x)


@dataclass(frozen=True, kw_only=True)
class Episodic(Learner):
    """An episodic learner: embed, compare the queries with the support, cross-entropy.

    `steps` = 0 trains nothing: the comparison then works on the inputs as given (features) or on a random network.
    """

    inputs: ClassVar[tuple[str, ...]] = ("features", "images")
    family: ClassVar[str] = "few-shot"
    norm: ClassVar[str] = "batch"
    fixed_way: ClassVar[bool] = False  # whether a task must have as many ways as the training episodes
    raw: ClassVar[bool] = False  # whether `scores` takes inputs as they are, in the place of embeddings
    by_products: ClassVar[bool] = False  # whether there are `product_scores`
    answers_none: ClassVar[bool] = False  # whether "none of them" is among its answers

    steps: int = 2000
    episodes: int = 1  # a step
    lr: float = 1e-3
    schedule: str = "cosine"
    weight_decay: float = 0.0
    width: int = 64  # channels of the ConvNet that embeds images
    augment: bool | None = None  # flip and shift training images; None: coloured ones, for characters do not bear it
    precision: str = "auto"  # of the ConvNet in training: fp32, bf16, or what suits the machine
    seed: int = 0

    def __post_init__(self) -> None:
        if self.steps < 0 or self.episodes < 1 or self.width < 1:
            raise InputError(f"steps={self.steps}, episodes={self.episodes}, width={self.width} cannot be trained with")

    # what a learner says

    def build(self, x: Any, way: int) -> nn.Module:
        """A fresh network for inputs like `x`, drawn from torch's global generator."""
        return Network(network_for(x, width=self.width, norm=self.norm))

    def scores(self, network: Any, support: Tensor, labels: Tensor, query: Tensor, way: int) -> Tensor:
        """Logits (E, Q, N), or (E, Q, N+1) with "none of them", from embeddings (E, S, d), labels (E, S), (E, Q, d)."""
        raise NotImplementedError

    def product_scores(self, products: Products) -> Tensor:
        """`scores` from dot products alone, of episodes with equal shots; only where `by_products` says so."""
        raise NotImplementedError

    def loss(self, network: Any, batch: Batch, way: int) -> Tensor | tuple[Tensor, dict[str, Tensor]]:
        """The loss of E episodes: inputs `support` (E, S, ...) and `query` (E, Q, ...), the labels of both, and the
        `number` of each in the stream."""
        support, query = embedded(network, batch)
        return cross_entropy(self.scores(network, support, batch["support_labels"], query, way), batch["labels"])

    # what all do

    def meta_fit(self, stream: TaskStream, *, watch: Watch | None = None) -> FittedEpisodic:
        """Train on the episodes 0, 1, 2 ... of the stream, `episodes` a step."""
        first = stream.task(0).check()
        if not self.answers_none and (first.query.y == first.way).any():
            raise InputError(
                f"{info_of(self).name} has no answer 'none of them': use nota=0, or a learner such as gpam"
            )
        x = stream.pool.x if isinstance(stream, Episodes) else first.support.x
        seed_everything(self.seed, "network")
        network = self.build(x, first.way)
        encoder = network.encoder
        if isinstance(encoder, ConvNet):
            encoder.bf16 = encoder.channels_last and halves(self.precision, _shape(x), self.width)
        if self.steps:
            batches = EpisodeBatches(stream, self.episodes)
            augment = np.ndim(x) == 4 and (x.shape[1] == 3 if self.augment is None else self.augment)

            def loss(network: nn.Module, batch: Batch) -> Any:
                return self.loss(network, augmented(batch) if augment else batch, first.way)

            (watch or Watch()).fit(
                "meta-training",
                network,
                loss,
                batches,
                steps=self.steps,
                lr=self.lr,
                schedule=self.schedule,
                weight_decay=self.weight_decay,
                precision="fp32",  # distances are differences of large numbers; the ConvNet has its own bf16
                seed=self.seed,
                identity=str(self),
            )
        return FittedEpisodic(self, network.eval(), _shape(x), first.way)

    def read(self, folder: Path) -> FittedEpisodic:
        """The `FittedEpisodic` written to `folder`."""
        spec = json.loads((folder / "network.json").read_text(encoding="utf-8"))
        shape = tuple(spec["shape"])
        blank = np.zeros((2, *shape), dtype=np.float32)
        network = self.build(blank, spec["way"])
        network.load_state_dict(load_file(folder / "network.safetensors"))
        return FittedEpisodic(self, network.eval(), shape, spec["way"])


@dataclass(frozen=True, eq=False)
class FittedEpisodic:
    """A meta-trained network with the learner that compares by it."""

    learner: Episodic
    network: nn.Module
    shape: tuple[int, ...]  # of one input
    way: int  # of the training episodes

    def adapt(self, task: Task) -> EpisodicPredictor:
        """Embed the support.  Raises InputError for a task that cannot be learnt or inputs of another shape."""
        task.check()
        if self.learner.fixed_way and task.way != self.way:
            raise InputError(
                f"{task.name or 'the task'} has {task.way} ways; the learner was trained on {self.way} ways"
            )
        support = self.embed(task.support.x)[None]
        labels = torch.from_numpy(task.support.y)[None]
        return EpisodicPredictor(self, support, labels, task.way)

    def embed(self, x: Any) -> Tensor:
        """(M, ...) inputs to (M, ..., d) embeddings."""
        x = _tensor(x)
        if tuple(x.shape[1:]) != self.shape:
            raise InputError(f"inputs have the shape {tuple(x.shape[1:])}; the learner was trained on {self.shape}")
        if x.is_floating_point() and not torch.isfinite(x).all():
            raise InputError("inputs have values that are NaN or infinite")
        if self.learner.raw:
            return x
        with torch.no_grad():
            pieces = [self.network(x[start : start + _EMBEDDED]) for start in range(0, len(x), _EMBEDDED)]
        return torch.cat(pieces) if pieces else torch.empty(0, 1)

    def logits(self, support: Tensor, labels: Tensor, query: Tensor, way: int) -> Tensor:
        """(E, Q, N or N+1) of embedded episodes."""
        with torch.no_grad():
            return self.learner.scores(self.network, support, labels, query, way)

    def answer(self, episodes: Episodes, rows: Rows) -> np.ndarray:
        """(E, Q, N or N+1) logits of many episodes: every example is embedded once, however often it is drawn."""
        return np.concatenate([logits.numpy() for logits in self._answers(episodes, rows)])

    def predict(self, episodes: Episodes, rows: Rows) -> np.ndarray:
        """(E, Q) labels of many episodes."""
        return np.concatenate([logits.argmax(-1).numpy() for logits in self._answers(episodes, rows)])

    def _answers(self, episodes: Episodes, rows: Rows) -> Iterator[Tensor]:
        if self.learner.fixed_way and episodes.way != self.way:
            raise InputError(f"episodes of {episodes.way} ways; the learner was trained on {self.way} ways")
        pool = self.embed(episodes.pool.x)
        asked = pool if episodes.query_from is None else self.embed(episodes.query_from.x)
        if self.learner.by_products and asked is pool and _products_pay(pool, rows):
            yield from map(self.learner.product_scores, _products(pool, rows))
            return
        labels = torch.arange(rows.support.shape[1]).repeat_interleave(rows.support.shape[2])
        support, query = torch.from_numpy(rows.support).flatten(1), torch.from_numpy(rows.query)
        size = max(1, _SCORED // (query.shape[1] * pool[0].numel()))
        for start in range(0, len(rows), size):
            part = slice(start, start + size)
            some = support[part]
            yield self.logits(pool[some], labels.expand(len(some), -1), asked[query[part]], rows.support.shape[1])

    def write(self, folder: Path) -> None:
        state = {name: value.contiguous() for name, value in self.network.state_dict().items()}
        save_file(state, folder / "network.safetensors")
        write_json(folder / "network.json", {"shape": list(self.shape), "way": self.way})


@dataclass(frozen=True, eq=False)
class EpisodicPredictor:
    """A task's support, embedded."""

    fitted: FittedEpisodic
    support: Tensor  # (1, S, ..., d)
    labels: Tensor  # (1, S)
    way: int

    def logits(self, x: Any) -> np.ndarray:
        """(Q, N or N+1): the last column of N+1 is "none of them"."""
        return self.fitted.logits(self.support, self.labels, self.fitted.embed(x)[None], self.way)[0].numpy()

    def __call__(self, x: Any) -> np.ndarray:
        return self.logits(x).argmax(-1)


@dataclass(frozen=True)
class EpisodeBatches:
    """``batches(step)``: the `size` episodes of a step as tensors, episodes first."""

    stream: TaskStream
    size: int

    def __call__(self, step: int) -> Batch:
        first = step * self.size
        if isinstance(self.stream, Episodes):
            numbers = torch.arange(first, first + self.size)
            return _gathered(self.stream, self.stream.rows(first, self.size)) | {"number": numbers}
        tasks = [self.stream.task(index).check() for index in range(first, first + self.size)]
        sizes = {(len(task.support), len(task.query), task.way) for task in tasks}
        if len(sizes) > 1:
            raise InputError(f"tasks {first} to {first + self.size - 1} differ in size: use episodes=1")
        return {
            "support": torch.stack([_tensor(task.support.x) for task in tasks]),
            "support_labels": torch.stack([torch.from_numpy(task.support.y) for task in tasks]),
            "query": torch.stack([_tensor(task.query.x) for task in tasks]),
            "labels": torch.stack([torch.from_numpy(task.query.y) for task in tasks]),
            "number": torch.arange(first, first + self.size),
        }


def _gathered(episodes: Episodes, rows: Rows) -> Batch:
    _, way, shot = rows.support.shape
    labels = np.repeat(np.arange(way), shot)[None].repeat(len(rows), axis=0)
    return {
        "support": _tensor(pick(episodes.pool.x, rows.support.reshape(len(rows), -1))),
        "support_labels": torch.from_numpy(labels),
        "query": _tensor(pick((episodes.query_from or episodes.pool).x, rows.query)),
        "labels": torch.from_numpy(rows.labels),
    }


def embedded(network: nn.Module, batch: Batch) -> tuple[Tensor, Tensor]:
    """(E, S, ..., d) support and (E, Q, ..., d) query, through the network in one call."""
    support, query = batch["support"], batch["query"]
    z = network(torch.cat([support.flatten(0, 1), query.flatten(0, 1)]))
    cut = support.shape[0] * support.shape[1]
    return z[:cut].unflatten(0, support.shape[:2]), z[cut:].unflatten(0, query.shape[:2])


def cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy(logits.flatten(0, 1), labels.flatten())


@dataclass(frozen=True)
class Products:
    """Dot products of E embedded episodes with N ways of K shots."""

    query_support: Tensor  # (E, Q, N, K)
    support_support: Tensor  # (E, N, K, K), within each class
    query_query: Tensor  # (E, Q), of each query with itself


def _products_pay(pool: Tensor, rows: Rows) -> bool:
    """Whether all products of a pool are cheaper than gathering embeddings: of a small pool, drawn from often."""
    return pool.ndim == 2 and len(pool) <= _GRAM and len(pool) ** 2 <= 32 * rows.query.size


def _products(pool: Tensor, rows: Rows) -> Iterator[Products]:
    """The pool's products are computed once and looked up: an episode then reads numbers in the place of vectors."""
    with torch.no_grad():
        size = len(pool)
        gram = (pool @ pool.T).view(-1)
        support = torch.from_numpy(rows.support.astype(np.int32))
        query = torch.from_numpy(rows.query.astype(np.int32))
        for start in range(0, len(rows), _LOOKED_UP):
            s, q = support[start : start + _LOOKED_UP], query[start : start + _LOOKED_UP]
            places = (q * size)[:, :, None] + s.flatten(1)[:, None]
            own = (s * size)[..., None] + s[:, :, None]
            yield Products(
                gram.index_select(0, places.view(-1)).view(*q.shape, *s.shape[1:]),
                gram.index_select(0, own.view(-1)).view(own.shape),
                gram.index_select(0, (q * (size + 1)).view(-1)).view(q.shape),
            )


def class_means(support: Tensor, labels: Tensor, way: int) -> Tensor:
    """Prototypes (E, N, d): the mean of each class's supports (E, S, d); classes may differ in size."""
    members = F.one_hot(labels, way).to(support.dtype)  # (E, S, N)
    return (members / members.sum(1, keepdim=True)).transpose(1, 2) @ support


def squared_distances(query: Tensor, centres: Tensor) -> Tensor:
    """(E, Q, N) between (E, Q, d) and (E, N, d)."""
    cross = query @ centres.transpose(1, 2)
    return query.square().sum(-1, keepdim=True) - 2 * cross + centres.square().sum(-1)[:, None]


def augmented(batch: Batch) -> Batch:
    """Each image flipped or not and shifted by up to an eighth, drawn from torch's global generator."""
    return batch | {name: _moved(batch[name]) for name in ("support", "query")}


def _moved(x: Tensor) -> Tensor:
    flat = x.flatten(0, 1)
    height, width = flat.shape[-2:]
    reach = height // 8
    flat = torch.where(torch.rand(len(flat))[:, None, None, None] < 0.5, flat.flip(-1), flat)
    padded = F.pad(flat.float(), (reach, reach, reach, reach), mode="reflect").to(x.dtype)
    down, right = torch.randint(0, 2 * reach + 1, (2, len(flat))).tolist()
    moved = [image[:, d : d + height, r : r + width] for image, d, r in zip(padded, down, right, strict=True)]
    return torch.stack(moved).view_as(x)


def _tensor(x: Any) -> Tensor:
    x = torch.as_tensor(np.asarray(x) if isinstance(x, list | tuple) else x)
    return x.float() if x.dtype == torch.float64 else x


def _shape(x: Any) -> tuple[int, ...]:
    return tuple(np.shape(x)[1:])
