"""GPICL: meta-train a plain sequence model on projected, relabelled copies of a data set until it learns to learn.

Kirsch et al. 2022 (arXiv:2212.04458).  The model reads labelled examples one after another and predicts each next
label; its forward pass is the learning algorithm, and adapting changes no weight.  On few tasks it memorises them, on
very many it learns from the context; `diagnose` says which.  Needs: a stream of sequences of one length.
A small one does not beat the nearest neighbour on the same context: `context_baselines` gives that number.
Shapes: B sequences, T examples, X features, C classes, Q queries.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, ClassVar, Protocol

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from palimpsest.core.errors import InputError
from palimpsest.core.methods import method
from palimpsest.core.seeds import derive, numpy_rng
from palimpsest.core.watch import Watch
from palimpsest.data.ahead import ahead
from palimpsest.data.projections import BaseSet, ProjectedTasks, Projections, scaled, transform
from palimpsest.data.tasks import Task, TaskStream
from palimpsest.learn.learner import Learner
from palimpsest.models.sequences import Kind, SequenceConfig, SequenceModel, build, load, save

Batch = dict[str, Tensor]

_ADAM_EPSILON = 1e-8  # that of core.fit
_MARGIN = 0.1  # above chance by so much counts as learned
_UNSEEN = 2**40  # tasks numbered from here on are in no training stream


class Sequences(Protocol):
    """``stream(step)`` gives x (B, T, X) float and y (B, T) in [0, `labels`); a pure function of the step."""

    @property
    def labels(self) -> int: ...

    def __call__(self, step: int) -> Batch: ...


@method(verb="learn", paper="gpicl")
@dataclass(frozen=True)
class GPICL(Learner):
    """Meta-train a sequence model to predict the next label from the labelled examples before it.

    The defaults are the paper's transformer; `kind` chooses its baselines (``lstm``, ``fast-weights`` for the
    outer-product LSTM, ``vsml``).  A smaller `adam_epsilon` shortens the plateau at the start.  `features`, `length`
    and `batch_size` shape the sequences made of a stream of tasks; a stream of sequences (`Projections`) has its own.
    """

    kind: Kind = "transformer"
    width: int = 256
    layers: int = 4
    heads: int = 8
    features: int = 64  # the paper keeps the size of its images
    length: int = 100
    batch_size: int = 128
    steps: int = 50_000
    lr: float = 2e-4  # with epsilon and clip of the one replication; the paper's are not known
    adam_epsilon: float = 1e-10
    clip: float = 2.0
    seed: int = 0

    family: ClassVar[str] = "in-context"
    answers_none: ClassVar[bool] = False

    def __post_init__(self) -> None:
        if self.adam_epsilon <= 0:
            raise InputError(f"adam_epsilon must be positive, not {self.adam_epsilon}")
        for name in ("features", "length", "batch_size"):
            if getattr(self, name) < 1:
                raise InputError(f"{name} must be at least 1, not {getattr(self, name)}")

    def meta_fit(self, stream: TaskStream | Sequences, *, watch: Watch | None = None) -> InContextClassifier:
        """Train on the stream's batches 0 .. `steps` - 1.

        The trace keeps `late_accuracy`, that of the second half of the sequences: the plateau ends where it leaves
        chance.
        """
        if isinstance(stream, TaskStream):
            stream = ProjectedTasks(stream, self.features, self.length, self.batch_size, self.seed)
        first, labels = stream(0)["x"], stream.labels
        model = self.model(features=first.shape[2], classes=labels, length=first.shape[1])
        # Adam with epsilon e on a loss is Adam with epsilon c * e on c times the loss, and `fit` has one epsilon
        factor = _ADAM_EPSILON / self.adam_epsilon

        def loss(model: nn.Module, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
            logits = model(tokens(batch["x"], batch["y"], labels))
            value = F.cross_entropy(logits.flatten(0, 1), batch["y"].flatten())
            right = (logits.detach().argmax(-1) == batch["y"]).float()
            return factor * value, {"nll": value.detach(), "late_accuracy": right[:, right.shape[1] // 2 :].mean()}

        with ahead(stream) as batches:
            (watch or Watch()).fit(
                "meta-training",
                model,
                loss,
                batches,
                steps=self.steps,
                lr=self.lr,
                clip=factor * self.clip,
                seed=self.seed,
            )
        return InContextClassifier(self, model.eval())

    def model(self, features: int, classes: int, length: int) -> SequenceModel:
        """The untrained model for tasks of this shape."""
        return build(
            SequenceConfig(features + classes, classes, self.kind, self.width, self.layers, self.heads, length),
            self.seed,
        )

    def read(self, folder: Path) -> InContextClassifier:
        return InContextClassifier(self, load(folder))


@dataclass(frozen=True, eq=False)
class InContextClassifier:
    """A meta-trained model; `adapt` to a task only stores its examples."""

    learner: GPICL
    model: SequenceModel

    @property
    def classes(self) -> int:
        """The most classes that a task may have."""
        return self.model.config.outputs

    def adapt(self, task: Task) -> InContextPredictor:
        """A predictor that answers from the task's support, shuffled, scaled and projected as in training.

        Raises `InputError` for a task that cannot be learnt (`Task.check`), more classes or examples than the model was
        trained for, and inputs that are not finite numbers in rows of one length, with some spread.
        """
        support = task.check().support
        if task.way > self.classes:
            raise InputError(f"the task has {task.way} classes, the model knows {self.classes}")
        length = self.model.config.length
        if length and len(support) >= length:
            raise InputError(
                f"{len(support)} examples and a query need {len(support) + 1} places, but the model was trained on "
                f"sequences of {length}: give at most {length - 1} examples, or meta-train on longer sequences"
            )
        order = torch.from_numpy(numpy_rng(self.learner.seed, "order").permutation(len(support)))
        x, y = scaled(support.x, support.x)[order], torch.from_numpy(support.y)[order]
        features = self.model.config.inputs - self.classes
        matrix, _ = transform(x.shape[1], features, 1, derive(self.learner.seed, "adapt"))
        return InContextPredictor(self, support.x, task.way, matrix, x @ matrix.T, y)

    def logits(self, x: Tensor, y: Tensor) -> Tensor:
        """(B, T, C): at each position the prediction for it, having seen the labels before it."""
        with torch.inference_mode():
            return self.model(tokens(x, y, self.classes))

    def write(self, folder: Path) -> None:
        save(self.model, folder)


@dataclass(frozen=True, eq=False)
class InContextPredictor:
    """A model with the examples that it answers from."""

    fitted: InContextClassifier
    support: Any
    way: int
    matrix: Tensor  # (X, F)
    x: Tensor  # (n, X) projected
    y: Tensor  # (n,)

    def __call__(self, x: Any) -> np.ndarray:
        return self.probabilities(x).argmax(1)

    def probabilities(self, x: Any) -> np.ndarray:
        """(Q, way), all queries in one pass: each sees the examples and not the others."""
        queries = scaled(x, self.support) @ self.matrix.T
        classes, shots = self.fitted.classes, len(self.x)
        last = F.one_hot(self.y[-1:], classes).to(queries.dtype).expand(len(queries), classes)
        shown = tokens(self.x[None], self.y[None], classes)
        whole = torch.cat([shown, torch.cat([queries, last], dim=1)[None]], dim=1)
        with torch.inference_mode():
            return self.fitted.model(whole, context=shots)[0, shots:, : self.way].softmax(-1).double().numpy()


def tokens(x: Tensor, y: Tensor, classes: int) -> Tensor:
    """(B, T, X + C): each input beside the label of the example before it, which for the first is all zeros."""
    labels = F.one_hot(y[:, :-1], classes).to(x.dtype)
    return torch.cat([x, F.pad(labels, (0, 0, 1, 0))], dim=2)


@dataclass(frozen=True)
class Curve:
    """Accuracy by position in the sequence: 0 is before any example, chance on tasks never seen."""

    accuracy: tuple[float, ...]  # T

    @property
    def first(self) -> float:
        """Over the first two positions."""
        return sum(self.accuracy[:2]) / len(self.accuracy[:2])

    @property
    def last(self) -> float:
        """Over the last quarter."""
        late = self.accuracy[-max(1, len(self.accuracy) // 4) :]
        return sum(late) / len(late)

    @property
    def improvement(self) -> float:
        return self.last - self.first


@dataclass(frozen=True)
class Diagnosis:
    """What a meta-trained model does on tasks of its training, on new ones, and on other data."""

    seen: Curve
    unseen: Curve
    others: Mapping[str, Curve] = field(default_factory=dict)
    chance: float = 0.0

    @property
    def verdict(self) -> str:
        """``not learned``, ``memorisation``, ``task identification`` or ``learning to learn``."""
        if self.unseen.last >= self.chance + _MARGIN:
            return "learning to learn"
        if self.seen.last < self.chance + _MARGIN:
            return "not learned"
        return "memorisation" if self.seen.improvement < _MARGIN else "task identification"


def diagnose(
    fitted: InContextClassifier,
    seen: Sequences,
    unseen: Sequences,
    others: Mapping[str, Sequences] | None = None,
    *,
    batches: int = 8,
) -> Diagnosis:
    """Accuracy by position on `batches` batches of each stream.

    `seen` holds the training's own tasks, `unseen` fresh ones, `others` tasks of other data sets; all should show
    examples that were not trained on, or remembered instances pass for learning, and none may be biased.
    """
    for stream in (seen, unseen, *(others or {}).values()):
        if getattr(stream, "bias", 0):
            raise InputError("a diagnosis needs unbiased streams: a memoriser looks like a learner on biased ones")
    curves = {name: curve_of(fitted, stream, batches) for name, stream in (others or {}).items()}
    both = [curve_of(fitted, stream, batches) for stream in (seen, unseen)]
    return Diagnosis(both[0], both[1], curves, 1 / fitted.classes)


def curve_of(fitted: InContextClassifier, stream: Sequences, batches: int = 8) -> Curve:
    """Accuracy at each position over batches 0 .. `batches` - 1 of the stream."""
    right = [(fitted.logits(b["x"], b["y"]).argmax(-1) == b["y"]).double() for b in map(stream, range(batches))]
    return Curve(tuple(torch.cat(right).mean(0).tolist()))


def plateau_exit(late_accuracy: Sequence[float], chance: float, *, window: int = 20) -> int | None:
    """The first step at which late accuracy, averaged over `window` steps, is above chance by 0.1; None if none is."""
    window = min(window, len(late_accuracy))
    means = torch.tensor(list(late_accuracy), dtype=torch.float64).unfold(0, window, 1).mean(1)
    above = (means > chance + _MARGIN).nonzero()
    return int(above[0]) + window if len(above) else None


# what any method could do with the same context


def nearest_neighbour(x: Tensor, y: Tensor, queries: Tensor, classes: int) -> Tensor:
    """(B, Q) classes of the nearest of (B, T, X) labelled examples; other classifiers below have the same face."""
    return y.gather(1, torch.cdist(queries, x).argmin(2))


def class_mean(x: Tensor, y: Tensor, queries: Tensor, classes: int) -> Tensor:
    """The class with the nearest mean; classes without an example are never answered."""
    member = F.one_hot(y, classes).to(x.dtype)
    counts = member.sum(1)
    means = (member.transpose(1, 2) @ x) / counts.clamp(min=1)[:, :, None]
    return torch.cdist(queries, means).masked_fill(counts[:, None] == 0, torch.inf).argmin(2)


def ridge(x: Tensor, y: Tensor, queries: Tensor, classes: int, penalty: float = 1.0) -> Tensor:
    """Ridge regression on the labels' indicators, with an intercept."""
    x, queries = (F.pad(part, (0, 1), value=1.0).double() for part in (x, queries))
    gram = x @ x.transpose(1, 2) + penalty * torch.eye(x.shape[1], dtype=x.dtype)
    return (queries @ x.transpose(1, 2) @ torch.linalg.solve(gram, F.one_hot(y, classes).to(x.dtype))).argmax(2)


