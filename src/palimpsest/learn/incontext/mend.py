"""MEND: a small model reads the demonstrations and writes a few vectors that stand for them in front of each query.

Li et al. 2024 (arXiv:2403.06914).  The large model is frozen; with the demonstrations as text it is the teacher, with
the vectors the student, and the distiller learns to make their answers alike, first on plain text, then on tasks.  A
new task costs one pass of the distiller.  Needs: a causal LM, tasks of texts, and plain text for the first stage.
`HyperTuning` (the same without the teacher) and `PromptTuning` (vectors without a reader) are its baselines.
Shapes: B rows, R tokens of demonstrations, T tokens of the query, m vectors, S and D hidden units of distiller and
model, N tokens that count, V words.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from palimpsest.core.errors import InputError, unknown
from palimpsest.core.methods import method
from palimpsest.core.seeds import numpy_rng
from palimpsest.core.watch import Watch
from palimpsest.data.tasks import Task
from palimpsest.data.text_tasks import Pair, TextTask, draw
from palimpsest.learn.incontext.distillation import (
    Distiller,
    Match,
    StaticVectors,
    distances,
    first_vectors,
    frozen,
    mean_over,
    negative_log_likelihoods,
)
from palimpsest.learn.incontext.prompting import Layout, PrefixPredictor
from palimpsest.learn.learner import Learner
from palimpsest.models.anatomy import base_of
from palimpsest.models.prefix import Prefix, embed, hidden, padded

if TYPE_CHECKING:
    from palimpsest.models.lm import LM

Batch = dict[str, Tensor]

_SHORTEST = 5  # tokens of a text that can be parted into context and query


@dataclass(frozen=True, eq=False)
class PromptedTasks:
    """What there is to learn from: the frozen model, tasks, plain texts for the first stage, and the distiller's start.

    `distiller`: a causal LM, by default `lm` itself; a copy of its decoder is trained.
    """

    lm: LM
    tasks: Sequence[TextTask]
    texts: Sequence[str] = ()
    distiller: LM | None = None


@method(verb="learn", paper="mend")
@dataclass(frozen=True)
class MEND(Learner):
    """Distil demonstrations into vectors in front of a frozen causal language model.

    The defaults are the paper's; it also stopped early on held-out tasks (`Watch.until`).  `steps` is the second stage,
    on tasks, with ``prediction_weight * NLL(outputs) + kl_weight * KL(teacher || student)``; `pretraining_steps` the
    first, on texts.  `match="hidden"` brings the last hidden states together in place of the answers (its ablation).
    """

    vectors: int = 100
    demonstrations: int = 16
    pretraining_steps: int = 30_000
    pretraining_lr: float = 5e-5
    pretrain_on: Literal["kl", "nll"] = "kl"
    context_share: float = 0.8  # of a text's tokens, which play the demonstrations
    steps: int = 30_000
    lr: float = 1e-5
    schedule: Literal["constant", "linear", "cosine"] = "linear"
    batch_size: int = 8
    kl_weight: float = 1.0
    prediction_weight: float = 1.0
    temperature: float = 1.0
    match: Match = "kl"
    separator: str = ""  # after each demonstration; the paper: none for GPT-2, two newlines for Llama
    read_tokens: int = 900  # of demonstrations, at most
    example_tokens: int = 256
    seed: int = 0

    inputs: ClassVar[tuple[str, ...]] = ("prompted",)
    family: ClassVar[str] = "in-context"

    def __post_init__(self) -> None:
        for name, known in (("match", ("kl", "hidden")), ("pretrain_on", ("kl", "nll"))):
            if getattr(self, name) not in known:
                raise unknown(name, getattr(self, name), known)
        for name in ("vectors", "demonstrations", "batch_size", "read_tokens", "example_tokens"):
            if getattr(self, name) < 1:
                raise InputError(f"{name} must be at least 1, not {getattr(self, name)}")
        if not 0 < self.context_share < 1 or self.temperature <= 0:
            raise InputError("context_share must lie between 0 and 1, and temperature above 0")
        if min(self.kl_weight, self.prediction_weight) < 0 or not self.kl_weight + self.prediction_weight:
            raise InputError("kl_weight and prediction_weight must not be negative, nor both be 0")

    def meta_fit(self, stream: PromptedTasks, *, watch: Watch | None = None) -> FittedMEND:  # type: ignore[override]
        """Train the distiller in two stages; the model is not changed.

        The traces keep `kl_input` and `kl_output`, the divergence at the tokens of the query's two parts, and `norm`,
        that of the vectors over that of the model's own embeddings.  Raises `InputError` for too many vectors, tasks
        without two examples, missing texts, and a guarded model.
        """
        fitted = FittedMEND(self, stream.lm, self.reader(stream), (stream.distiller or stream.lm).tokenizer)
        fitted.check(stream)
        watch = watch or Watch()
        common: dict[str, Any] = {"schedule": self.schedule, "seed": self.seed}
        with frozen(stream.lm.model):
            if self.pretraining_steps:
                texts = _Texts(fitted, stream.texts)
                weights = (1.0, 0.0) if self.pretrain_on == "kl" else (0.0, 1.0)
                watch.fit(
                    "pretraining",
                    fitted.reader,
                    _Loss(fitted, *weights),
                    texts,
                    steps=self.pretraining_steps,
                    lr=self.pretraining_lr,
                    main=False,
                    **common,
                )
            watch.fit(
                "meta-distillation",
                fitted.reader,
                _Loss(fitted, self.kl_weight, self.prediction_weight),
                _Tasks(fitted, stream.tasks),
                steps=self.steps,
                lr=self.lr,
                **common,
            )
        fitted.reader.eval()
        return fitted

    def reader(self, stream: PromptedTasks) -> nn.Module:
        """The untrained module that makes vectors of demonstrations."""
        start = stream.distiller or stream.lm
        base = base_of(start.model)
        body = copy.deepcopy(getattr(base, base.base_model_prefix)).requires_grad_(True)
        body.config.architectures = None  # it has no head; saving the model would name one
        return Distiller(body, self.vectors, table_of(stream.lm).shape[1], self.seed)

    def read(self, folder: Path) -> FittedMEND:
        from safetensors.torch import load_file
        from transformers import AutoConfig, AutoModel, AutoTokenizer

        from palimpsest.models.lm import LM

        lm = LM.load(folder / "lm")
        width = table_of(lm).shape[1]
        config = folder / "reader" / "config.json"
        reader: nn.Module
        if config.is_file():
            body = AutoModel.from_config(AutoConfig.from_pretrained(folder / "reader"))
            reader = Distiller(body, self.vectors, width, self.seed)
        else:
            reader = StaticVectors(torch.zeros(self.vectors, width))
        reader.load_state_dict(load_file(folder / "reader.safetensors"))
        return FittedMEND(self, lm, reader.eval(), AutoTokenizer.from_pretrained(folder / "reader"))


@method(verb="learn", paper="mend")
@dataclass(frozen=True)
class HyperTuning(MEND):
    """MEND's distiller without a teacher: both stages predict the next tokens (the paper's main baseline)."""

    pretrain_on: Literal["kl", "nll"] = "nll"
    kl_weight: float = 0.0


@method(verb="learn", paper="mend")
@dataclass(frozen=True)
class PromptTuning(MEND):
    """The same vectors for every task, trained to predict outputs: demonstrations are not read."""

    pretraining_steps: int = 0
    kl_weight: float = 0.0

    def reader(self, stream: PromptedTasks) -> nn.Module:
        return StaticVectors(first_vectors(table_of(stream.lm), self.vectors, self.seed))


def table_of(lm: LM) -> Tensor:
    """(V, D): the embeddings of a model's words."""
    return cast(Any, lm.model).get_input_embeddings().weight


