"""What can be read off inside a model: a linear probe on each layer's hidden states, and each layer through the head.

A model may compute an answer and not say it.  The probe asks whether a linear map, fitted on facts that were to be kept
and on the other half of those to be forgotten, finds the truth of a fact in the state at its question's last token; its
selectivity (Hewitt & Liang 2019, arXiv:1909.03368) is what it finds beyond the same probe fitted to shuffled answers.
The logit lens (nostalgebraist 2020) lets every layer speak through the final norm and the output head; it needs no
fitting.  Sheet `sok_unlearning`, 2d.
Shapes: N facts, O options, M rows to fit on, L layers (0 is the embedding), D hidden units, C answers.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import torch
from torch import Tensor, nn

from palimpsest.audit.attack import Access, Reading, Side
from palimpsest.audit.facts import Facts, chosen_on_the_other_half, share
from palimpsest.core import losses
from palimpsest.core.errors import InputError
from palimpsest.core.seeds import numpy_rng
from palimpsest.data.batches import IGNORE
from palimpsest.models.anatomy import base_of
from palimpsest.models.score import by_tokens, evaluating
from palimpsest.models.states import decoder_of, last_states

if TYPE_CHECKING:
    from palimpsest.models.lm import LM


@dataclass(frozen=True)
class LinearProbe:
    """Ridge regression from a layer's state to the answer, one layer at a time; a value is 1 where the truth wins.

    The layer is chosen on the other half, by a probe fitted on kept facts alone.  Facts whose truth no fitted row has
    are NaN.
    """

    ridge: float = 0.03  # of the mean squared state, times the rows

    teaches = True
    access: ClassVar[Access] = "open-weights"

    def __call__(self, side: Side) -> Reading:
        if side.kept is None:
            raise InputError("a probe is fitted on retain records that are questions, and there are none")
        answers = sorted({*side.kept.truths, *side.facts.truths})
        if 2 * sum(truth in set(side.kept.truths) for truth in side.facts.truths) < len(side.facts):
            raise InputError("a probe needs answers that recur: most true answers are not among those of kept facts")
        known_LMD, asked_LND = (last_states(side.lm, facts.prompts) for facts in (side.kept, side.facts))
        classes = {answer: place for place, answer in enumerate(answers)}
        fitted, alone, shuffled = (np.empty(asked_LND.shape[:2]) for _ in range(3))
        rng = numpy_rng(side.seed, "shuffled answers")
        for half in (0, 1):
            scored, rest = np.flatnonzero(side.facts.fold == half), np.flatnonzero(side.facts.fold != half)
            own = _targets(side.kept, classes)
            both = np.concatenate([own, _targets(side.facts.select(rest), classes)])
            false = _shuffled(both, [*side.kept.options, *side.facts.select(rest).options], rng)
            for layer in range(len(asked_LND)):
                rows = np.concatenate([known_LMD[layer], asked_LND[layer][rest]])
                read = asked_LND[layer][scored]
                facts = side.facts.select(scored)
                for found, states, labels in (
                    (fitted, rows, both),
                    (shuffled, rows, false),
                    (alone, known_LMD[layer], own),
                ):
                    scores = _ridge(states, labels, len(answers), self.ridge, read)
                    found[layer, scored] = _right(scores, labels, facts, classes)
        trace = {
            "layers": np.nanmean(fitted, 1).tolist(),
            "shuffled": np.nanmean(shuffled, 1).tolist(),
            "selectivity": (np.nanmean(fitted, 1) - np.nanmean(shuffled, 1)).tolist(),
        }
        return Reading(chosen_on_the_other_half(fitted, side.facts, alone), trace)


@dataclass(frozen=True)
class LogitLens:
    """Every layer's state through the final norm and the output head; the layer is chosen on the other half."""

    teaches = False
    access: ClassVar[Access] = "open-weights"

    def __call__(self, side: Side) -> Reading:
        values = lens(side.lm, side.facts)
        return Reading(chosen_on_the_other_half(values, side.facts), {"layers": values.mean(1).tolist()})