def online_sgd(x: Tensor, y: Tensor, queries: Tensor, classes: int, lr: float = 0.1) -> Tensor:
    """A linear softmax classifier after one pass of SGD over the examples, one at a time (the paper's SGD row)."""
    weights = x.new_zeros(len(x), x.shape[2], classes)
    for example, label in zip(x.unbind(1), y.unbind(1), strict=True):
        wrong = torch.einsum("bx,bxc->bc", example, weights).softmax(1) - F.one_hot(label, classes)
        weights = weights - lr * torch.einsum("bx,bc->bxc", example, wrong)
    return (queries @ weights).argmax(2)


CLASSIFIERS: dict[str, Callable[..., Tensor]] = {
    "1-NN": nearest_neighbour,
    "class mean": class_mean,
    "ridge": ridge,
    "online SGD": online_sgd,
}


def context_baselines(stream: Sequences, *, batches: int = 8) -> dict[str, float]:
    """Accuracy on the last example of each sequence, given all the others: {name of the classifier: accuracy}."""
    return {name: _mean(_last(stream, batches, classify, None)) for name, classify in CLASSIFIERS.items()}


def agreement(fitted: InContextClassifier, stream: Sequences, *, batches: int = 8) -> dict[str, float]:
    """How often the model answers the last example as each classifier on the same context does: what it has learned."""
    return {name: _mean(_last(stream, batches, classify, fitted)) for name, classify in CLASSIFIERS.items()}


