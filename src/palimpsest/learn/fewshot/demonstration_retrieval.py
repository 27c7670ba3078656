"""Demonstration retrieval: a reader is meta-trained on many tasks, with answered examples fetched from a bank.

"Meta-training with Demonstration Retrieval for Efficient Few-shot Learning", 2023 (arXiv:2307.00119).  For each input a
frozen dense retriever fetches the K nearest rows of a bank of examples of any task; the reader, an encoder-decoder,
reads each of them before the input, and the readings are mixed at every token by the retriever's weights.  What it
knows then stands in the bank, where it can be swapped or deleted.  Needs: tasks of texts, and a bank that says
something about their answers.  Offered in Python alone: ``palimpsest learn few-shot`` hands out vectors, not texts.
Shapes: B inputs, K demonstrations of each, P rows of the bank, O options of a task.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import ClassVar, Literal

import numpy as np
import torch
from torch import Tensor, nn

from palimpsest.core.errors import InputError, unknown
from palimpsest.core.files import write_json
from palimpsest.core.methods import method
from palimpsest.core.seeds import numpy_rng
from palimpsest.core.watch import Watch
from palimpsest.data.episodes import Episodes
from palimpsest.data.tasks import Task, TaskStream
from palimpsest.data.text_tasks import TextTask
from palimpsest.learn.learner import Learner
from palimpsest.models.encoder import PACKAGED
from palimpsest.models.features import vectors_of
from palimpsest.models.retrieval import NONE, DenseIndex, overlapping, plain
from palimpsest.models.seq2seq import Marginal, Seq2Seq, decoded, encoded, marginal_logprobs, mixed

DEMONSTRATIONS = ("retrieved", "random", "none")
_AT_ONCE = 64  # inputs answered together


@dataclass(frozen=True)
class Demonstration:
    """An answered example of some task."""

    question: str
    answer: str
    context: str = ""
    task: str = ""

    def text(self, mask: str = "") -> str:
        """As the reader sees it; with `mask` in the place of the answer it is a question.

        The context comes last, for what is too long loses its end.
        """
        context = f" \n context: {self.context}" if self.context else ""
        return f"question: {self.question} \n answer: {mask or self.answer}{context} \n "

    @property
    def key(self) -> str:
        """What it is found by: never its answer, which would be a hint at the answer of the input."""
        return f"{self.question} {self.context}".strip()


@dataclass(frozen=True, eq=False)
class Bank:
    """Demonstrations and their vectors (P, D)."""

    rows: tuple[Demonstration, ...]
    index: DenseIndex

    @staticmethod
    def of(rows: Sequence[Demonstration], retriever: str = PACKAGED) -> Bank:
        """Embed demonstrations; InputError for none, or for a row that is not one, with its number."""
        for number, row in enumerate(rows):
            if not isinstance(row, Demonstration) or not row.question.strip() or not row.answer.strip():
                raise InputError(f"row {number} of the bank is {row!r:.60}; wanted a Demonstration with its answer")
        if not len(rows):
            raise InputError("the bank is empty: there is no demonstration to retrieve")
        return Bank(tuple(rows), DenseIndex(vectors_of([row.key for row in rows], retriever)))

    def without(self, rows: Sequence[int]) -> Bank:
        """The bank with some rows deleted: nothing of them is left."""
        gone = set(rows)
        kept = tuple(row for number, row in enumerate(self.rows) if number not in gone)
        return Bank(kept, self.index.without(rows))

    def without_overlap(self, texts: Sequence[str], words: int = 8) -> Bank:
        """The bank without rows that share a run of words with one of `texts`, as evaluation sets demand."""
        return self.without(np.flatnonzero(overlapping([row.key for row in self.rows], texts, words)).tolist())

    def same(self, question: str) -> list[int]:
        """The rows that ask this very question, but for case and punctuation."""
        return self._asked.get(plain(question), [])

    @cached_property
    def _asked(self) -> dict[tuple[str, ...], list[int]]:
        found: dict[tuple[str, ...], list[int]] = {}
        for number, row in enumerate(self.rows):
            found.setdefault(plain(row.key), []).append(number)
        return found


@dataclass(frozen=True, eq=False)
class Shown:
    """What B inputs were given: rows of the bank (B, K), -1 for none, and their weights (B, K)."""

    rows: np.ndarray
    weights: np.ndarray


@method(verb="learn", paper="demonstration_retrieval")
@dataclass(frozen=True, kw_only=True)
class DemonstrationRetrieval(Learner):
    """Meta-train an encoder-decoder to answer with demonstrations retrieved from a bank, and tune it on few examples.

    Learning rate and batch are for a pretrained reader; a small one built here (`reader` empty) wants `lr` = 1e-3.
    """

    inputs: ClassVar[tuple[str, ...]] = ("texts",)
    answers_none: ClassVar[bool] = False

    reader: str = ""  # an encoder-decoder's folder or name; empty: a small T5 with fresh weights
    width: int = 64  # of the one built here, as are the next three
    layers: int = 2
    heads: int = 4
    vocab_size: int = 1024
    retriever: str = PACKAGED
    demonstrations: Literal["retrieved", "random", "none"] = "retrieved"
    count: int = 5  # K
    temperature: float = 0.05  # of the weights; cosines are divided by it
    marginal: Marginal = "token"
    repeat_question: bool = True  # the target is the question with its answer, as in the paper, not the answer alone
    max_length: int = 256  # tokens read at once
    answer_length: int = 128  # tokens written, with the question where it is repeated
    steps: int = 2000
    batch_size: int = 16
    lr: float = 5e-5
    tuning_steps: int = 100  # on the support of a new task
    tuning_lr: float = 5e-5
    seed: int = 0

    def __post_init__(self) -> None:
        if self.demonstrations not in DEMONSTRATIONS:
            raise unknown("demonstrations", self.demonstrations, DEMONSTRATIONS)
        if self.marginal not in ("token", "sequence"):
            raise unknown("marginal", self.marginal, ("token", "sequence"))
        if self.count < 1 or self.temperature <= 0 or min(self.steps, self.tuning_steps) < 0:
            raise InputError(
                f"count={self.count}, temperature={self.temperature}, steps={self.steps}, "
                f"tuning_steps={self.tuning_steps} are out of range"
            )
        if self.batch_size < 1 or self.max_length < 8 or self.answer_length < 2:
            sizes = f"batch_size={self.batch_size}, max_length={self.max_length}, answer_length={self.answer_length}"
            raise InputError(f"{sizes}: too small")

    def meta_fit(
        self,
        stream: TaskStream | Sequence[TextTask],
        *,
        bank: Bank | Sequence[Demonstration] | None = None,
        watch: Watch | None = None,
    ) -> FittedReader:
        """Train on the tasks of `stream`, each drawn equally often.  Without a `bank` their examples are one."""
        tasks = [examples_of(task) for task in mixture(stream)]
        every = [one for task in tasks for one in task]
        if bank is None or not isinstance(bank, Bank):
            bank = Bank.of(every if bank is None else bank, self.retriever)
        reader = Seq2Seq.load(self.reader) if self.reader else self._built([*every, *bank.rows])
        fitted = FittedReader(self, reader, bank)
        if self.steps:
            Training(fitted, reader, tasks).run("meta-training", self.steps, self.lr, watch)
        return fitted

    def _built(self, rows: Sequence[Demonstration]) -> Seq2Seq:
        size = {"width": self.width, "layers": self.layers, "heads": self.heads, "vocab_size": self.vocab_size}
        return Seq2Seq.build([row.text() for row in rows], seed=self.seed, **size)

    def read(self, folder: Path) -> FittedReader:
        rows = json.loads((folder / "bank.json").read_text(encoding="utf-8"))
        bank = Bank(tuple(Demonstration(**row) for row in rows), DenseIndex.load(folder / "bank.safetensors"))
        return FittedReader(self, Seq2Seq.load(folder), bank)


@dataclass(frozen=True, eq=False)
class FittedReader:
    """A meta-trained reader and its bank."""

    learner: DemonstrationRetrieval
    reader: Seq2Seq
    bank: Bank

    def adapt(self, task: Task | TextTask, *, watch: Watch | None = None) -> ReaderPredictor:
        """A copy of the reader tuned on the task's examples, with demonstrations from the bank, never from these.

        Raises InputError for a task that cannot be learnt (`Task.check`, `TextTask`).
        """
        known = TextTask.of(task)
        reader = self.reader
        if self.learner.tuning_steps:
            reader = reader.copy()
            tuning = Training(self, reader, [examples_of(known)], "tuning")
            tuning.run("tuning", self.learner.tuning_steps, self.learner.tuning_lr, watch or Watch(progress=False))
        return ReaderPredictor(self, reader, known.options)

    def over(self, bank: Bank | Sequence[Demonstration]) -> FittedReader:
        """The same reader over another bank."""
        return replace(self, bank=bank if isinstance(bank, Bank) else Bank.of(bank, self.learner.retriever))

    def shown(self, asked: Sequence[Demonstration]) -> Shown:
        """The demonstrations for each input: the nearest, or random ones; never the same question."""
        learner, bank = self.learner, self.bank
        if learner.demonstrations == "none":
            return Shown(np.full((len(asked), 1), NONE), np.ones((len(asked), 1)))
        barred = [bank.same(one.key) for one in asked]
        if learner.demonstrations == "random":
            rows = np.full((len(asked), learner.count), NONE)
            for line, (one, out) in enumerate(zip(asked, barred, strict=True)):
                drawn = numpy_rng(learner.seed, "random", one.key).permutation(len(bank.rows))
                drawn = drawn[~np.isin(drawn, out)][: learner.count]
                rows[line, : len(drawn)] = drawn
            scores = np.where(rows == NONE, -np.inf, 0.0)
        else:
            found = bank.index.search(vectors_of([one.key for one in asked], learner.retriever), learner.count, barred)
            rows, scores = found.rows, found.scores / learner.temperature
        scores[(rows == NONE).all(1), 0] = 0.0  # nothing to show: the question stands alone
        raised = np.exp(scores - scores.max(1, keepdims=True))
        return Shown(rows, raised / raised.sum(1, keepdims=True))

    def batch(self, reader: Seq2Seq, asked: Sequence[Demonstration], shown: Shown) -> dict[str, Tensor]:
        """What the reader reads: `input_ids`, `attention_mask` (B, K, T) and `log_weights` (B, K)."""
        rows = self.bank.rows
        documents = [["" if row == NONE else rows[row].text() for row in line] for line in shown.rows]
        read = reader.read(documents, [one.text(reader.mask) for one in asked], self.learner.max_length)
        return read | {"log_weights": torch.from_numpy(shown.weights).float().log()}

    def target(self, one: Demonstration) -> str:
        return f"question: {one.question} \n answer: {one.answer}" if self.learner.repeat_question else one.answer

    def write(self, folder: Path) -> None:
        self.reader.save(folder)
        self.bank.index.save(folder / "bank.safetensors")
        write_json(folder / "bank.json", [asdict(row) for row in self.bank.rows])


@dataclass(frozen=True, eq=False)
class Training:
    """Batches from several tasks, each as often as the others; what is shown is looked up once, before training."""

    fitted: FittedReader
    reader: Seq2Seq
    tasks: list[list[Demonstration]]
    name: str = "meta-training"

    def run(self, name: str, steps: int, lr: float, watch: Watch | None) -> None:
        learner = self.fitted.learner

        def loss(model: nn.Module, batch: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
            logp = marginal_logprobs(model, batch, batch["log_weights"], batch["labels"], learner.marginal)
            weights = batch["log_weights"].exp()
            spread = -(weights * batch["log_weights"].clamp_min(-1e9)).sum(1).mean()
            return -logp.sum() / (batch["labels"] >= 0).sum(), {"weights_entropy": spread}

        (watch or Watch()).fit(
            name,
            self.reader.model,
            loss,
            self,
            steps=steps,
            lr=lr,
            schedule="linear",
            warmup=steps // 16,
            precision="fp32",
            seed=learner.seed,
            identity=f"{learner} {name}",
        )
        self.reader.model.eval()

    @cached_property
    def _shown(self) -> list[Shown]:
        return [self.fitted.shown(task) for task in self.tasks]

    def __call__(self, step: int) -> dict[str, Tensor]:
        rng = numpy_rng(self.fitted.learner.seed, self.name, step)
        of = rng.integers(len(self.tasks), size=self.fitted.learner.batch_size)
        places = [int(rng.integers(len(self.tasks[task]))) for task in of]
        asked = [self.tasks[task][place] for task, place in zip(of, places, strict=True)]
        rows, weights = (
            np.stack([getattr(self._shown[task], part)[place] for task, place in zip(of, places, strict=True)])
            for part in ("rows", "weights")
        )
        labels = self.reader.targets([self.fitted.target(one) for one in asked], self.fitted.learner.answer_length)
        return self.fitted.batch(self.reader, asked, Shown(rows, weights)) | {"labels": labels}


@dataclass(frozen=True, eq=False)
class ReaderPredictor:
    """A tuned reader.  Calling it chooses among the task's options; `answers` writes freely."""

    fitted: FittedReader
    reader: Seq2Seq
    options: tuple[str, ...]

    def __call__(self, x: Sequence[str]) -> np.ndarray:
        return self.logprobs(x).argmax(1)

    def logprobs(self, x: Sequence[str]) -> np.ndarray:
        """(B, O) of each option as the answer to each of B texts.  Raises InputError for a task without options."""
        if not self.options:
            raise InputError("the task has no options to choose among: ask for `answers`")
        asked, learner, model = _asked(x), self.fitted.learner, self.reader.model
        found = []
        for start in range(0, len(asked), _AT_ONCE):
            some = asked[start : start + _AT_ONCE]
            batch = self.fitted.batch(self.reader, some, self.fitted.shown(some))
            with torch.no_grad():
                states = encoded(model, batch)
                columns = []
                for option in self.options:
                    wanted = [self.fitted.target(replace(one, answer=option)) for one in some]
                    labels = self.reader.targets(wanted, learner.answer_length)
                    written = model.prepare_decoder_input_ids_from_labels(labels=labels)
                    logits = decoded(model, states, batch["attention_mask"], written)
                    columns.append(mixed(logits, batch["log_weights"], labels, learner.marginal))
            found.append(torch.stack(columns, 1).double().numpy())
        return np.concatenate(found)

    def answers(self, x: Sequence[str]) -> list[str]:
        """The text written for each of B texts, greedily under the mixture."""
        asked, found = _asked(x), []
        for start in range(0, len(asked), _AT_ONCE):
            some = asked[start : start + _AT_ONCE]
            batch = self.fitted.batch(self.reader, some, self.fitted.shown(some))
            written = self.reader.generate(batch, batch["log_weights"], most=self.fitted.learner.answer_length)
            found += [text.split("answer:")[-1].strip() for text in written]
        return found

    def shown(self, x: Sequence[str]) -> Shown:
        """Which rows of the bank the answers rest on."""
        return self.fitted.shown(_asked(x))


