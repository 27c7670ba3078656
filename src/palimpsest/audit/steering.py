"""Activation steering: push the model, while it runs, from where it refuses to where it answers.

The direction is the difference of mean states at a layer, at the last token of questions about what was to be kept and
about the other half of what was to be forgotten; it needs no answer.  If forgetting is a detour in the activations
(refusal, misdirection), adding the direction undoes it.  (Sheet `sok_unlearning`, 2d; direction as in Arditi et al.
2024, arXiv:2406.11717.)  Needs layers that can be addressed.  Shapes: B rows, T tokens, D hidden units, K ways.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from palimpsest.audit.attack import Access, Reading, Side
from palimpsest.audit.facts import chosen_on_the_other_half, known
from palimpsest.core.errors import InputError
from palimpsest.models.anatomy import hooked, layers, output_of, with_output
from palimpsest.models.score import evaluating
from palimpsest.models.states import prompt_batches

if TYPE_CHECKING:
    from palimpsest.models.lm import LM


@dataclass(frozen=True)
class Steering:
    """Add the direction at a layer, at every token; layer and strength are chosen on the other half."""

    strengths: tuple[float, ...] = (1.0, 2.0)
    most_layers: int = 3  # spread over the depth

    teaches = False
    access: ClassVar[Access] = "open-weights"

    def __post_init__(self) -> None:
        if not self.strengths or self.most_layers < 1:
            raise InputError("steering needs at least one strength and one layer")

    def __call__(self, side: Side) -> Reading:
        if side.kept is None:
            raise InputError("steering needs retain records that are questions, to see where the model answers")
        facts, stack = side.facts, layers(side.lm.model)
        places = np.unique(np.linspace(0, len(stack) - 1, min(self.most_layers, len(stack))).round().astype(int))
        values, names = [], []
        answering = {place: layer_states(side.lm, list(side.kept.prompts), int(place)).mean(0) for place in places}
        forgotten = {place: layer_states(side.lm, list(facts.prompts), int(place)) for place in places}
        for place in places:
            for strength in self.strengths:
                row = np.empty(len(facts))
                for half in (0, 1):
                    scored, rest = np.flatnonzero(facts.fold == half), np.flatnonzero(facts.fold != half)
                    push = strength * (answering[place] - forgotten[place][rest].mean(0))
                    with hooked((stack[place], _adding(push))):
                        row[scored] = known(side.lm, facts.select(scored))
                values.append(row)
                names.append(f"layer {place + 1}, {strength:g}")
        table = np.stack(values)
        trace = {"ways": dict(zip(names, table.mean(1).tolist(), strict=True))}
        return Reading(chosen_on_the_other_half(table, facts), trace)


def layer_states(lm: LM, prompts: list[str], layer: int) -> Tensor:
    """(N, D) float32 output of a layer at the last token of each prompt, before any final norm."""
    found: list[Any] = [None] * len(prompts)
    seen: list[Tensor] = []

    def keep(module: Any, inputs: Any, output: Any) -> None:
        seen[:] = [output_of(output)]

    with evaluating(lm.model), hooked((layers(lm.model)[layer], keep)):
        for places, tokens, last in prompt_batches(lm, prompts):
            lm.model(input_ids=tokens, attention_mask=torch.ones_like(tokens), use_cache=False)
            states = seen[0][torch.arange(len(places), device=lm.device), last].float().clone()
            for place, state in zip(places, states, strict=True):
                found[place] = state
    return torch.stack(found)


def _adding(push: Tensor) -> Any:
    def hook(module: Any, inputs: Any, output: Any) -> Any:
        hidden = output_of(output)
        return with_output(output, hidden + push.to(hidden))

    return hook