def _last(
    stream: Sequences, batches: int, classify: Callable[..., Tensor], fitted: InContextClassifier | None
) -> Iterable[Tensor]:
    for batch in map(stream, range(batches)):
        x, y = batch["x"], batch["y"]
        answers = classify(x[:, :-1], y[:, :-1], x[:, -1:], stream.labels)[:, 0]
        yield answers == (y[:, -1] if fitted is None else fitted.logits(x, y)[:, -1].argmax(-1))


def _mean(parts: Iterable[Tensor]) -> float:
    return float(torch.cat(list(parts)).double().mean())


@dataclass(frozen=True)
class Trial:
    """One meta-training of a study."""

    kind: str
    tasks: int
    width: int
    parameters: int
    state: int  # numbers that carry the context into the last prediction
    diagnosis: Diagnosis


def study(
    learners: Sequence[GPICL],
    tasks: Sequence[int],
    base: BaseSet,
    held_out: BaseSet,
    *,
    watch: Watch | None = None,
    **stream: Any,
) -> list[Trial]:
    """Meta-train every learner on every number of tasks and diagnose it on `held_out` examples.

    Over `tasks` and the learners' widths this shows the transition from memorisation to learning to learn; over their
    kinds, what the size of the state is worth.  `stream` holds settings of `Projections`.
    """
    found = []
    alone = replace(watch or Watch(), checkpoint=None)  # the trials would share one folder
    for learner in learners:
        for count in tasks:
            training = Projections(base, count, **stream)
            fitted = learner.meta_fit(training, watch=alone)
            diagnosis = diagnose(fitted, *evaluation(training, held_out))
            model = fitted.model
            state = model.config.state_size(training.length - 1)
            found.append(Trial(learner.kind, count, learner.width, model.num_parameters, state, diagnosis))
    return found


def evaluation(training: Projections, held_out: BaseSet) -> tuple[Projections, Projections]:
    """Streams of the training's own tasks and of new ones, both unbiased and with held-out examples."""
    seen = replace(training, base=held_out, bias=0.0)
    return seen, replace(seen, tasks=2**30, first=_UNSEEN)
