"""Bayesian prism: train a transformer to answer from examples of random functions, and hold it against exact Bayes.

Panwar, Ahuja, Goyal 2024 (arXiv:2306.04891).  Under squared loss the best in-context learner is the posterior mean of
the functions it was trained on: a mixture of families gives a mixture of posteriors, a preference of the data for
simple functions becomes a preference of the network.  `compare` gives distances to that predictor and its rivals,
`weight_probe` and `spectrum_probe` say which function a prompt has called up.  Needs: a stream of functions.
Shapes: B prompts, P points, X inputs, D features, n pairs of a prompt, Q queries.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal, Protocol

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from palimpsest.core import bayes
from palimpsest.core.errors import InputError, unknown
from palimpsest.core.methods import method
from palimpsest.core.watch import Watch
from palimpsest.data.ahead import ahead
from palimpsest.data.functions import Family, Linear
from palimpsest.learn.learner import Learner
from palimpsest.models.sequences import SequenceConfig, SequenceModel, build, load, save

Layout = Literal["interleaved", "packed"]
Predictor = Callable[[Tensor, Tensor], Tensor]  # (B, P, X) and (B, P) -> (B, P), each from the pairs before it

_GRID = 40  # points over one period at which the spectrum is taken


class Functions(Protocol):
    """``stream(step)`` gives x (B, P, X) and y (B, P); a pure function of the step."""

    @property
    def family(self) -> Family: ...

    def __call__(self, step: int) -> dict[str, Tensor]: ...


@method(verb="learn", paper="bayesian_prism")
@dataclass(frozen=True)
class BayesianPrism(Learner):
    """Train a transformer to predict a function's next value from the pairs before it.

    The defaults are the paper's, without its curriculum of growing dimensions and prompts.  `layout`: a point and its
    value are two tokens ("interleaved", the paper) or one that holds the point and the value before ("packed": half the
    tokens, the same information).  `waves`: read a scalar x through cosines and sines of so many frequencies, so that
    the network's own preference for smooth functions does not add to what it learns.
    """

    width: int = 256
    layers: int = 12
    heads: int = 8
    steps: int = 500_000
    lr: float = 1e-4
    schedule: Literal["constant", "linear", "cosine"] = "constant"
    positions: bool = True  # none for a single family: the causal mask suffices, and longer prompts work
    layout: Layout = "interleaved"
    waves: int = 0
    half_period: float = 5.0  # of the waves
    seed: int = 0

    inputs: ClassVar[tuple[str, ...]] = ("functions",)
    family: ClassVar[str] = "in-context"

    def __post_init__(self) -> None:
        if self.layout not in ("interleaved", "packed"):
            raise unknown("layout", self.layout, ("interleaved", "packed"))

    def meta_fit(self, stream: Functions, *, watch: Watch | None = None) -> FittedPrism:  # type: ignore[override]
        """Train on the stream's batches 0 .. `steps` - 1, by mean squared error over all positions."""
        first = stream(0)["x"]
        model = self.model(first.shape[2], first.shape[1])

        def loss(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
            return F.mse_loss(self._answers(model, batch["x"], batch["y"]), batch["y"])

        with ahead(stream) as batches:
            (watch or Watch()).fit(
                "meta-training",
                model,
                loss,
                batches,
                steps=self.steps,
                lr=self.lr,
                schedule=self.schedule,
                seed=self.seed,
            )
        return FittedPrism(self, model.eval())

    def model(self, dim: int, points: int) -> SequenceModel:
        """The untrained model for functions of `dim` inputs, seen at up to `points` points."""
        read = 2 * self.waves if self.waves else dim
        packed = self.layout == "packed"
        length = (points if packed else 2 * points) if self.positions else 0
        inputs = read + 1 if packed else max(read, 1)
        config = SequenceConfig(inputs, 1, width=self.width, layers=self.layers, heads=self.heads, length=length)
        return build(config, self.seed)

    def read(self, folder: Path) -> FittedPrism:
        return FittedPrism(self, load(folder))

    def _answers(self, model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        """(B, P): the prediction at each point."""
        answers = model(self.tokens(x, y))[..., 0]
        return answers if self.layout == "packed" else answers[:, ::2]

    def tokens(self, x: Tensor, y: Tensor) -> Tensor:
        """(B, P or 2P, inputs): what the model reads.  In the interleaved layout values stand in coordinate 0."""
        x = self._read_in(x)
        if self.layout == "packed":
            return torch.cat([x, F.pad(y[:, :-1], (1, 0))[..., None]], dim=2)
        values = F.pad(y[..., None], (0, x.shape[2] - 1))
        return torch.stack([x, values], dim=2).flatten(1, 2)

    def _read_in(self, x: Tensor) -> Tensor:
        if not self.waves:
            return x
        angle = x * (torch.arange(1, self.waves + 1, device=x.device) * torch.pi / self.half_period)
        return torch.cat([angle.cos(), angle.sin()], dim=-1)


@dataclass(frozen=True, eq=False)
class Pairs:
    """One function's points and values: the task of a learner of functions."""

    x: Any  # (n, X)
    y: Any  # (n,)


@dataclass(frozen=True, eq=False)
class FittedPrism:
    """A trained network; `adapt` only stores the pairs that it answers from."""

    learner: BayesianPrism
    model: SequenceModel

    def adapt(self, task: Any) -> Callable[[Any], np.ndarray]:
        """`task`: `Pairs`, or any task whose support has x (n, X) and y (n,); returns (Q, X) -> (Q,) float64 values.

        Raises `InputError` for shapes that do not fit, values that are not finite, and too long prompts.
        """
        pairs = getattr(task, "support", task)
        x = torch.as_tensor(np.asarray(pairs.x), dtype=torch.float32)
        y = torch.as_tensor(np.asarray(pairs.y), dtype=torch.float32)
        if x.ndim != 2 or y.shape != x.shape[:1]:
            raise InputError(f"pairs are x (n, X) and y (n,), not {tuple(x.shape)} and {tuple(y.shape)}")
        if not (torch.isfinite(x).all() and torch.isfinite(y).all()):
            raise InputError("the pairs must be finite numbers")

        def predict(queries: Any) -> np.ndarray:
            wanted = torch.as_tensor(np.asarray(queries), dtype=torch.float32)
            if wanted.ndim != 2 or wanted.shape[1] != x.shape[1]:
                raise InputError(f"queries must have shape (Q, {x.shape[1]}), not {tuple(wanted.shape)}")
            return self.answers(x[None], y[None], wanted[None])[0].double().numpy()

        return predict

    def predictions(self, x: Tensor, y: Tensor) -> Tensor:
        """(B, P) float64: at each point, from the pairs before it."""
        with torch.inference_mode():
            return self.learner._answers(self.model, x.float(), y.float()).double()

    def answers(self, x: Tensor, y: Tensor, queries: Tensor) -> Tensor:
        """(B, Q): the values at (B, Q, X) points, each from all the pairs (B, n, X), (B, n) and no other query."""
        learner, shots = self.learner, x.shape[1]
        both = torch.cat([x, queries], dim=1)
        values = F.pad(y, (0, queries.shape[1]))
        if learner.layout == "packed":
            tokens = learner.tokens(both, values)
            tokens[:, shots:, -1] = y[:, -1:] if shots else 0.0
            context = shots
        else:
            tokens = torch.cat([learner.tokens(x, y), learner.tokens(queries, values[:, shots:])[:, ::2]], dim=1)
            context = 2 * shots
        with torch.inference_mode():
            return self.model(tokens, context=context)[:, context:, 0]

    def write(self, folder: Path) -> None:
        save(self.model, folder)


# the yardsticks


def exact(family: Linear, noise: float) -> Predictor:
    """The posterior mean under a family that is linear in known features, mixtures included."""
    priors = family.priors()
    return lambda x, y: bayes.predict(family.basis(x), y, priors, noise).mean


def least_squares(family: Linear) -> Predictor:
    """The weights of least norm that fit the pairs best."""

    def predict(x: Tensor, y: Tensor) -> Tensor:
        phi, values = family.basis(x).double(), y.double()
        pairs = ((phi[:, :n], values[:, :n, None]) for n in range(1, x.shape[1]))
        weights = [torch.linalg.lstsq(*pair, driver="gelsd").solution[..., 0] for pair in pairs]
        return (phi * torch.stack([torch.zeros_like(phi[:, 0]), *weights], dim=1)).sum(2)

    return predict


def lasso(family: Linear, penalty: float, *, iterations: int = 500) -> Predictor:
    """The weights that minimise ``|y - phi w|^2 / (2 n) + penalty |w|_1`` (scikit-learn's scale, no intercept).

    By accelerated proximal gradient (Beck and Teboulle 2009), all prompts at once.
    """

    def predict(x: Tensor, y: Tensor) -> Tensor:
        phi, values = family.basis(x).double(), y.double()
        weights = [lasso_weights(phi[:, :n], values[:, :n], penalty, iterations) for n in range(1, x.shape[1])]
        return (phi * torch.stack([torch.zeros_like(phi[:, 0]), *weights], dim=1)).sum(2)

    return predict


def lasso_weights(phi: Tensor, y: Tensor, penalty: float, iterations: int = 500) -> Tensor:
    """(B, D) weights of `lasso` for (B, n, D) features and (B, n) values."""
    count = phi.shape[1]
    gram, target = phi.transpose(1, 2) @ phi / count, (phi.transpose(1, 2) @ y[..., None])[..., 0] / count
    step = 1 / torch.linalg.matrix_norm(gram, 2).clamp(min=1e-12)[:, None]
    weights = ahead = torch.zeros_like(target)
    speed = 1.0
    for _ in range(iterations):
        moved = ahead - step * ((gram @ ahead[..., None])[..., 0] - target)
        new = moved.sign() * (moved.abs() - step * penalty).clamp(min=0)
        faster = (1 + (1 + 4 * speed**2) ** 0.5) / 2
        ahead = new + (speed - 1) / faster * (new - weights)
        weights, speed = new, faster
    return weights


def compare(
    fitted: FittedPrism, yardsticks: Mapping[str, Predictor], batch: Mapping[str, Tensor]
) -> dict[str, np.ndarray]:
    """(P,) for each yardstick: the median over prompts of the squared distance of its prediction to the network's.

    Medians, because single ill-conditioned prompts move the mean (least squares near n = X most of all).  The entry
    ``"truth"`` is the distance of the network to the function itself.
    """
    mine = fitted.predictions(batch["x"], batch["y"])
    found = {name: predict(batch["x"], batch["y"]) for name, predict in yardsticks.items()}
    found["truth"] = batch.get("function", batch["y"]).double()
    return {name: (mine - other).square().median(0).values.numpy() for name, other in found.items()}


# the probes


def weight_probe(fitted: FittedPrism, x: Tensor, y: Tensor, *, seed: int = 0) -> Tensor:
    """(B, P + 1, X): the linear function that the network uses after 0 .. P pairs.

    Fitted by least squares, without intercept, to its answers at 2 X + 1 fresh normal points.
    """
    dim = x.shape[2]
    generator = torch.Generator().manual_seed(seed)
    queries = torch.randn(len(x), 2 * dim + 1, dim, generator=generator)
    found = []
    for n in range(x.shape[1] + 1):
        answers = fitted.answers(x[:, :n], y[:, :n], queries).double()
        found.append(torch.linalg.lstsq(queries.double(), answers[..., None], driver="gelsd").solution[..., 0])
    return torch.stack(found, dim=1)


def spectrum_probe(answers: Callable[[Tensor], Tensor], half_period: float, frequencies: int) -> np.ndarray:
    """(frequencies,): the shares of frequencies 1, 2, ... in the functions that are answered, averaged over prompts.

    `answers`: (B, 40, 1) points -> (B, 40) values.  The grid covers one period without its end point; the mean is left
    out, and frequencies above `frequencies` do not count.  Raises `InputError` where all answers are constant.
    """
    grid = torch.arange(_GRID) / _GRID * 2 * half_period - half_period
    power = torch.fft.rfft(answers(grid[None, :, None]).double(), dim=1).abs().square()[:, 1 : frequencies + 1]
    total = power.sum(1, keepdim=True)
    if not (total > 0).all():
        raise InputError("the answers are constant: there is no spectrum (give the prompts at least one pair)")
    return (power / total).mean(0).numpy()


def spectra(
    fitted: FittedPrism, family: Linear, batch: Mapping[str, Tensor], pairs: Sequence[int], *, noise: float, high: int
) -> dict[int, tuple[np.ndarray, np.ndarray]]:
    """{n: (the network's spectrum, the exact predictor's)} after n pairs of each prompt."""
    half = fitted.learner.half_period
    found = {}
    for n in pairs:
        x, y = batch["x"][:, :n], batch["y"][:, :n]

        def network(grid: Tensor, x: Tensor = x, y: Tensor = y) -> Tensor:
            return fitted.answers(x, y, grid.expand(len(x), -1, -1))

        def posterior(grid: Tensor, x: Tensor = x, y: Tensor = y) -> Tensor:
            # one more point after the pairs: the weights that are expected there are those after all of them
            whole = torch.cat([family.basis(x), family.basis(x[:, :1])], dim=1)
            weights = bayes.predict(whole, F.pad(y, (0, 1)), family.priors(), noise).weights[:, -1]
            return (family.basis(grid) @ weights[..., None])[..., 0]

        found[n] = (spectrum_probe(network, half, high), spectrum_probe(posterior, half, high))
    return found
