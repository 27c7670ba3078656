"""How far an unlearned regressor is from a retrained one: errors, distributions, membership, and the way back.

The measures of Deep Regression Unlearning (Tarun et al. 2022, arXiv:2210.08196; sheet `deep_regression_unlearning`)
with what was wrong in their published code put right: both models learn again from copies and in the same order of
batches, and the membership attack is trained on retain samples only, in equal numbers on both sides.
All numbers are in the unit of the targets.  Shapes: N samples; answers are flattened.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from palimpsest.core.errors import InputError
from palimpsest.core.seeds import numpy_rng

Samples = tuple[Tensor, Tensor]

_AT_ONCE = 512  # samples in a pass without a gradient


def answers(model: nn.Module, inputs: Tensor) -> np.ndarray:
    """(N * q,) float64 what a regressor answers, in evaluation mode, which it is left in as it was found."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        with torch.no_grad():
            return torch.cat([model(part) for part in inputs.split(_AT_ONCE)]).double().cpu().numpy().ravel()
    finally:
        for module, mode in modes:
            module.training = mode


def error(model: nn.Module, samples: Samples, *, squared: bool = False) -> float:
    """Mean absolute (or squared) error.  On the forget range the goal is the retrained model's, not the largest."""
    found = _errors(model, samples)
    return float((found**2).mean() if squared else found.mean())


def wasserstein(model: nn.Module, retrained: nn.Module, inputs: Tensor) -> float:
    """Wasserstein-1 distance of two models' answers as distributions: who answers what is not looked at."""
    from scipy.stats import wasserstein_distance

    return float(wasserstein_distance(answers(model, inputs), answers(retrained, inputs)))


def mean_difference(model: nn.Module, retrained: nn.Module, inputs: Tensor) -> float:
    """Mean |answer - retrained model's answer|, sample by sample."""
    return float(np.abs(answers(model, inputs) - answers(retrained, inputs)).mean())


def relative_differences(model: nn.Module, retrained: nn.Module, samples: Samples) -> np.ndarray:
    """(N,) |answer - retrained model's answer| in parts of the target's size."""
    inputs, targets = samples
    size = np.maximum(np.abs(targets.double().cpu().numpy().ravel()), 1e-12)
    return np.abs(answers(model, inputs) - answers(retrained, inputs)) / size


def membership(
    model: nn.Module, members: Samples, strangers: Samples, forget: Samples, *, most: int = 2000, seed: int = 0
) -> float:
    """The share of the forget samples that an attack by loss takes for training samples.

    A support vector classifier (C = 3, radial kernel) on each sample's error learns retain samples (`members`) from
    samples never trained on (`strangers`).  Take the latter from the retained range: errors on a forgotten range are
    larger for reasons that have nothing to do with membership.  The goal is the retrained model's value: below it, the
    samples look suspiciously unknown.
    """
    from sklearn.svm import SVC

    sides = [_errors(model, samples) for samples in (members, strangers)]
    count = min(most, *(len(side) for side in sides))
    if count < 2:
        raise InputError("the membership attack needs at least 2 members and 2 strangers")
    rng = numpy_rng(seed, "membership")
    known, unknown = (rng.permutation(side)[:count] for side in sides)
    learned = np.concatenate([known, unknown])[:, None]
    scale = max(float(learned.std()), 1e-12)  # "auto" takes the kernel's width to be 1
    attack = SVC(C=3, kernel="rbf", gamma="auto").fit(learned / scale, np.repeat([1, 0], count))
    return float(attack.predict(_errors(model, forget)[:, None] / scale).mean())


def ignorance(model: nn.Module, before: nn.Module, blind: nn.Module, inputs: Tensor) -> float:
    """1 - W(model, blind) / W(before, blind): 1 is as ignorant as a model that never saw the inputs, 0 is unchanged.

    It stands in for the zero-retrain forgetting score of classification, which has no meaning for regression.
    """
    start = wasserstein(before, blind, inputs)
    return 1 - wasserstein(model, blind, inputs) / max(start, 1e-12)


@dataclass(frozen=True, kw_only=True)
class Relearning:
    """How many steps on the whole training set bring a model's forget error back to what it was before unlearning.

    The model counts as back when its error on the forget samples of a validation set is at most (1 + `margin`) times
    the original's.  Every model is copied, and sees the same batches in the same order.
    """

    lr: float = 1e-3  # that of the unlearning: a larger one hides what is left
    batch_size: int = 256
    margin: float = 0.05
    most: int = 100  # steps at most; who is not back by then counts as that
    every: int = 1  # steps between two looks
    squared: bool = False  # of the loss and the error
    seed: int = 0

    def steps(self, model: nn.Module, original: nn.Module, train: Samples, validation: Samples) -> int:
        """Steps until the model is back; 0 if it never was away."""
        goal = (1 + self.margin) * error(original, validation, squared=self.squared)
        work = copy.deepcopy(model)
        adam = torch.optim.Adam(work.parameters(), self.lr)
        inputs, targets = train
        for step in range(self.most):
            if step % self.every == 0 and error(work, validation, squared=self.squared) <= goal:
                return step
            rows = torch.from_numpy(self._rows(step, len(inputs)))
            work.train()
            found = work(inputs[rows])
            difference = found - targets[rows].reshape(found.shape)
            adam.zero_grad()
            (difference.square() if self.squared else difference.abs()).mean().backward()
            adam.step()
        return self.most

    def anamnesis(
        self, model: nn.Module, retrained: nn.Module, original: nn.Module, train: Samples, validation: Samples
    ) -> float:
        """The anamnesis index: the model's steps in parts of the retrained model's.

        1 is ideal; far below, something is left that comes back fast; far above, more was destroyed than forgotten.
        `InputError` if the retrained model needs no step: then the validation samples do not show the forgetting.
        """
        gold = self.steps(retrained, original, train, validation)
        if gold == 0:
            raise InputError(
                "the retrained model's error on the forget samples is that of the original: nothing was to be forgotten"
            )
        return self.steps(model, original, train, validation) / gold

    def _rows(self, step: int, count: int) -> np.ndarray:
        size = min(self.batch_size, count)
        epoch, place = divmod(step, count // size)
        return numpy_rng(self.seed, "relearning", epoch).permutation(count)[place * size : (place + 1) * size]


def _errors(model: nn.Module, samples: Samples) -> np.ndarray:
    inputs, targets = samples
    if len(inputs) == 0:
        raise InputError("no samples to measure an error on")
    found, wanted = answers(model, inputs), targets.double().cpu().numpy().ravel()
    if found.shape != wanted.shape:
        raise InputError(f"{len(found)} answers for {len(wanted)} targets")
    return np.abs(found - wanted)
