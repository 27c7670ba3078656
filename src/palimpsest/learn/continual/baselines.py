"""Continual learners on the same frozen features: kNN, a linear head fine-tuned, and what keeps it from forgetting.

All heads are one linear softmax layer over every class met, trained for `epochs` passes over each batch observed.
- fine-tuning: on the new examples alone.
- replay (ER, Chaudhry et al. 2019, arXiv:1902.10486): beside them as many drawn from `exemplars` kept of each class.
- EWC (Kirkpatrick et al. 2017, arXiv:1612.00796): weights are held where the Fisher information of earlier batches
  says that they matter; for a linear head its diagonal is exact, E[p (1 - p)] z^2.
- LwF (Li & Hoiem 2016, arXiv:1606.09282): answers of the old head on the new examples are kept by distillation.
- linear probe: keeps everything and trains anew each time.  The ceiling of a linear head, not a continual learner.
Shapes: M examples, D features, C classes.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from palimpsest.core.errors import InputError
from palimpsest.core.methods import method
from palimpsest.core.seeds import torch_rng
from palimpsest.core.watch import Watch
from palimpsest.learn.continual.continual import ContinualLearner, Known, grown

Tensors = dict[str, Tensor]


def kept(known: Known, z: Tensor, y: Tensor, exemplars: int | None, seed: int) -> Tensors:
    """The examples kept after (z, y): of each class all, or those `exemplars` with the smallest random numbers.

    Numbers are drawn once an example, so what is kept is a uniform sample of each class, whatever the batches were.
    """
    before = known.tensors or {}
    new = {
        "kept": z.float(),
        "kept_labels": y,
        "kept_numbers": torch.rand(len(y), generator=torch_rng(seed, "keep", known.observed)),
    }
    both = {name: torch.cat([before[name], value]) if name in before else value for name, value in new.items()}
    if exemplars is None:
        return both
    order = both["kept_numbers"].argsort(stable=True)
    ranks = torch.zeros(len(order), dtype=torch.int64)
    for label in range(len(known.names)):
        mine = order[both["kept_labels"][order] == label]
        ranks[mine] = torch.arange(len(mine))
    return {name: value[ranks < exemplars] for name, value in both.items()}


@method(verb="learn", paper="nmc")
@dataclass(frozen=True)
class KNN(ContinualLearner):
    """The class most often met among the nearest of the kept features, the nearer one if equal."""

    neighbours: int = 5
    exemplars: int | None = None  # kept of each class; None: all
    seed: int = 0

    def __post_init__(self) -> None:
        if self.neighbours < 1 or (self.exemplars is not None and self.exemplars < 1):
            raise InputError(f"neighbours={self.neighbours}, exemplars={self.exemplars}: nothing to look among")

    def update(self, known: Known, z: Tensor, y: Tensor, watch: Watch | None) -> Tensors:
        return kept(known, z, y, self.exemplars, self.seed)

    def scores(self, known: Known, z: Tensor) -> Tensor:
        """Votes, and less than half of one for how near the nearest of the class is."""
        assert known.tensors is not None
        labels = known.tensors["kept_labels"]
        near, who = torch.cdist(z, known.tensors["kept"].double()).topk(
            min(self.neighbours, len(labels)), largest=False
        )
        voted = F.one_hot(labels[who], len(known.names)).double()
        return (voted * (1 + 0.4 / near.shape[1] / (1 + near))[..., None]).sum(1)


class Head(nn.Module):
    """A linear layer with a row for each class."""

    def __init__(self, weight: Tensor, bias: Tensor):
        super().__init__()
        self.weight, self.bias = nn.Parameter(weight.float()), nn.Parameter(bias.float())

    def forward(self, z: Tensor) -> Tensor:
        return F.linear(z, self.weight, self.bias)


@method(verb="learn", paper="nmc")
@dataclass(frozen=True)
class FineTuning(ContinualLearner):
    """A linear head trained on each batch as it comes, with nothing against forgetting."""

    epochs: int = 20  # passes over each batch observed
    batch_size: int = 32
    lr: float = 0.03
    seed: int = 0

    def __post_init__(self) -> None:
        if self.epochs < 1 or self.batch_size < 1:
            raise InputError(f"epochs={self.epochs}, batch_size={self.batch_size} cannot be trained with")

    def update(self, known: Known, z: Tensor, y: Tensor, watch: Watch | None) -> Tensors:
        before, size = known.tensors or {}, len(known.names)
        weight = grown(before.get("weight"), size, z.shape[1], kind=torch.float32)
        head = Head(weight, grown(before.get("bias"), size, kind=torch.float32))
        self.train(head, known, z.float(), y, watch)
        trained = {"weight": head.weight.detach().clone(), "bias": head.bias.detach().clone()}
        return trained | self.carried(known, trained, z.float(), y)

    def train(self, head: Head, known: Known, z: Tensor, y: Tensor, watch: Watch | None) -> None:
        generator_of = (self.seed, "rows", known.observed)
        steps = -(-len(y) // self.batch_size)  # an epoch

        def batches(step: int) -> Tensors:
            epoch, place = divmod(step, steps)
            order = torch.randperm(len(y), generator=torch_rng(*generator_of, epoch))
            rows = order[place * self.batch_size : (place + 1) * self.batch_size]
            return {"z": z[rows], "y": y[rows]} | self.beside(known, len(rows), step)

        (watch or Watch(progress=False)).fit(
            f"batch {known.observed}",
            head,
            lambda head, batch: self.loss(head, batch, known),
            batches,
            steps=self.epochs * steps,
            lr=self.lr,
            clip=None,
            precision="fp32",
            seed=self.seed,
            identity=str(self),
        )

    def beside(self, known: Known, rows: int, step: int) -> Tensors:
        """What a step sees beside the new examples."""
        return {}

    def loss(self, head: nn.Module, batch: Tensors, known: Known) -> Tensor:
        return F.cross_entropy(head(batch["z"]), batch["y"])

    def carried(self, known: Known, trained: Tensors, z: Tensor, y: Tensor) -> Tensors:
        """What goes to the next batch beside the head."""
        return {}

    def scores(self, known: Known, z: Tensor) -> Tensor:
        assert known.tensors is not None
        return F.linear(z, known.tensors["weight"].double(), known.tensors["bias"].double())


@method(verb="learn", paper="nmc")
@dataclass(frozen=True)
class Replay(FineTuning):
    """Experience replay: each step also sees as many examples drawn from those kept of earlier classes."""

    exemplars: int = 10  # kept of each class

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.exemplars < 1:
            raise InputError(f"exemplars must be at least 1, not {self.exemplars}")

    def beside(self, known: Known, rows: int, step: int) -> Tensors:
        before = known.tensors or {}
        if "kept" not in before:
            return {}
        drawn = torch.randint(
            len(before["kept"]), (rows,), generator=torch_rng(self.seed, "replay", known.observed, step)
        )
        return {"old_z": before["kept"][drawn], "old_y": before["kept_labels"][drawn]}

    def loss(self, head: nn.Module, batch: Tensors, known: Known) -> Tensor:
        if "old_z" not in batch:
            return super().loss(head, batch, known)
        z, y = torch.cat([batch["z"], batch["old_z"]]), torch.cat([batch["y"], batch["old_y"]])
        return F.cross_entropy(head(z), y)

    def carried(self, known: Known, trained: Tensors, z: Tensor, y: Tensor) -> Tensors:
        return kept(known, z, y, self.exemplars, self.seed)


@method(verb="learn", paper="nmc", name="ewc")
@dataclass(frozen=True)
class EWC(FineTuning):
    """Elastic weight consolidation: a quadratic pull to the old head, by the Fisher information of what came before."""

    strength: float = 100.0

    def loss(self, head: nn.Module, batch: Tensors, known: Known) -> Tensor:
        value = super().loss(head, batch, known)
        before = known.tensors or {}
        if "weight" not in before:
            return value
        old = len(before["weight"])
        pull = sum(
            (before[f"fisher_{name}"] * (parameter[:old] - before[name]).square()).sum()
            for name, parameter in head.named_parameters()
        )
        return value + self.strength / 2 * pull

    def carried(self, known: Known, trained: Tensors, z: Tensor, y: Tensor) -> Tensors:
        p = F.linear(z, trained["weight"], trained["bias"]).softmax(1)
        slope = p * (1 - p)  # the variance of the logit's gradient under the model's own answers
        new = {"fisher_weight": slope.T @ z.square() / len(z), "fisher_bias": slope.mean(0)}
        before, size = known.tensors or {}, len(known.names)
        return {
            name: value + grown(before.get(name), size, *value.shape[1:], kind=value.dtype)
            for name, value in new.items()
        }


@method(verb="learn", paper="nmc", name="lwf")
@dataclass(frozen=True)
class LwF(FineTuning):
    """Learning without forgetting: on the new examples the new head keeps what the old one says of the old classes."""

    strength: float = 1.0
    temperature: float = 2.0

    def loss(self, head: nn.Module, batch: Tensors, known: Known) -> Tensor:
        value = super().loss(head, batch, known)
        before = known.tensors or {}
        if "weight" not in before:
            return value
        old = F.linear(batch["z"], before["weight"], before["bias"]) / self.temperature
        new = head(batch["z"])[:, : old.shape[1]] / self.temperature
        distilled = F.kl_div(new.log_softmax(1), old.log_softmax(1), log_target=True, reduction="batchmean")
        return value + self.strength * self.temperature**2 * distilled


@method(verb="learn", paper="nmc")
@dataclass(frozen=True)
class LinearProbe(FineTuning):
    """A linear head trained anew on everything seen so far, all of it kept: what a linear head can reach at best."""

    def update(self, known: Known, z: Tensor, y: Tensor, watch: Watch | None) -> Tensors:
        everything = kept(known, z, y, None, self.seed)
        size = len(known.names)
        head = Head(torch.zeros(size, z.shape[1]), torch.zeros(size))
        self.train(head, known, everything["kept"], everything["kept_labels"], watch)
        return {"weight": head.weight.detach().clone(), "bias": head.bias.detach().clone()} | everything
