"""The one training loop.  A method is a loss and the batches it sees; everything else about training is here, once.

Built on Accelerate: the same call runs on a processor, on one GPU, or under ``accelerate launch`` (DDP, FSDP2).
Several processes without GPUs: ``ACCELERATE_USE_CPU=1 accelerate launch --multi_gpu --num_processes 2 ...`` (gloo);
``--cpu`` instead of ``--multi_gpu`` would start a single process, for there it needs MPI.
A step is a pure function of weights, optimiser state, seed and step: a killed run goes on to the very same bits.
Knows nothing of what is trained: no tokenisation, no model families, no metrics.
"""

from __future__ import annotations

import copy
import itertools
import math
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from palimpsest.core import checkpoint as checkpoints
from palimpsest.core.checkpoint import Checkpoint
from palimpsest.core.errors import InputError, TrainingDiverged
from palimpsest.core.interrupt import Interrupt
from palimpsest.core.precision import autocast, masters, resolve
from palimpsest.core.progress import Progress
from palimpsest.core.recipe import Recipe
from palimpsest.core.seeds import seed_everything
from palimpsest.data.batches import Batch, count_tokens, share, to_device

Loss = Callable[[nn.Module, Any], Any]

_READ_EVERY = {"cpu": 1, "cuda": 16}  # steps between two looks at the losses: on a GPU each makes the host wait
_IDLE_STEPS = 3  # steps without any gradient, from the very first on, before training is called pointless


@dataclass(frozen=True)
class Trace:
    """What `fit` did.  Counts include what was done before a resume."""

    model: nn.Module  # the very object passed in, trained
    losses: list[float]  # one a step, over all shares
    logs: dict[str, list[float]]  # what the loss returned beside its value, and "grad_norm" (before clipping)
    steps: int
    tokens: int
    seconds: float
    stopped: str = ""  # "until" if the stop rule said so


def fit(
    model: nn.Module,
    loss: Loss,
    batches: Callable[[int], Any],
    *,
    steps: int,
    lr: float,
    betas: tuple[float, float] = (0.9, 0.999),
    weight_decay: float = 0.0,
    warmup: int = 0,
    schedule: str = "constant",
    clip: float | None = 1.0,
    micro_batches: int = 1,
    precision: str = "auto",
    seed: int = 0,
    checkpoint: str | Path | None = None,
    every: int = 100,
    until: Callable[[int, nn.Module], bool] | None = None,
    progress: str = "training",
    identity: Any = None,
) -> Trace:
    """Train `model` in place with AdamW for `steps` steps and return the `Trace`.

    - `loss(model, batch)` returns a scalar, or (scalar, {name: scalar}).  `batches(step)` returns the batch of a whole
      step, a tree as in `data.batches`; each process and each of `micro_batches` gets its share.  A loss on a `Batch`
      divides by the batch's totals, so the shares add up; a tree without a `Batch` is weighted by its rows.
    - Only parameters that require a gradient are trained and checkpointed.  Weight decay acts on matrices, not vectors.
    - `clip`: largest norm of the gradient, None for no clipping.  `schedule`: see `core.recipe`.
    - `precision`: "fp32", "bf16" (autocast, fp32 master weights) or "auto" (see `core.precision`).
    - `checkpoint`: a folder.  If it holds a checkpoint of this run, training goes on from it; one is written every
      `every` steps, at the end and on Ctrl-C.  `identity` (JSON-able, e.g. the method's configuration) tells this run
      from others where the arguments cannot: a loss is a closure.  `micro_batches` and processes may change on resume.
    - `until(done, model)` is asked after every step; True stops.
    - `progress`: the label of the bar on stderr, "" for none.

    Raises `InputError` for arguments that cannot work, for a checkpoint of another run, for a full disk, and when
    nothing can be learnt (no trainable parameter, a loss without gradient); `TrainingDiverged` when loss or gradient is
    not finite: the model then holds the last finite weights.  Ctrl-C finishes the step, writes a checkpoint and raises
    KeyboardInterrupt with a line that says how to go on.
    """
    recipe = Recipe(steps, lr, (betas[0], betas[1]), weight_decay, warmup, schedule, clip, micro_batches, seed)
    if every < 1:
        raise InputError(f"every must be at least 1, not {every}")
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise InputError("the model has no trainable parameter (all are frozen)")
    folder = None if checkpoint is None else Path(checkpoint)
    accelerator = _accelerator()
    precision = resolve(model, precision, accelerator.device)
    was_training = model.training
    model.train()
    try:
        with masters(model, precision):
            run = _Run(accelerator, model, loss, batches, recipe, precision, folder, identity)
            return run.train(every, until, progress)
    finally:
        model.train(was_training)
        model.zero_grad(set_to_none=True)


