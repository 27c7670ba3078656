"""MachineLearningLM: continue a language model's pretraining on synthetic tables until it classifies rows in context.

Dong et al. 2025 (arXiv:2509.06806).  Tables come without end from random causal models (data/tables.py); the first
steps see a few that a random forest can solve (`warm_start`).  Adapting to a table changes no weight: its labelled rows
are the context, many queries are answered together, and several orders of rows, columns and labels vote by confidence.
Needs: nothing, or any causal `LM` to go on from.  Cannot: regression, free text, more classes than it was trained on.
Shapes: S labelled rows, Q queries, D columns of a table, F columns the model takes, V votes.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np
import torch
from torch import Tensor

from palimpsest.core.errors import InputError, unknown
from palimpsest.core.files import write_json
from palimpsest.core.losses import nll
from palimpsest.core.methods import method
from palimpsest.core.seeds import numpy_rng
from palimpsest.core.watch import Watch
from palimpsest.data.ahead import ahead
from palimpsest.data.batches import Batch
from palimpsest.data.tables import IGNORE, Tables
from palimpsest.data.tasks import Task
from palimpsest.learn.incontext import json_labels, table_prompts
from palimpsest.learn.incontext.packed_rows import PackedRows, column_vectors, fresh, packed_loss
from palimpsest.learn.incontext.warm_start import Pool
from palimpsest.learn.learner import Learner
from palimpsest.models.adapt import finished, trainable_copy
from palimpsest.models.lm import LM
from palimpsest.models.storage import save_model

Vote = tuple[np.ndarray, np.ndarray, np.ndarray]  # orders of rows (S,), columns (at most F) and classes (way,)

_LAYOUTS = ("packed", "prompt")
_TOGETHER = 256  # queries of one pass over packed rows
_COLUMNS = "columns.safetensors"


@method(verb="learn", paper="machinelearninglm")
@dataclass(frozen=True)
class MachineLearningLM(Learner):
    """Continue the pretraining of a causal language model on synthetic tables, then classify rows in its context.

    `layout` says how a table reaches the model: "prompt" writes it as the paper does, "packed" folds each row into one
    position, which a small model learns in a minute.  `base` (of `models.configs`) is made afresh where no model is
    given.
    """

    layout: Literal["packed", "prompt"] = "packed"
    base: str = "llama-tiny"
    steps: int = 3000
    lr: float = 2e-3  # for small models whole; the paper's 7B with LoRA: 1e-5 to warm up, then 1e-6
    rank: int = 0  # of LoRA on all linear layers; the paper's is 8; 0 trains every weight
    warm_share: float = 0.25  # of the steps, on the pool
    pool: int = 200  # tables of the warm start
    alpha: float = 0.2  # level of the test that keeps a table in the pool
    votes: int = 8
    together: int = 50  # queries of one prompt
    seed: int = 0

    inputs: ClassVar[tuple[str, ...]] = ("tables",)

    def __post_init__(self) -> None:
        if self.layout not in _LAYOUTS:
            raise unknown("layout", self.layout, _LAYOUTS)
        if not 0 <= self.warm_share <= 1:
            raise InputError(f"warm_share must lie between 0 and 1, not {self.warm_share}")
        if not 0 < self.alpha < 1:
            raise InputError(f"alpha must lie between 0 and 1, not {self.alpha}")
        for name in ("steps", "pool", "votes", "together"):
            if getattr(self, name) < 1:
                raise InputError(f"{name} must be at least 1, not {getattr(self, name)}")

    def meta_fit(self, stream: Tables, *, watch: Watch | None = None, lm: LM | None = None) -> TabularLM:  # type: ignore[override]  # tables are no `TaskStream` of episodes
        """Train on the tables of steps 0 .. `steps` - 1; the first `warm_share` of them come from the pool.

        `lm` is where to start from, and is not changed.  Raises `InputError` for more than 10 classes, a guarded model,
        and a tokenizer that does not write numbers (packed) or labels as single tokens.
        """
        if stream.labels > table_prompts.LABELS:
            raise InputError(f"tables of up to {stream.labels} classes: a label is one digit, so 10 are the most")
        if lm is not None and lm.guard is not None:
            raise InputError("a guarded model cannot be trained on tables: its guard must see the prompts")
        start = lm or fresh(self.base, self.seed)
        work: Any = trainable_copy(start, rank=self.rank, alpha=2 * self.rank, seed=self.seed)
        trained, columns = work, None
        source: Any = Staged(int(self.steps * self.warm_share), self._pool(stream), stream)
        loss: Any = packed_loss
        if self.layout == "packed":
            width = work.get_input_embeddings().embedding_dim
            trained = PackedRows(
                work, start.tokenizer, column_vectors(stream.features, width, self.seed), stream.labels
            )
        else:
            json_labels.check(start, stream.labels)
            source, loss = Prompted(source, start), nll
        with ahead(source) as batches:
            (watch or Watch()).fit(
                "continued pretraining",
                trained,
                loss,
                batches,
                steps=self.steps,
                lr=self.lr,
                warmup=self.steps // 20,
                schedule="cosine",
                seed=self.seed,
                identity=[self.layout, stream.sha256, self.warm_share, self.pool, self.alpha],
            )
        if isinstance(trained, PackedRows):
            columns = trained.columns.detach().cpu()
        return TabularLM(self, finished(start, work), columns, stream.features, stream.labels)

    def _pool(self, stream: Tables) -> Any:
        warm = int(self.steps * self.warm_share)
        if not warm:
            return None
        # the middle of the numbers of shots, which are log-uniform
        shots = round((stream.shots[0] * stream.shots[1]) ** 0.5)
        return Pool(stream, min(self.pool, warm * stream.batch_size), shots, self.alpha, self.seed).build()

    def read(self, folder: Path) -> TabularLM:
        from safetensors.torch import load_file

        found = json.loads((folder / "table.json").read_text(encoding="utf-8"))
        columns = load_file(folder / _COLUMNS)["columns"] if (folder / _COLUMNS).exists() else None
        return TabularLM(self, LM.load(folder), columns, **found)


@dataclass(frozen=True)
class Staged:
    """The batches of `first` for so many steps, then those of `then`."""

    steps: int
    first: Any
    then: Any

    def __call__(self, step: int) -> Any:
        return self.first(step) if step < self.steps else self.then(step)


@dataclass(frozen=True, eq=False)
class Prompted:
    """Batches of tables written as prompts with their answers; queries that are not to be asked are left out."""

    tables: Any
    lm: LM

    def __call__(self, step: int) -> Batch:
        batch = self.tables(step)
        shots, pairs = batch["shots"], []
        for x, y, present in zip(batch["x"].numpy(), batch["y"].numpy(), batch["present"].numpy(), strict=True):
            asked = np.flatnonzero(y[shots:] != IGNORE) + shots
            if not len(asked):
                continue
            x = x[:, present]
            context, queries = (table_prompts.integers(x[rows], x[:shots]) for rows in (slice(shots), asked))
            question = table_prompts.prompt(context, y[:shots].tolist(), queries, int(y[:shots].max()) + 1)
            pairs.append((question, table_prompts.answer(y[asked].tolist())))
        encoded = self.lm.encode(pairs)
        if encoded.lengths.max() >= self.lm.max_length:
            raise InputError(
                f"a prompt of {shots} rows does not fit the model's context of {self.lm.max_length} tokens: "
                "choose fewer shots, queries or columns"
            )
        return encoded.batch(range(len(encoded)))


@dataclass(frozen=True, eq=False)
class TabularLM:
    """A trained model; `adapt` to a table only stores its labelled rows."""

    learner: MachineLearningLM
    lm: LM
    columns: Tensor | None  # (F, W) of packed rows
    features: int  # columns that reach the model at once
    classes: int  # the most that a table may have

    def adapt(self, task: Task) -> TablePredictor:
        """A predictor that answers from the task's support, (S, D) numbers.  Raises as `Task.check` and `predictor`."""
        support = task.check().support
        return self.predictor(support.x, support.y, task.way)

    def predictor(self, x: Any, y: Any, way: int) -> TablePredictor:
        """Of labelled rows: x (S, D) numbers in which NaN is a missing one, y (S,) in [0, `way`).

        Raises `InputError` for too many classes, rows of one class, and rows without a column that varies.
        """
        return TablePredictor(self, np.asarray(x, dtype=np.float64), np.asarray(y), way)

    @cached_property
    def rows(self) -> PackedRows:
        """The model as a reader of packed rows."""
        assert self.columns is not None
        return PackedRows(self.lm.model, self.lm.tokenizer, self.columns, self.classes).eval()

    def write(self, folder: Path) -> None:
        from safetensors.torch import save_file

        save_model(self.lm.model, self.lm.tokenizer, folder)
        if self.columns is not None:
            save_file({"columns": self.columns.contiguous()}, folder / _COLUMNS)
        write_json(folder / "table.json", {name: getattr(self, name) for name in ("features", "classes")})