def mixture(stream: TaskStream | Sequence[TextTask]) -> list[TextTask]:
    """The tasks to train on; of episodes their whole pool is one.  Raises InputError where inputs are not texts."""
    if isinstance(stream, Episodes):
        pools = [pool for pool in (stream.pool, stream.query_from) if pool is not None]
        return [TextTask.of(Task(pool, pool, name=f"pool {number}")) for number, pool in enumerate(pools)]
    if isinstance(stream, TaskStream):
        return [
            replace(TextTask.of(task), examples=TextTask.of(task).examples + TextTask.of(_turned(task)).examples)
            for task in stream
        ]
    tasks = list(stream)
    if not tasks or not all(isinstance(task, TextTask) for task in tasks):
        raise InputError("wanted a stream of tasks of texts, or TextTasks, at least one")
    return tasks


def _turned(task: Task) -> Task:
    """Its query as the support: in meta-training both are known."""
    known = task.query.take(np.flatnonzero(task.query.y < task.way))
    return replace(task, support=known)


def examples_of(task: TextTask) -> list[Demonstration]:
    return [Demonstration(question, answer, task=task.name) for question, answer in task.examples]


def _asked(x: Sequence[str]) -> list[Demonstration]:
    for number, text in enumerate(x):
        if not isinstance(text, str) or not text.strip():
            raise InputError(f"input {number} is {text!r:.40}; wanted a text")
    return [Demonstration(text, "") for text in x]