def lens(lm: LM, facts: Facts) -> np.ndarray:
    """(L, N) the truth's share of all options' probability, as each layer's state would give it; no guard acts here."""
    pairs = [(prompt, option) for prompt, row in zip(facts.prompts, facts.options, strict=True) for option in row]
    encoded = lm.with_guard(None).encode(pairs)
    decoder, norm, head = decoder_of(lm.model), _final_norm(lm.model), base_of(lm.model).get_output_embeddings()
    if head is None:
        raise InputError(f"{type(lm.model).__name__} has no output head that can be addressed")
    sums: np.ndarray | None = None
    with evaluating(lm.model):
        for places in by_tokens(encoded.lengths):
            batch = encoded.batch(places).to(lm.device)
            states = decoder(**losses.inputs_of(batch), output_hidden_states=True).hidden_states
            labelled = batch.targets != IGNORE
            lines = torch.nonzero(labelled)[:, 0]
            if sums is None:
                sums = np.zeros((len(states), len(pairs)))
            for layer, state in enumerate(states):
                hidden = state[:, :-1][labelled]
                spoken = head(hidden if layer == len(states) - 1 else norm(hidden)).float().log_softmax(-1)
                taken = spoken.gather(1, batch.targets[labelled][:, None])[:, 0].double()
                sums[layer, places] = (
                    torch.zeros(len(places), dtype=torch.float64, device=lm.device)
                    .index_add_(0, lines, taken)
                    .cpu()
                    .numpy()
                )
    assert sums is not None
    return np.stack([share(row.reshape(len(facts), -1)) for row in sums])


def _final_norm(model: nn.Module) -> Any:
    """The norm between the last layer and the head: the last of the decoder's own parts whose only weight is a vector.

    `hidden_states` end with its output.
    """
    inside = {id(part) for stack in model.modules() if isinstance(stack, nn.ModuleList) for part in stack.modules()}
    norms = [
        module
        for module in decoder_of(model).modules()
        if id(module) not in inside
        and isinstance(weight := getattr(module, "weight", None), Tensor)
        and weight.ndim == 1
        and not list(module.children())
    ]
    return norms[-1] if norms else nn.Identity()


def _targets(facts: Facts, classes: dict[str, int]) -> np.ndarray:
    return np.array([classes[truth] for truth in facts.truths])


def _shuffled(labels: np.ndarray, options: Sequence[tuple[str, ...]], rng: np.random.Generator) -> np.ndarray:
    """The labels permuted among rows of the same kind: those whose options are drawn from the same answers."""
    kinds: list[set[str]] = []
    kind_of = []
    for row in options:
        place = next((n for n, kind in enumerate(kinds) if kind & set(row)), len(kinds))
        if place == len(kinds):
            kinds.append(set())
        kinds[place] |= set(row)
        kind_of.append(place)
    found = labels.copy()
    for kind in range(len(kinds)):
        places = np.flatnonzero(np.array(kind_of) == kind)
        found[places] = labels[rng.permutation(places)]
    return found


def _ridge(states: np.ndarray, labels: np.ndarray, classes: int, ridge: float, read: np.ndarray) -> np.ndarray:
    """(n, C) scores of `read` by ridge regression of one-hot labels on standardised states."""
    mean, spread = states.mean(0), states.std(0) + 1e-8
    x, y = (states - mean) / spread, np.eye(classes)[labels]
    offset = y.mean(0)
    weights = np.linalg.solve(x.T @ x + ridge * len(x) * np.eye(x.shape[1]), x.T @ (y - offset))
    return (read - mean) / spread @ weights + offset


def _right(scores: np.ndarray, labels: np.ndarray, facts: Facts, classes: dict[str, int]) -> np.ndarray:
    """(n,) 1 where the truth wins among the fact's options that some row was fitted to; NaN if it is not one."""
    fitted = np.isin(np.arange(scores.shape[1]), labels)
    found = np.full(len(facts), np.nan)
    for row, options in enumerate(facts.options):
        places = [classes[option] for option in options if option in classes]
        places = [place for place in places if fitted[place]]
        if fitted[classes[options[0]]] and len(places) > 1:
            found[row] = float(scores[row, places].argmax() == places.index(classes[options[0]]))
    return found
