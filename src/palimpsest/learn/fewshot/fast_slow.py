"""Fast and slow learning: a neural memory whose controllers are trained across short windows by synthetic gradients.

"Fast & Slow Learning", 2020 (arXiv:2011.05438).  Only the abstract could be read: that the controllers of a memory are
decoupled by synthetic gradients is the paper's; the memory follows its authors' earlier work (the read weight also
erases and writes), the rest Decoupled Neural Interfaces (arXiv:1608.05343), put together by us.
An episode is a stream: supports with their labels are written to memory one after the other, then each query is
answered from the memory they left, by itself.  The stream is cut into windows of `window` supports.  At a window's end
the loss is not known yet; truncation would take its gradient for zero, a feedback network predicts it instead, and is
trained towards the true gradient (at the last window) or towards one that it predicted itself further on.
Memory for activations is that of one window, however long the stream.  Answers are for the number of ways trained on.
Needs a warm start: untrained, nothing is read from memory, so no gradient reaches it that could be predicted.
Shapes: E episodes, S supports, Q queries, N classes, d dimensions of the embedding, L slots of D numbers.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from palimpsest.core.errors import InputError, unknown
from palimpsest.core.methods import method
from palimpsest.core.seeds import torch_rng
from palimpsest.learn.fewshot.episodic import Batch, Episodic, Network, cross_entropy, embedded
from palimpsest.models.convnet import network_for

Tail = Literal["synthetic", "zero", "exact"]
TAILS: tuple[Tail, ...] = ("synthetic", "zero", "exact")

_FEEDBACK_NORM = 0.1  # of the feedback's gradient: it must not use up the clipping of the controllers'


class State(NamedTuple):
    """What a stream carries from step to step; also a gradient with respect to it."""

    read: Tensor  # (E, D) output of the reading LSTM
    read_cell: Tensor  # (E, D)
    write: Tensor  # (E, D)
    write_cell: Tensor  # (E, D)
    memory: Tensor  # (E, L, D)

    def leaf(self) -> State:
        """The same numbers, cut off from how they came about, wanting a gradient."""
        return State(*(part.detach().requires_grad_() for part in self))


@method(verb="learn", paper="fast_slow")
@dataclass(frozen=True, kw_only=True)
class FastSlow(Episodic):
    """Neural memory trained across short windows by synthetic gradients, which a feedback network predicts.

    `tail`: the gradient at the end of a window is "synthetic", "zero" (truncated back-propagation) or "exact" (full
    back-propagation, which keeps the whole stream).
    """

    fixed_way: ClassVar[bool] = True

    episodes: int = 16
    slots: int = 8
    memory_width: int = 32
    sharpness: float = 4.0  # attention logits are multiplied by it
    window: int = 4  # supports
    tail: Tail = "synthetic"
    warm_up: float = 0.3  # share of the training with the exact gradient, from which the feedback network learns too
    conditioned: bool = True  # in training, tell the feedback network of the queries to come and their labels
    injection: float = 1.0  # weight of the synthetic gradient
    feedback_width: int = 64

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.tail not in TAILS:
            raise unknown("tail", self.tail, TAILS)
        sizes = {name: getattr(self, name) for name in ("slots", "memory_width", "window", "feedback_width")}
        for name, value in sizes.items():
            if value < 1:
                raise InputError(f"{name} must be at least 1, not {value}")
        if self.sharpness <= 0 or not 0 <= self.warm_up <= 1 or not 0 < self.injection <= 1:
            values = f"sharpness={self.sharpness}, warm_up={self.warm_up}, injection={self.injection}"
            raise InputError(f"{values}: wanted above 0, from 0 to 1, and above 0 up to 1")

    def build(self, x: Any, way: int) -> nn.Module:
        if len(getattr(x, "shape", ())) == 3:
            raise InputError("fast-slow reads one vector an input: leave out the views")
        encoder = network_for(x, width=self.width, norm=self.norm)
        memory = Memory(encoder.dimensions, way, self.slots, self.memory_width, self.sharpness)
        told = way * self.memory_width if self.conditioned else 0
        return Network(encoder, memory=memory, feedback=Feedback(self.memory_width, told, self.feedback_width))

    def scores(self, network: Any, support: Tensor, labels: Tensor, query: Tensor, way: int) -> Tensor:
        """Supports are written in one fixed order drawn from the seed: tasks tend to come sorted by class."""
        order = torch.randperm(labels.shape[1], generator=torch_rng(self.seed, "order", labels.shape[1]))
        support, labels = support[:, order], labels[:, order]
        return network.memory.answer(query, network.memory.listen(support, labels, network.memory.start(len(support))))

    def loss(self, network: Any, batch: Batch, way: int) -> tuple[Tensor, dict[str, Tensor]]:
        """The mean cross-entropy of the queries, with the gradient that `tail` gives it."""
        support, query = embedded(network, batch)
        order = torch.rand(support.shape[:2]).argsort(1).to(support.device)
        labels = batch["support_labels"].gather(1, order)
        support = support.gather(1, order[..., None].expand_as(support))
        warm = int(batch["number"][0]) < self.warm_up * self.steps * self.episodes
        found = self.gradients(network, support, labels, query, batch["labels"], "exact" if warm else self.tail)
        # linear in what is trained, with the gradients that were found as its slopes: `fit` needs a loss
        linear = (support * found.support).sum() + (query * found.query).sum()
        for parameter, gradient in zip(_trained(network.memory), found.parameters, strict=True):
            linear = linear + (parameter * gradient).sum()
        logs: dict[str, Tensor] = {}
        if self.tail == "synthetic":
            slow, logs = self.feedback_loss(network, found)
            weights = _trained(network.feedback)
            if weights:
                gradients = torch.autograd.grad(slow, weights)
                norm = nn.utils.get_total_norm(gradients)
                scale = (_FEEDBACK_NORM / norm.clamp_min(1e-12)).clamp_max(1)
                linear = linear + sum((w * g * scale).sum() for w, g in zip(weights, gradients, strict=True))
        return found.loss + (linear - linear.detach()), logs

    def gradients(
        self, network: Any, support: Tensor, labels: Tensor, query: Tensor, answers: Tensor, tail: Tail
    ) -> Gradients:
        """Of the mean loss over the queries (E, Q, d) after supports (E, S, d) in their order, under `tail`.

        One window's graph is alive at a time unless `tail` is "exact".
        """
        memory = network.memory
        parameters = _trained(memory)
        support, query = support.detach().requires_grad_(), query.detach().requires_grad_()
        told = memory.told(query, answers).detach() if self.conditioned else None
        sums = [torch.zeros_like(one) for one in (*parameters, support, query)]
        pairs: list[tuple[State, State]] = []
        scale = answers.numel()  # gradients are of a mean over so many; the feedback network sees them at order 1

        def back(outputs: Sequence[Tensor], slopes: Sequence[Tensor] | None, states: Sequence[State]) -> None:
            """One backward pass: add to the sums, and pair each state with its gradient."""
            wanted = [*parameters, support, query, *(part for state in states for part in state)]
            found = torch.autograd.grad(outputs, wanted, slopes, allow_unused=True)
            for total, gradient in zip(sums, found[: len(sums)], strict=True):
                if gradient is not None:
                    total += gradient
            for number, state in enumerate(states):
                parts = found[len(sums) + 5 * number : len(sums) + 5 * (number + 1)]
                assert parts[-1] is not None, "the memory was not read"
                full = (torch.zeros_like(p) if g is None else g for p, g in zip(state, parts, strict=True))
                pairs.append((state, State(*(scale * gradient for gradient in full))))

        state = memory.start(len(support))
        ends: list[State] = []
        for first in range(0, labels.shape[1], self.window):
            part = slice(first, first + self.window)
            with torch.set_grad_enabled(tail != "zero"):
                end = memory.listen(support[:, part], labels[:, part], state)
            if tail == "exact":
                ends.append(end)
                state = end
                continue
            if tail == "synthetic":
                with torch.no_grad():
                    ahead = network.feedback(end, told)
                    slopes = [limited(one, query.shape[1]) * (self.injection / scale) for one in ahead]
                back(end, slopes, [state] if first else [])
            state = end.leaf()
        loss = cross_entropy(memory.answer(query, state), answers)
        back([loss], None, ends or [state])
        *of_parameters, of_support, of_query = sums
        return Gradients(loss.detach(), of_parameters, of_support, of_query, pairs, told)

    def feedback_loss(self, network: Any, found: Gradients) -> tuple[Tensor, dict[str, Tensor]]:
        """Mean over states and episodes of the squared distance of predicted from found gradients; and the cosine."""
        losses, cosines = [], []
        for state, target in found.states:
            guess = network.feedback(State(*(part.detach() for part in state)), found.told)
            gaps = [(g - t).square().flatten(1).sum(1) for g, t in zip(guess, target, strict=True)]
            losses.append(torch.stack(gaps).sum(0).mean())
            memories = guess.memory.detach().flatten(1), target.memory.flatten(1)
            cosines.append(F.cosine_similarity(*memories, dim=1).mean())
        loss = torch.stack(losses).mean()
        return loss, {"feedback": loss.detach(), "cosine": torch.stack(cosines).mean()}


@dataclass(frozen=True)
class Gradients:
    """The loss of a batch, the gradients that were found for it, and what the feedback network is to learn from."""

    loss: Tensor
    parameters: list[Tensor]  # of the memory, in the order of its trained parameters
    support: Tensor  # (E, S, d)
    query: Tensor  # (E, Q, d)
    states: list[tuple[State, State]]  # at the windows' ends, with their gradients times E Q
    told: Tensor | None  # (E, N D)


class Memory(nn.Module):
    """Slots with three controllers: one reads, one composes what is to be kept, one writes."""

    def __init__(self, dimensions: int, way: int, slots: int, width: int, sharpness: float):
        super().__init__()
        self.way, self.width, self.sharpness = way, width, sharpness
        self.input = nn.Linear(dimensions, width)
        self.label = nn.Linear(way, width, bias=False)
        self.reader = nn.LSTMCell(width, width)
        self.key = nn.Linear(width, width)
        self.composer = nn.Sequential(nn.Linear(3 * width, width), nn.ReLU(), nn.Linear(width, width))
        self.writer = nn.LSTMCell(width, width)
        self.value = nn.Linear(width, width)
        self.output = nn.Linear(width, way)
        self.first = nn.Parameter(torch.randn(slots, width))  # small or equal slots would never part

    def start(self, episodes: int) -> State:
        """The state before an episode: nothing is carried over from another."""
        zeros = self.first.new_zeros(episodes, self.width)
        return State(zeros, zeros, zeros, zeros, self.first.expand(episodes, -1, -1))

    def listen(self, support: Tensor, labels: Tensor, state: State) -> State:
        """The state after (E, S, d) supports with labels (E, S), one after the other."""
        marked = self.input(support) + self.label(F.one_hot(labels, self.way).to(support.dtype))
        for e in marked.relu().unbind(1):
            state = self.step(e, state)
        return state

    def step(self, e: Tensor, state: State) -> State:
        """Read with an input (E, D), compose, and write where it was read: M (1 - a) + a v, slot by slot."""
        read, read_cell = self.reader(e, (state.read, state.read_cell))
        weights, found = self.look(e[:, None], state.memory)
        composed = self.composer(torch.cat([read, found[:, 0], e], -1))
        write, write_cell = self.writer(composed, (state.write, state.write_cell))
        a = weights[:, 0, :, None]
        memory = state.memory * (1 - a) + a * self.value(write)[:, None]
        return State(read, read_cell, write, write_cell, memory)

    def look(self, e: Tensor, memory: Tensor) -> tuple[Tensor, Tensor]:
        """Read weights (E, Q, L) of inputs (E, Q, D), and what is read (E, Q, D)."""
        weights = (self.key(e) @ memory.transpose(1, 2) * (self.sharpness / self.width**0.5)).softmax(-1)
        return weights, weights @ memory

    def answer(self, query: Tensor, state: State) -> Tensor:
        """Logits (E, Q, N): each query (E, Q, d) takes one step from the same state, and writes nothing."""
        e = self.input(query).relu()
        before = (part[:, None].expand(e.shape).flatten(0, 1) for part in (state.read, state.read_cell))
        read, _ = self.reader(e.flatten(0, 1), tuple(before))
        _, found = self.look(e, state.memory)
        return self.output(self.composer(torch.cat([read.view(e.shape), found, e], -1)))

    def told(self, query: Tensor, labels: Tensor) -> Tensor:
        """(E, N D): the inputs of the queries to come, averaged class by class.  Known in training alone."""
        members = F.one_hot(labels, self.way).to(query.dtype)
        means = members.transpose(1, 2) @ self.input(query).relu()
        return (means / members.sum(1).clamp_min(1)[..., None]).flatten(1)


class Feedback(nn.Module):
    """Predicts the gradient with respect to a `State`; zero until it has learnt something.

    Its unit is that of a loss summed over an episode's queries.  Two networks: one for the controllers, one that every
    slot goes through.
    """

    def __init__(self, width: int, told: int, hidden: int):
        super().__init__()
        self.width = width
        self.controllers = _perceptron(5 * width + told, hidden, 4 * width)
        self.slots = _perceptron(5 * width + told, hidden, width)
        for part in (self.controllers, self.slots):
            for parameter in part[-1].parameters():
                nn.init.zeros_(parameter)

    def forward(self, state: State, told: Tensor | None = None) -> State:
        *controllers, memory = state
        context = torch.cat([*controllers, *([] if told is None else [told])], -1)
        each = torch.cat([context[:, None].expand(-1, memory.shape[1], -1), memory], -1)
        parts = self.controllers(torch.cat([context, memory.mean(1)], -1)).split(self.width, dim=-1)
        return State(*(*parts, self.slots(each)))


def limited(gradient: Tensor, longest: float) -> Tensor:
    """Each episode's part of a gradient (E, ...), no longer than `longest`: a wrong one must not blow up a cell."""
    norms = gradient.flatten(1).norm(dim=1).clamp_min(1e-12)
    return gradient * (longest / norms).clamp_max(1).view(-1, *[1] * (gradient.ndim - 1))


def _perceptron(inputs: int, hidden: int, outputs: int) -> nn.Sequential:
    return nn.Sequential(nn.Linear(inputs, hidden), nn.ReLU(), nn.Linear(hidden, outputs))


def _trained(module: nn.Module) -> list[nn.Parameter]:
    return [parameter for parameter in module.parameters() if parameter.requires_grad]