@dataclass(frozen=True, eq=False)
class FittedMEND:
    """A trained distiller and the model that it writes for; `adapt` reads a task's demonstrations once."""

    learner: MEND
    lm: LM
    reader: nn.Module
    tokenizer: Any  # the reader's

    def check(self, stream: PromptedTasks) -> None:
        """Raises `InputError` where `stream` cannot be trained on."""
        if self.lm.guard is not None:
            raise InputError("a guarded model cannot be given vectors: its guard must see the prompts")
        if self.learner.vectors >= min(self.lm.max_length, self._window):
            raise InputError(f"{self.learner.vectors} vectors do not fit into the model's {self.lm.max_length} places")
        if not stream.tasks:
            raise InputError("there is no task to train on")
        short = next((task for task in stream.tasks if len(task.examples) < 2), None)
        if short is not None:
            raise InputError(f"task '{short.name}' has one example: wanted a demonstration and a query")

    @property
    def _window(self) -> int:
        body = getattr(self.reader, "body", None)
        limit = getattr(body.config.get_text_config(), "max_position_embeddings", None) if body is not None else None
        return int(limit or self.lm.max_length)

    @property
    def layout(self) -> Layout:
        """Of the model's tokens."""
        return Layout(self.lm.tokenizer, self.learner.separator, self.learner.example_tokens)

    @property
    def reading(self) -> Layout:
        """Of the reader's tokens."""
        return replace(self.layout, tokenizer=self.tokenizer)

    @property
    def room(self) -> int:
        """Tokens of demonstrations that are read at once."""
        return min(self.learner.read_tokens, self._window - self.learner.vectors)

    def compress(self, pairs: Sequence[Pair], *, whole: bool = False) -> Tensor:
        """(m, D) vectors for the demonstrations that can be read at once.

        `whole`: for all of them, m vectors for each part that can be read, one part after another (c m, D).
        """
        found: list[Tensor] = []
        rest = list(pairs)
        while rest or not found:
            shown = self.reading.demonstrations(rest, self.room)
            device = next(self.reader.parameters()).device
            read, mask = padded([self.reading.joined(shown)])
            with torch.no_grad():
                found.append(self.reader(read.to(device), mask.to(device))[0])
            rest = rest[len(shown) :] if whole else []
        return torch.cat(found)

    def adapt(self, task: TextTask | Task, *, whole: bool = False) -> PrefixPredictor:
        """A predictor behind the vectors of the task's first `demonstrations` examples; `whole`: of all its examples.

        Its answers are numbers of the task's options, or texts (`generate`) where there is none.
        """
        task = TextTask.of(task)
        shown = task.examples if whole else task.examples[: self.learner.demonstrations]
        vectors = self.compress(shown, whole=whole).to(table_of(self.lm).dtype)
        return PrefixPredictor(Prefix(self.lm, vectors), self.layout, task.options)

    def write(self, folder: Path) -> None:
        """The reader, its tokenizer, and the model: what was learnt is of no use without it."""
        from safetensors.torch import save_file

        self.lm.save(folder / "lm")
        self.tokenizer.save_pretrained(folder / "reader")
        if isinstance(self.reader, Distiller):
            self.reader.body.config.save_pretrained(folder / "reader")
        weights = {name: value.detach().cpu().contiguous().clone() for name, value in self.reader.state_dict().items()}
        save_file(weights, folder / "reader.safetensors")


