"""Skill unlearning without training: shift the neurons that serve a skill, or cut them out.

Wang et al. 2025 (arXiv:2503.21730).  Neuron Adjust moves the pre-activations of a few feed-forward neurons from what
they are on the skill to what they are on other texts: a guard, so the weights stay, and this suppresses and removes
nothing.  Selective pruning, its baseline, edits weights.  The paper's other half, refusing prompts by their key, is in
key_space.py.  Need: some 200 short forget and retain records.  Dense feed-forward blocks only, gated or plain.
Shapes: B rows, T positions, L layers, F neurons a layer, Q chosen neurons.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from torch import Tensor

from palimpsest.core.errors import InputError
from palimpsest.core.methods import method
from palimpsest.core.seeds import torch_rng
from palimpsest.core.watch import Watch
from palimpsest.data.batches import Encoded
from palimpsest.forget.probing import Moments, enough, guard_of, mean_sizes, widths
from palimpsest.forget.unlearn import above_zero, check_share, distinct, plain, required
from palimpsest.models.anatomy import down_projection, feed_forward, hooked, layers, pre_activation, value_vectors
from palimpsest.models.guard import Prepared, register_guard

if TYPE_CHECKING:
    from palimpsest.data.request import ForgetRequest
    from palimpsest.models.lm import LM

Score = Literal["signed", "abs", "standardised"]
Replacement = Literal["reflect", "mean"]


@method(verb="forget", paper="skill_unlearning")
@dataclass(frozen=True, kw_only=True)
class NeuronAdjust:
    """Neuron Adjust: neurons that look as they do on the forget set are made to look as they do on the retain set.

    Given a model with such a guard already, the new adjustments are made after the old ones.
    """

    percent: float = 3.0  # of all feed-forward neurons, those of the highest score
    score: Score = "signed"  # mean on forget less mean on retain; its size; or that in deviations
    replacement: Replacement = "reflect"  # the mapped value mirrored at the retain mean, or the retain mean itself
    draw: bool = True  # replace with probability p_f / (p_f + p_r); without: wherever p_f >= p_r
    seed: int = 0

    def __post_init__(self) -> None:
        check_percent(self.percent)

    def __call__(self, lm: LM, request: ForgetRequest, *, watch: Watch | None = None) -> LM:
        guard = guard_of(lm, NeuronAdjuster)
        earlier = () if guard is None else guard.adjustments
        forget, retain = probes(lm, request)
        with adjusting(lm, earlier):
            there, here = Moments.of(lm, forget), Moments.of(lm, retain)
        layer, neuron = top(differences(there, here, self.score), self.percent)
        known = (there.mean, there.deviation, here.mean, here.deviation)
        statistics = {
            name: torch.stack([per[number][place] for number, place in zip(layer, neuron, strict=True)]).float()
            for name, per in zip(_STATISTICS, known, strict=True)
        }
        new = Adjustment(
            layer=torch.tensor(layer),
            neuron=torch.tensor(neuron),
            **statistics,
            replacement=self.replacement,
            draw=self.draw,
            seed=self.seed,
        )
        return lm.with_guard(NeuronAdjuster((*earlier, new)))


@method(verb="forget", paper="skill_unlearning")
@dataclass(frozen=True, kw_only=True)
class SelectivePruning:
    """Selective pruning: neurons that are large on the forget set and small on the retain set are cut out."""

    percent: float = 1.5

    def __post_init__(self) -> None:
        check_percent(self.percent)

    def __call__(self, lm: LM, request: ForgetRequest, *, watch: Watch | None = None) -> LM:
        lm = plain(lm)
        forget, retain = probes(lm, request)
        sizes = zip(mean_sizes(lm, forget), mean_sizes(lm, retain), strict=True)
        importance = [there / (here + 1e-8) for there, here in sizes]
        pruned = lm.copy()
        with torch.no_grad():
            for layer, neuron in zip(*top(importance, self.percent), strict=True):
                value_vectors(down_projection(feed_forward(layers(pruned.model)[layer])))[neuron] = 0.0
        return pruned


@dataclass(frozen=True, eq=False)
class Adjustment:
    """What happens to Q neurons: their distributions on forget and retain texts, (Q,) each."""

    layer: Tensor
    neuron: Tensor
    mean_forget: Tensor
    deviation_forget: Tensor
    mean_retain: Tensor
    deviation_retain: Tensor
    replacement: Replacement = "reflect"
    draw: bool = True
    seed: int = 0

    def __call__(self, values: Tensor, coins: Tensor, which: Tensor) -> Tensor:
        """Pre-activations (..., q) of the neurons at `which` (q,), adjusted; `coins` (..., q) are uniform numbers.

        x' = mean_r - deviation_r (x - mean_f) / deviation_f, which is the map to the retain distribution mirrored at
        its mean, where p_f >= p_r, with probability p_f / (p_f + p_r).
        """
        kept = {name: getattr(self, name)[which].to(values.device) for name in _STATISTICS}
        x = values.float()
        there = (x - kept["mean_forget"]) / kept["deviation_forget"]
        here = (x - kept["mean_retain"]) / kept["deviation_retain"]
        odds = 0.5 * (here.square() - there.square()) + (kept["deviation_retain"] / kept["deviation_forget"]).log()
        chosen = odds >= 0
        if self.draw:
            chosen = chosen & (coins < odds.sigmoid())
        new = kept["mean_retain"].expand_as(x)
        if self.replacement == "reflect":
            new = new - kept["deviation_retain"] * there
        return torch.where(chosen, new, x).to(values.dtype)

    def coins(self, vocabulary: int) -> tuple[Tensor, Tensor]:
        """A number a token (V,) and a number a neuron (Q,): (one + other) mod 1 is the coin of the pair.

        Every coin is uniform and any two are independent; and since they follow from what is read, not from where it
        stands in which batch, an answer is the same alone and among others.
        """
        tokens = torch.rand(vocabulary, generator=torch_rng(self.seed, "tokens"))
        return tokens, torch.rand(len(self.neuron), generator=torch_rng(self.seed, "neurons"))


_STATISTICS = ("mean_forget", "deviation_forget", "mean_retain", "deviation_retain")
_TENSORS = ("layer", "neuron", *_STATISTICS)


@contextmanager
def adjusting(lm: LM, adjustments: Sequence[Adjustment]) -> Iterator[None]:
    """Inside, the model's neurons are adjusted, whatever it reads."""
    embedding: Any = lm.model.get_input_embeddings()
    read: list[Tensor] = []

    def remember(module: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        read[:] = [inputs[0]]

    def adjust(adjustment: Adjustment, which: Tensor, place: slice, tokens: Tensor, own: Tensor):
        neuron = (adjustment.neuron[which] + place.start).to(lm.device)

        def hook(module: Any, inputs: Any, output: Tensor) -> Tensor:
            coins = (tokens[read[0]][..., None] + own).remainder(1.0)
            changed = output.clone()
            changed[..., neuron] = adjustment(output[..., neuron], coins, which)
            return changed

        return hook

    pairs: list[tuple[Any, Any]] = [(embedding, remember)]
    for adjustment in adjustments:
        tokens, own = (part.to(lm.device) for part in adjustment.coins(embedding.num_embeddings))
        for number, layer in enumerate(layers(lm.model)):
            which = (adjustment.layer == number).nonzero().flatten()
            if len(which):
                module, place = pre_activation(feed_forward(layer))
                pairs.append((module, adjust(adjustment, which, place, tokens, own[which.to(lm.device)])))
    with hooked(*pairs):
        yield


@register_guard("neuron-adjust")
@dataclass(frozen=True, eq=False)
class NeuronAdjuster:
    """Adjusts neurons while the model reads and answers, whatever it is asked."""

    adjustments: tuple[Adjustment, ...]

    def prepare(self, lm: LM, prompts: Sequence[str]) -> Prepared:
        sizes = widths(lm.model)
        for one in self.adjustments:
            if len(one.layer) and int(one.layer.max()) >= len(sizes):
                raise InputError(f"these adjustments reach layer {int(one.layer.max())}, the model has {len(sizes)}")
        return Prepared(prompts, lambda rows, prompt: adjusting(lm, self.adjustments))

    def state(self) -> tuple[dict[str, Any], dict[str, Tensor]]:
        names = ("replacement", "draw", "seed")
        settings = [{name: getattr(one, name) for name in names} for one in self.adjustments]
        tensors = {f"{n}.{name}": getattr(one, name) for n, one in enumerate(self.adjustments) for name in _TENSORS}
        return {"adjustments": settings}, tensors

    @classmethod
    def restore(cls, settings: dict[str, Any], tensors: dict[str, Tensor]) -> NeuronAdjuster:
        return cls(
            tuple(
                Adjustment(**{**{name: tensors[f"{number}.{name}"] for name in _TENSORS}, **own})
                for number, own in enumerate(settings["adjustments"])
            )
        )


def differences(there: Moments, here: Moments, score: Score) -> list[Tensor]:
    """How much each neuron serves the forget set, (F,) a layer.  `InputError` if the two sets do not differ at all."""
    gaps = [one - other for one, other in zip(there.mean, here.mean, strict=True)]
    if not any(bool(gap.any()) for gap in gaps):
        raise InputError("the neurons are the same on the forget and the retain set: there is no skill to tell apart")
    if score == "signed":
        return gaps
    if score == "abs":
        return [gap.abs() for gap in gaps]
    spreads = zip(there.deviation, here.deviation, strict=True)
    return [gap.abs() / (one + other) for gap, (one, other) in zip(gaps, spreads, strict=True)]


def top(scores: Sequence[Tensor], percent: float) -> tuple[list[int], list[int]]:
    """The layers and numbers of the neurons of the highest score, pooled over all layers; at least one."""
    pooled = torch.cat(list(scores))
    count = max(1, round(len(pooled) * percent / 100))
    order = torch.argsort(pooled, descending=True, stable=True)[:count].sort().values
    ends = np.cumsum([len(layer) for layer in scores])
    found = np.searchsorted(ends, order.numpy(), side="right")
    starts = np.r_[0, ends[:-1]]
    return found.tolist(), (order.numpy() - starts[found]).tolist()


def check_percent(percent: float) -> None:
    above_zero(percent=percent)
    if percent > 100:
        raise InputError(f"percent must lie in (0, 100], not {percent:g}")


def probes(lm: LM, request: ForgetRequest) -> tuple[Encoded, Encoded]:
    """The forget and the retain records as tokens, after a look at whether they will do."""
    check_share(request)
    widths(lm.model)
    pairs = lm.pairs(distinct(request.forget)), lm.pairs(required(request.retain, "retain"))
    forget, retain = (lm.encode(enough(rows, name)) for rows, name in zip(pairs, ("forget", "retain"), strict=True))
    return forget, retain