def _accelerator() -> Any:
    from accelerate import Accelerator  # here, because it takes long to import
    from accelerate.utils import DistributedDataParallelKwargs

    # A loss may use a part of the model only (the layers up to one, say), which DDP must be told.
    unused = DistributedDataParallelKwargs(find_unused_parameters=True)
    # "no": the precision is ours, run by run; Accelerate fixes its own for the life of the process.
    return Accelerator(mixed_precision="no", kwargs_handlers=[unused])


class _Objective(nn.Module):
    """Model and loss as one module: DDP and FSDP2 see one forward, whichever parts of the model the loss calls."""

    loss: Loss

    def __init__(self, model: nn.Module, loss: Loss, device: torch.device, precision: str):
        super().__init__()
        self.model = model
        self.__dict__["loss"] = loss  # not registered: only the model's parameters are trained
        self.context = (device, precision)

    def forward(self, batch: Any) -> tuple[Tensor, dict[str, Any]]:
        with autocast(*self.context):
            found = self.loss(self.model, batch)
        value, logs = found if isinstance(found, tuple) else (found, {})
        if not isinstance(value, Tensor) or value.numel() != 1:
            raise TypeError(f"a loss returns a scalar tensor, not {getattr(value, 'shape', type(value).__name__)}")
        return value.reshape(()), logs