@dataclass(frozen=True, eq=False)
class _Tasks:
    """Batches of the second stage: a task, a query of it and other examples as demonstrations, for each row."""

    fitted: FittedMEND
    tasks: Sequence[TextTask]

    def __call__(self, step: int) -> Batch:
        learner = self.fitted.learner
        rng = numpy_rng(learner.seed, "tasks", step)
        return batch_of(self.fitted, [draw(self.tasks, learner.demonstrations, rng) for _ in range(learner.batch_size)])


def batch_of(fitted: FittedMEND, rows: Sequence[tuple[Sequence[Pair], Pair]]) -> Batch:
    """Demonstrations and a query a row, as tokens; reader and teacher see the same demonstrations.

    Demonstrations are left out to fit the windows, the query never is.
    """
    layout, reading = fitted.layout, fitted.reading
    found = []
    for pairs, query in rows:
        question, answer = layout.pair(query)
        shown = layout.demonstrations(pairs, fitted.lm.max_length - len(question) - len(answer))
        read = reading.demonstrations(pairs, fitted.room)
        count = min(len(shown), len(read))
        found.append((reading.joined(read[:count]), layout.joined(shown[:count]), question, answer))
    return _padded(fitted, found)


@dataclass(frozen=True, eq=False)
class _Texts:
    """Batches of the first stage: the first part of a text plays the demonstrations, the rest the query."""

    fitted: FittedMEND
    texts: Sequence[str]

    @cached_property
    def _usable(self) -> list[str]:
        layout = self.fitted.layout
        usable = [text for text in self.texts if len(layout.tokens(text)) >= _SHORTEST]
        if not usable:
            raise InputError(
                f"the first stage needs plain texts of at least {_SHORTEST} tokens: give some, or pretraining_steps=0"
            )
        return usable

    def __call__(self, step: int) -> Batch:
        learner, layout = self.fitted.learner, self.fitted.layout
        rng = numpy_rng(learner.seed, "texts", step)
        room = min(int((self.fitted.room - 1) / learner.context_share), self.fitted.lm.max_length - len(layout.start))
        found = []
        for number in rng.integers(len(self._usable), size=learner.batch_size):
            ids = layout.tokens(self._usable[number])[:room]
            cut = min(len(ids) - 1, max(1, round(learner.context_share * len(ids))))
            read: Sequence[int] = ids[:cut]
            if self.fitted.tokenizer is not layout.tokenizer:
                read = self.fitted.reading.tokens(layout.tokenizer.decode(ids[:cut]))[: self.fitted.room - 1]
            found.append(([*self.fitted.reading.start, *read], [*layout.start, *ids[:cut]], (), ids[cut:]))
        return _padded(self.fitted, found)