@dataclass(frozen=True, eq=False)
class TablePredictor:
    """A model with the labelled rows that it answers from."""

    fitted: TabularLM
    x: np.ndarray  # (S, D)
    y: np.ndarray  # (S,)
    way: int

    def __post_init__(self) -> None:
        if self.x.ndim != 2 or not self.x.shape[1]:
            raise InputError(f"rows must be numbers of shape (rows, columns), not {self.x.shape}")
        if self.way > self.fitted.classes:
            raise InputError(f"the table has {self.way} classes, the model knows {self.fitted.classes}")
        if len(np.unique(self.y)) < 2:
            raise InputError("the labelled rows are all of one class: there is nothing to tell apart")
        if np.isinf(self.x).any():
            raise InputError("the labelled rows hold infinite numbers")
        if not len(self.varying):
            raise InputError("every column of the labelled rows is constant: there is nothing to tell apart by")

    @cached_property
    def varying(self) -> np.ndarray:
        """The columns with two different numbers in the labelled rows; the others say nothing and are left out."""
        low = np.where(np.isnan(self.x), np.inf, self.x).min(0)
        high = np.where(np.isnan(self.x), -np.inf, self.x).max(0)
        return np.flatnonzero(low < high)

    def __call__(self, x: Any) -> np.ndarray:
        return self.probabilities(x).argmax(1)

    def probabilities(self, x: Any, *, votes: int | None = None) -> np.ndarray:
        """(Q, way) mean over the votes; each sees rows and columns in another order and classes numbered anew.

        Where the table is wider than the model, each vote takes columns of its own.
        """
        x = np.asarray(x, dtype=np.float64)
        if x.ndim != 2 or x.shape[1] != self.x.shape[1]:
            raise InputError(f"queries must have {self.x.shape[1]} columns, as the labelled rows do, not {x.shape}")
        if np.isinf(x).any():
            raise InputError("the queries hold infinite numbers")
        context, queries = (table_prompts.integers(part, self.x)[:, self.varying] for part in (self.x, x))
        ballots = [self._vote(number) for number in range(votes or self.fitted.learner.votes)]
        packed = self.fitted.columns is not None
        answers, together = (self._packed, _TOGETHER) if packed else (self._prompted, self.fitted.learner.together)
        parts = [np.zeros((0, self.way))]
        for first in range(0, len(queries), together):
            found = answers(context, queries[first : first + together], ballots)
            parts.append(voted(found, [classes for _, _, classes in ballots]))
        return np.concatenate(parts)

    def _vote(self, number: int) -> Vote:
        """The first vote leaves rows and classes as they are."""
        rng = numpy_rng(self.fitted.learner.seed, "vote", number)
        rows, columns, classes = (rng.permutation(size) for size in (len(self.x), len(self.varying), self.way))
        if number == 0:
            rows, classes = np.arange(len(rows)), np.arange(self.way)
        return rows, columns[: self.fitted.features], classes

    def _packed(self, context: np.ndarray, queries: np.ndarray, votes: list[Vote]) -> np.ndarray:
        """(V, Q, way): all votes are one batch."""
        fitted = self.fitted
        cells = np.full((len(votes), len(context) + len(queries), fitted.features), table_prompts.MIDDLE)
        for number, (order, columns, _) in enumerate(votes):
            cells[number, :, : len(columns)] = np.concatenate([context[order], queries])[:, columns]
        present = np.arange(fitted.features) < len(votes[0][1])
        labels = np.stack([classes[self.y[order]] for order, _, classes in votes])
        given = (cells, np.broadcast_to(present, (len(votes), fitted.features)).copy(), labels)
        with torch.inference_mode():
            logits = fitted.rows(*(torch.from_numpy(part).to(fitted.lm.device) for part in given))
        return logits[..., : self.way].double().softmax(-1).cpu().numpy()

    def _prompted(self, context: np.ndarray, queries: np.ndarray, votes: list[Vote]) -> np.ndarray:
        """(V, Q, way): a prompt for each vote."""
        found = []
        for order, columns, classes in votes:
            labels = classes[self.y[order]].tolist()
            question = table_prompts.prompt(context[order][:, columns], labels, queries[:, columns], self.way)
            found.append(json_labels.probabilities(self.fitted.lm, question, len(queries), self.way))
        return np.stack(found)


def voted(found: np.ndarray, numbering: list[np.ndarray]) -> np.ndarray:
    """(Q, way) mean of (V, Q, way) probabilities; vote v calls the class c by the label ``numbering[v][c]``."""
    return np.mean([one[:, classes] for one, classes in zip(found, numbering, strict=True)], axis=0)