@dataclass
class _Run:
    """One run in progress: the prepared objects, and what has been seen so far."""

    accelerator: Any
    model: nn.Module
    loss: Loss
    batches: Callable[[int], Any]
    recipe: Recipe
    precision: str
    folder: Path | None
    identity: Any
    done: int = 0
    losses: list[float] = field(default_factory=list)
    logs: dict[str, list[float]] = field(default_factory=dict)
    tokens: int = 0
    seconds: float = 0.0
    stopped: str = ""

    def __post_init__(self) -> None:
        self.device = self.accelerator.device
        self.identity = self._identity() if self.folder else None
        # FSDP2 cuts a copy into shards: the model that was passed in stays whole, and gets the weights back.
        self.trained = copy.deepcopy(self.model) if self.accelerator.is_fsdp2 else self.model
        objective = _Objective(self.trained, self.loss, self.device, self.precision)
        objective.to(self.device)
        matrices = [p for p in self.trained.parameters() if p.requires_grad and p.ndim >= 2]
        vectors = [p for p in self.trained.parameters() if p.requires_grad and p.ndim < 2]
        groups = [
            {"params": parameters, "weight_decay": decay}
            for parameters, decay in ((matrices, self.recipe.weight_decay), (vectors, 0.0))
            if parameters
        ]
        self.fused = self.device.type in _READ_EVERY
        self.adamw: Any = torch.optim.AdamW(groups, lr=self.recipe.lr, betas=self.recipe.betas, fused=self.fused)
        self.objective, self.optimizer = self.accelerator.prepare(objective, self.adamw)
        self.world = self.accelerator.num_processes
        self.read_every = _READ_EVERY.get(self.device.type, 1)
        self.pending: list[tuple[tuple[str, ...], Tensor]] = []
        self.bad: Tensor | None = None  # 1.0 once a loss or gradient was not finite; stays on the device
        self.pending_tokens = 0
        self.written: int | None = None

    # the steps

    def train(self, every: int, until: Callable[[int, nn.Module], bool] | None, label: str) -> Trace:
        try:
            self._train(every, until, label)
        except (TrainingDiverged, KeyboardInterrupt):  # of every process at once
            self._write_back()
            raise
        self._write_back()
        return Trace(self.model, self.losses, self.logs, self.done, self.tokens, self.seconds, self.stopped)

    def _train(self, every: int, until: Callable[[int, nn.Module], bool] | None, label: str) -> None:
        self._resume(until is not None)
        total = self.recipe.steps
        bar = Progress(label if self.accelerator.is_main_process else "", total, self.done)
        began = time.monotonic() - self.seconds
        with Interrupt() as interrupt, bar:
            while self.done < total and not self.stopped:
                self._step()
                last = self.done == total
                due = self.folder is not None and self.done % every == 0
                asked = False
                full = len(self.pending) >= self.read_every or until is not None
                if last or due or full or (interrupt.asked and self.world == 1):
                    asked = self._read(interrupt.asked, bar)
                if until is not None:
                    self._write_back()
                    if self._agree(until(self.done, self.model)):
                        self.stopped, last = "until", True
                    self.trained.train()
                self.seconds = time.monotonic() - began
                if self.folder and (last or due or asked):
                    self._save()
                if asked:
                    raise KeyboardInterrupt(self._how_to_go_on())

    def _write_back(self) -> None:
        if self.trained is not self.model:
            checkpoints.restore(self.model, checkpoints.gather(self.trained))

    def _step(self) -> None:
        seed_everything(self.recipe.seed, "step", self.done)
        for group in self.adamw.param_groups:
            group["lr"] = self.recipe.rate(self.done)
        self.adamw.zero_grad(set_to_none=True)
        batch = self.batches(self.done)
        shares = self.recipe.micro_batches * self.world
        sums: dict[str, Any] = {}
        for micro in range(self.recipe.micro_batches):
            piece = share(batch, micro * self.world + self.accelerator.process_index, shares)
            weight = _weight(batch, piece, shares)
            last = micro + 1 == self.recipe.micro_batches
            with nullcontext() if last else self.accelerator.no_sync(self.objective):
                value, logs = self.objective(to_device(piece, self.device))
                if not value.requires_grad:
                    raise InputError("the loss does not depend on any trainable parameter of the model")
                self.accelerator.backward(value * (weight * self.world))  # DDP and FSDP2 average over the processes
            for name, number in {"loss": value, **logs}.items():
                number = number.detach() if isinstance(number, Tensor) else number
                sums[name] = sums.get(name, 0.0) + weight * number
        self._update(sums)
        self.pending_tokens += count_tokens(batch)
        self.done += 1

    def _update(self, sums: dict[str, Any]) -> None:
        """Clip, and take the optimiser's step unless loss or gradient is not finite, now or in a step not read yet."""
        norm = self._clip()
        kind = torch.float64 if norm.dtype == torch.float64 else torch.float32
        numbers = torch.stack([torch.as_tensor(n, device=self.device).to(kind).reshape(()) for n in sums.values()])
        if self.world > 1:
            numbers = self.accelerator.reduce(numbers, reduction="sum")
        numbers = torch.cat([numbers, norm.detach().to(kind).reshape(1)])
        self.pending.append(((*sums, "grad_norm"), numbers))
        broken = ~torch.isfinite(numbers[0] + numbers[-1])
        if self.read_every == 1:
            if bool(broken):
                return
        else:  # the fused kernel reads the flag on the device, so the host need not wait for it
            flag = broken.to(torch.float32)
            self.bad = flag if self.bad is None else torch.maximum(self.bad, flag)
            self.adamw.found_inf = self.bad
        self.optimizer.step()

    def _clip(self) -> Tensor:
        """The norm of the gradient over all parameters; the gradient is scaled down to `clip` if it is longer."""
        parameters = [p for group in self.adamw.param_groups for p in group["params"]]
        norm = nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
        norm = norm.full_tensor() if hasattr(norm, "full_tensor") else norm
        clip = self.recipe.clip
        if clip is None or (norm.device.type == "cpu" and float(norm) < 0.99 * clip):  # would multiply by exactly 1
            return norm
        nn.utils.clip_grads_with_norm_(parameters, clip, norm)
        return norm

    def _read(self, asked: bool, bar: Progress) -> bool:
        """Bring the pending losses to the host and check them; True if any process was asked to stop."""
        values = iter(torch.cat([numbers for _, numbers in self.pending]).tolist())  # the one wait for the device
        for names, _ in self.pending:
            row = list(itertools.islice(values, len(names)))
            if not math.isfinite(row[0]) or not math.isfinite(row[-1]):
                raise self._diverged(row[0], row[-1])
            step = len(self.losses)
            self.losses.append(row[0])
            for name, number in zip(names[1:], row[1:], strict=True):
                series = self.logs.setdefault(name, [])
                series.extend([math.nan] * (step - len(series)))  # a log that was not there in every step
                series.append(number)
        self.pending.clear()
        norms = self.logs["grad_norm"]
        if len(norms) >= min(_IDLE_STEPS, self.recipe.steps) and not any(norms[:_IDLE_STEPS]):
            raise InputError(
                f"nothing to learn: the gradient is exactly 0 from the first step on (loss {self.losses[0]:.4g}); "
                "are all labels masked, or does the loss not reach the trainable parameters?"
            )
        bar.update(self.done, self.losses[-1], self.pending_tokens)
        self.tokens += self.pending_tokens
        self.pending_tokens = 0
        return self._agree(asked)

    def _agree(self, answer: bool) -> bool:
        """True if the answer of any process is: all go on, or all stop."""
        if self.world == 1:
            return bool(answer)
        flag = torch.tensor(float(answer), device=self.device)
        return bool(self.accelerator.reduce(flag, reduction="sum").item())

    def _diverged(self, value: float, norm: float) -> TrainingDiverged:
        step = len(self.losses)
        found = f"the loss is {value}" if not math.isfinite(value) else f"the norm of the gradient is {norm}"
        last = (step, self.losses[-1]) if self.losses else None
        kept = f"; the checkpoint of step {self.written} in {self.folder} is good" if self.written else ""
        return TrainingDiverged(step + 1, self.recipe.steps, found, last, self.recipe.rate(step), kept)

    def _how_to_go_on(self) -> str:
        where = f"stopped after step {self.done} of {self.recipe.steps}"
        if self.folder:
            return f"{where}; run the same again to go on from {self.folder}"
        return f"{where}; no checkpoint folder was given, so the same run would start anew"

    # checkpoints

    def _identity(self) -> dict[str, Any]:
        shapes = {name: list(p.shape) for name, p in self.model.named_parameters() if p.requires_grad}
        return {
            **self.recipe.fingerprint(),
            "precision": self.precision,
            "identity": self.identity,
            "parameters": shapes,
            "start": checkpoints.fingerprint(self.model),
            "data": checkpoints.data_fingerprint(self.batches),
        }

    def _save(self) -> None:
        assert self.folder is not None
        if self.written == self.done:
            return
        weights = checkpoints.gather(self.trained)
        moments = checkpoints.gather_optimizer(self.trained, self.adamw)
        series = {"loss": self.losses, **{f"log.{name}": values for name, values in self.logs.items()}}
        trace = {name: torch.tensor(values, dtype=torch.float64) for name, values in series.items()}
        state = {"tokens": self.tokens, "seconds": self.seconds, "stopped": self.stopped}
        if self.accelerator.is_main_process:
            checkpoints.write(self.folder, Checkpoint(self.done, weights, moments, trace, state, self.identity))
        self.accelerator.wait_for_everyone()
        self.written = self.done

    def _resume(self, has_stop_rule: bool) -> None:
        if self.folder is None:
            return
        if self.accelerator.is_main_process:
            checkpoints.clean(self.folder)
        saved = checkpoints.newest(self.folder, self.identity)
        self.accelerator.wait_for_everyone()
        if saved is None:
            return
        if saved.step > self.recipe.steps:
            raise InputError(f"{self.folder} holds a checkpoint of step {saved.step}, past steps={self.recipe.steps}")
        checkpoints.restore(self.trained, saved.weights)
        checkpoints.restore_optimizer(self.trained, self.adamw, saved.optimizer)
        self.losses = saved.trace["loss"].tolist()
        self.logs = {name[4:]: values.tolist() for name, values in saved.trace.items() if name.startswith("log.")}
        self.done = self.written = saved.step
        self.tokens, self.seconds = saved.state["tokens"], saved.state["seconds"]
        self.stopped = saved.state["stopped"] if has_stop_rule else ""


def _weight(whole: Any, piece: Any, shares: int) -> float:
    """How much a share's loss counts: 1 if losses divide by the step's totals, its part of the rows if not."""
    if shares == 1 or any(isinstance(leaf, Batch) for leaf in _leaves(whole)):
        return 1.0
    rows = [len(leaf) for leaf in _leaves(whole) if isinstance(leaf, Tensor) and leaf.ndim]
    if not rows:
        return 1.0 / shares  # nothing to share: every share sees the same
    if rows[0] < shares:
        raise InputError(f"a batch of {rows[0]} rows cannot be shared among {shares}: use a larger batch")
    return next(len(leaf) for leaf in _leaves(piece) if isinstance(leaf, Tensor) and leaf.ndim) / rows[0]


def _leaves(tree: Any) -> list[Any]:
    if isinstance(tree, dict):
        return [leaf for value in tree.values() for leaf in _leaves(value)]
    if isinstance(tree, list | tuple):
        return [leaf for value in tree for leaf in _leaves(value)]
    return [tree]