def _padded(
    fitted: FittedMEND, rows: Sequence[tuple[Sequence[int], Sequence[int], Sequence[int], Sequence[int]]]
) -> Batch:
    """Rows of (what is read, what is shown, input, output) as tensors; all queries begin at the same place.

    `all` and `output`: (B, T) weights of the query's tokens whose weighted sum over B is a mean over the whole step's.
    """
    read, read_mask = padded([row[0] for row in rows], fitted.tokenizer.pad_token_id, left=True)
    shown, shown_mask = padded([row[1] for row in rows], fitted.lm.tokenizer.pad_token_id, left=True)
    query, query_mask = padded([[*row[2], *row[3]] for row in rows], fitted.lm.tokenizer.pad_token_id)
    output = query_mask * (torch.arange(query.shape[1]) >= torch.tensor([len(row[2]) for row in rows])[:, None])
    weights = {name: mask.float() * len(rows) / mask.sum() for name, mask in (("all", query_mask), ("output", output))}
    tokens = {"read": read, "read_mask": read_mask, "shown": shown, "shown_mask": shown_mask}
    return tokens | {"query": query, "query_mask": query_mask} | weights


@dataclass(frozen=True, eq=False)
class _Loss:
    """The distance of student and teacher, and the student's own prediction of outputs."""

    fitted: FittedMEND
    kl_weight: float
    prediction_weight: float

    def __call__(self, reader: nn.Module, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        learner, model = self.fitted.learner, self.fitted.lm.model
        vectors = reader(batch["read"], batch["read_mask"])
        model.to(vectors.device)  # where it is already, nothing happens
        query = embed(model, batch["query"])
        seen = torch.cat([vectors.to(query.dtype), query], dim=1)
        student = hidden(model, seen, F.pad(batch["query_mask"], (vectors.shape[1], 0), value=1))[
            :, vectors.shape[1] - 1 :
        ]
        size = query.norm(dim=-1)[batch["query_mask"].bool()].mean()
        logs = {"norm": (vectors.detach().norm(dim=-1).mean() / size).float()}
        value = vectors.new_zeros((), dtype=torch.float32)
        if self.kl_weight:
            shown = torch.cat([batch["shown"], batch["query"]], dim=1)
            mask = torch.cat([batch["shown_mask"], batch["query_mask"]], dim=1)
            with torch.no_grad():
                teacher = hidden(model, embed(model, shown), mask)[:, batch["shown"].shape[1] :]
            apart = distances(model, student[:, 1:], teacher, batch["all"] > 0, learner.match, learner.temperature)
            of_output = batch["output"] > 0
            logs |= {
                "kl_output": mean_over(apart, of_output),
                "kl_input": mean_over(apart, (batch["all"] > 0) & ~of_output),
            }
            value = value + self.kl_weight * (apart * batch["all"]).sum() / len(apart)
        if self.prediction_weight:
            nll = negative_log_likelihoods(model, student[:, :-1], batch["query"], batch["output"] > 0)
            logs["nll"] = mean_over(nll, batch["output"] > 0)
            value = value + self.prediction_weight * (nll * batch["output"]).sum() / len(nll)
        return value, logs
