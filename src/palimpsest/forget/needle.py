"""Needle: put noise on the value vectors that write a concept, and leave every other weight as it is.

Hong et al. 2024 (ConceptVectors, arXiv:2406.11614).  An oracle eraser: it damages exactly the vectors that hold a
concept, so it shows what an unlearner would have to change; optionally, gradient ascent confined to these vectors goes
on from there.  Needs: forget records about one concept or several (column ``concept`` or ``person``), and retain
records unless there are several; a dense model.  What a model holds in attention or spread over many vectors stays.
The vectors are those that write the concept's words most; the audit `concept-vectors` tells which of them matter, and
`targets` takes them.  Shapes: n vectors, D hidden units.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from palimpsest.core.errors import InputError
from palimpsest.core.methods import config_of, method
from palimpsest.core.watch import Watch
from palimpsest.data.batches import Batches, Together
from palimpsest.data.records import concat
from palimpsest.forget.ascent import gradient_ascent
from palimpsest.forget.unlearn import above_zero, distinct, finished, not_negative, plain, required
from palimpsest.models.anatomy import value_vectors
from palimpsest.models.concept_vectors import (
    Place,
    by_concept,
    find,
    noise,
    projections,
    read_all,
    vectors_at,
)

if TYPE_CHECKING:
    from palimpsest.data.request import ForgetRequest
    from palimpsest.models.lm import LM


@method(verb="forget", paper="conceptvectors")
@dataclass(frozen=True, kw_only=True)
class Needle:
    """Needle: noise on the few value vectors that write the concept, then maybe gradient ascent on these alone."""

    targets: tuple[Place, ...] = ()  # (layer, neuron) pairs to damage, instead of vectors looked for
    vectors: int = 4  # of each concept, at most: those that add most to the logits of its words
    strength: float = 5.0  # length of the noise in lengths of the vector: what the paper's 0.1 an element comes to
    keep: float = 0.3  # share of all vectors that is looked at, those of the highest top logits
    clarity: float = 0.0  # share of a vector's top words that must be the concept's
    steps: int = 0  # of gradient ascent on the vectors alone, after the noise
    lr: float = 0.1
    batch_size: int = 32
    seed: int = 0

    def __post_init__(self) -> None:
        object.__setattr__(self, "targets", tuple((int(layer), int(neuron)) for layer, neuron in self.targets))
        above_zero(vectors=self.vectors, keep=self.keep, lr=self.lr, batch_size=self.batch_size)
        not_negative(strength=self.strength, steps=self.steps)
        if self.keep > 1 or not 0 <= self.clarity <= 1:
            raise InputError(f"keep={self.keep:g} and clarity={self.clarity:g} are shares: at most 1")
        if self.strength == 0 and self.steps == 0:
            raise InputError("strength 0 and steps 0 change nothing: give one of them")

    def __call__(self, lm: LM, request: ForgetRequest, *, watch: Watch | None = None) -> LM:
        lm = plain(lm)
        places = list(dict.fromkeys(self.targets or self.look(lm, request)))
        drawn = noise(vectors_at(lm.model, places), places, self.strength, self.seed)
        after = lm.copy()
        after.model.float()
        with torch.no_grad():
            for (layer, neuron), added in zip(places, drawn, strict=True):
                vector = value_vectors(projections(after.model)[layer])[neuron]
                vector += added.to(vector)
        if self.steps:
            self._ascend(after, request, places, watch or Watch())
        return finished(lm, after.model)

    def look(self, lm: LM, request: ForgetRequest) -> list[Place]:
        """The vectors that write each concept of the forget records.  `InputError` where one has none."""
        tables = by_concept(distinct(request.forget), request.name)
        written = read_all(lm.model)
        found: list[Place] = []
        for name, own in tables.items():
            rest = [table for other, table in tables.items() if other != name]
            others = concat(*rest, request.retain) if rest else required(request.retain, "retain")
            vectors = find(
                lm,
                lm.encode(own),
                lm.encode(others),
                written,
                keep=self.keep,
                clarity=self.clarity,
                most=self.vectors,
            )
            if not vectors:
                raise InputError(
                    f"no value vector writes the words of '{name}': lower clarity ({self.clarity:g}), raise keep "
                    f"({self.keep:g}), or take a method that changes all weights"
                )
            found += [vector.place for vector in vectors]
        return found

    def _ascend(self, after: LM, request: ForgetRequest, places: Sequence[Place], watch: Watch) -> None:
        """Gradient ascent on the forget records, in place; only the vectors at `places` move."""
        told = {name: value for name, value in config_of(self).items() if name != "steps"}  # free on resume
        encoded = after.encode(request.forget)
        batches = Batches(encoded, min(self.batch_size, len(encoded)), self.seed)
        with only(after.model, places):
            watch.fit(
                "needle",
                after.model,
                lambda model, batch: gradient_ascent(model, batch["forget"]),
                Together(forget=batches),
                steps=self.steps,
                lr=self.lr,
                weight_decay=0.0,  # it would move the other vectors, which share a matrix with these
                seed=self.seed,
                identity={"method": "Needle", **told},
            )


@contextmanager
def only(model: nn.Module, places: Sequence[Place]) -> Iterator[None]:
    """Inside, only the value vectors at `places` have a gradient; those beside them in a matrix get exactly 0."""
    before = [(p, p.requires_grad) for p in model.parameters()]
    for p, _ in before:
        p.requires_grad_(False)
    with ExitStack() as hooks:
        for layer, projection in enumerate(projections(model)):
            neurons = [neuron for number, neuron in places if number == layer]
            if neurons:
                weight: Any = projection.weight
                weight.requires_grad_(True)
                kept = torch.zeros_like(weight)
                rows = kept if value_vectors(projection) is weight else kept.T
                rows[neurons] = 1.0
                hooks.callback(weight.register_hook(_times(kept)).remove)
        try:
            yield
        finally:
            for p, trained in before:
                p.requires_grad_(trained)
                p.grad = None


def _times(kept: Tensor) -> Any:
    return lambda gradient: gradient * kept
