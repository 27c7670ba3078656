"""Concept vectors: the rows of feed-forward value matrices that write the words of one concept.

Hong et al. 2024 (arXiv:2406.11614).  A feed-forward block writes ``sum_j m_j v_j`` into the residual stream; read
through the output embedding E, ``E v_j`` says which words a value vector v_j makes likelier.  A judge (GPT-4 in the
paper) calls a vector clear if its top words are about one concept; here the share of its top words that are
characteristic of the concept's records stands in for it.  Ours as well: where gates make an activation negative, a
vector counts for what it then writes, its opposite; and candidates are ordered by what they in fact contribute to the
records' own words.  Knows nothing of unlearning.
Shapes: L layers, F neurons a layer, D hidden units, V words, K top words, n chosen vectors, P positions.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from palimpsest.core import losses
from palimpsest.core.errors import InputError
from palimpsest.core.reference import passes
from palimpsest.core.seeds import torch_rng
from palimpsest.data.batches import Encoded
from palimpsest.models.anatomy import base_of, down_projection, feed_forward, hooked, layers, value_vectors
from palimpsest.models.experts import mixture_in

if TYPE_CHECKING:
    from datasets import Dataset

    from palimpsest.models.lm import LM

Place = tuple[int, int]  # (layer, neuron)

JUDGED = 10  # top words that clarity looks at
_TIMES = 4  # as frequent as elsewhere is characteristic
_LARGEST_SHARE = 20  # at most a 20th of all words is characteristic of one concept: else chance would look clear
_LOGITS_AT_ONCE = 2**24


@dataclass(frozen=True)
class ConceptVector:
    """A value vector that writes a concept's words."""

    layer: int
    neuron: int
    sign: int  # 1, or -1 where the activations on the concept are negative, so that the opposite is written
    clarity: float  # share of its top words that are characteristic of the concept
    score: float  # mean logit of its K top words
    attribution: float  # what it adds to the logits of the concept's words, over other words, in the concept's records
    words: tuple[int, ...]  # the top words that clarity looked at

    @property
    def place(self) -> Place:
        return self.layer, self.neuron


@dataclass(frozen=True, eq=False)
class Written:
    """What all value vectors of a model write: for each layer, of each vector and of its opposite, (2, F, ...)."""

    scores: list[Tensor]  # (2, F): mean logit of the K top words
    words: list[Tensor]  # (2, F, JUDGED): the first of them


def projections(model: nn.Module) -> list[nn.Module]:
    """The down projection of every layer, whose rows `value_vectors` shows.

    Raises `InputError` for a model whose feed-forward is not addressable: a mixture of experts, quantised weights, or
    no output embedding to read vectors with.
    """
    name = type(base_of(model)).__name__
    found = []
    for number, layer in enumerate(layers(model)):
        block = feed_forward(layer)
        if mixture_in(block) is not None:
            raise InputError(
                f"{name} is a mixture of experts (layer {number}): its feed-forward is not addressable by value "
                "vectors, which takes a dense model"
            )
        found.append(down_projection(block))
    weights = [value_vectors(projection) for projection in found]
    if not all(weight.is_floating_point() for weight in weights):
        raise InputError(f"the weights of {name} are quantised: load it in float32 or bfloat16 to read value vectors")
    unembedding(model)
    return found


def unembedding(model: nn.Module) -> Tensor:
    """E, the (V, D) rows of the output embedding.  `InputError` for a model without one."""
    head: Any = base_of(model).get_output_embeddings()
    weight = getattr(head, "weight", None)
    if not isinstance(weight, Tensor) or weight.ndim != 2 or not weight.is_floating_point():
        raise InputError(f"{type(base_of(model)).__name__} has no output embedding to read value vectors with")
    return weight.detach()


def vectors_at(model: nn.Module, places: Sequence[Place]) -> Tensor:
    """The value vectors at `places`, copied: (n, D) float32.  `InputError` for a place that the model has not."""
    found = [value_vectors(projection).detach() for projection in projections(model)]
    for layer, neuron in places:
        if not (0 <= layer < len(found) and 0 <= neuron < len(found[layer])):
            raise InputError(
                f"there is no value vector {neuron} in layer {layer}: this model has layers 0 to {len(found) - 1} "
                f"with vectors 0 to {len(found[0]) - 1}"
            )
    if not places:
        return torch.empty(0, found[0].shape[1])
    return torch.stack([found[layer][neuron].float().cpu() for layer, neuron in places])


def word_count(vocabulary: int, wanted: int = 0) -> int:
    """K: `wanted`, or the paper's 200, in a small vocabulary a fiftieth of it but at least 10."""
    if wanted > vocabulary // 2:
        raise InputError(f"the top {wanted} of {vocabulary} words are no choice: give at most half of them")
    return wanted or min(200, max(10, vocabulary // 50))


def top_words(vectors: Tensor, embedding: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """The logits and numbers of the words that each of (n, D) vectors makes likeliest, (n, count) each, best first."""
    logits = vectors.to(embedding.device).float() @ embedding.float().T
    return logits.topk(count, dim=1)


@torch.no_grad()
def read_all(model: nn.Module, words: int = 0) -> Written:
    """What every value vector and its opposite write; computed block by block, (L * F, V) never exists."""
    embedding = unembedding(model).float()
    count = word_count(len(embedding), words)
    rows = max(1, _LOGITS_AT_ONCE // len(embedding))
    judged = min(JUDGED, count)
    scores, tops = [], []
    for projection in projections(model):
        values = value_vectors(projection).float()
        score, top = torch.empty(2, len(values)), torch.empty(2, len(values), judged, dtype=torch.int64)
        for start in range(0, len(values), rows):
            logits = values[start : start + rows].to(embedding.device) @ embedding.T
            for side, signed in enumerate((logits, -logits)):
                best, which = signed.topk(count, dim=1)
                score[side, start : start + rows] = best.mean(1).cpu()
                top[side, start : start + rows] = which[:, :judged].cpu()
        scores.append(score)
        tops.append(top)
    return Written(scores, tops)


def characteristic(lm: LM, own: Encoded, others: Encoded) -> np.ndarray:
    """The words (token numbers, ascending) at least 4 times as frequent in the concept's rows as in others'.

    The most frequent of them, at most a 20th of the vocabulary.  Raises `InputError` where there is none.
    """
    size = len(unembedding(lm.model))
    inside, outside = (_frequencies(table, size) for table in (own, others))
    inside[list(lm.tokenizer.all_special_ids)] = 0
    found = np.flatnonzero((inside > 0) & (inside >= _TIMES * outside))
    if len(found) == 0:
        raise InputError("no word is more frequent in the concept's records than in others: they cannot be told apart")
    order = np.argsort(-(inside - _TIMES * outside)[found], kind="stable")
    return np.sort(found[order[: max(size // _LARGEST_SHARE, JUDGED)]])


def _frequencies(table: Encoded, size: int) -> np.ndarray:
    counts = np.bincount(np.concatenate(table.ids), minlength=size).astype(np.float64)
    return counts / counts.sum()


def attribution(
    lm: LM, own: Encoded, words: Sequence[int] | np.ndarray, contrast: Sequence[int] | np.ndarray
) -> tuple[list[Tensor], list[Tensor]]:
    """What each value vector adds to the logits of the concept's words where they are due, and its mean activation.

    The mean over the P positions whose next token t is in `words` of ``m_j v_j . (E_t - mean of E over contrast)``,
    (F,) float64 a layer, and of ``m_j``.  The final norm's scale is left out, as in the paper's projection.  Raises
    `InputError` where no row has such a position.
    """
    projected = projections(lm.model)
    embedding = unembedding(lm.model).float()
    wanted = torch.zeros(len(embedding), dtype=torch.bool, device=embedding.device)
    wanted[torch.as_tensor(np.asarray(words), device=embedding.device)] = True
    base = embedding[torch.as_tensor(np.asarray(contrast), device=embedding.device)].mean(0)
    sums, means = ([torch.zeros(len(value_vectors(one)), dtype=torch.float64) for one in projected] for _ in range(2))
    positions = 0
    due: Tensor
    toward: Tensor

    def see(number: int, values: Tensor):
        def hook(module: nn.Module, inputs: Any, output: Any) -> None:
            activations = inputs[0][:, :-1][due.to(inputs[0].device)].float()  # (P, F)
            pull = toward.to(values.device) @ values.T  # (P, F)
            sums[number] += (activations * pull).sum(0).double().cpu()
            means[number] += activations.sum(0).double().cpu()

        return hook

    hooks = [(one, see(number, value_vectors(one).detach().float())) for number, one in enumerate(projected)]
    with losses.evaluating(lm.model), hooked(*hooks):
        for _, batch in passes(lm.model, own):
            targets = batch.targets.to(embedding.device)
            due = (targets >= 0) & wanted[targets.clamp(min=0)]
            toward = embedding[targets[due]] - base
            positions += int(due.sum())
            lm.model(**losses.inputs_of(batch))
    if positions == 0:
        raise InputError("none of the concept's own words is ever to be said in its records: nothing can be attributed")
    return [one / positions for one in sums], [one / positions for one in means]


def find(
    lm: LM,
    own: Encoded,
    others: Encoded,
    written: Written,
    *,
    keep: float = 0.3,
    clarity: float = 0.5,
    most: int = 10,
) -> list[ConceptVector]:
    """The vectors that write the concept of the rows `own`: at most `most`, of the largest attribution first.

    Of all vectors the share `keep` with the highest scores is looked at (the paper discards the lowest 70%), those of
    at least `clarity` are taken, and only those that make the concept's words likelier.  `own` and `others` should not
    hold what the vectors are then judged by.  Raises `InputError` where the concept has no words of its own.
    """
    words = characteristic(lm, own, others)
    contrast = np.setdiff1d(_scored(others), [*words, *lm.tokenizer.all_special_ids])
    if len(contrast) == 0:
        raise InputError("the other records hold no word that is not the concept's: nothing to tell it apart from")
    added, active = attribution(lm, own, words, contrast)
    sides = [(mean < 0).long() for mean in active]
    scores = [both.gather(0, side[None])[0] for both, side in zip(written.scores, sides, strict=True)]
    limit = float(np.quantile(torch.cat(scores).numpy(), 1 - keep))
    found: list[ConceptVector] = []
    for layer, (side, score, adds) in enumerate(zip(sides, scores, added, strict=True)):
        tops = written.words[layer][side, torch.arange(len(side))]  # (F, JUDGED)
        clear = torch.isin(tops, torch.as_tensor(words)).double().mean(1)
        passed = ((score >= limit) & (adds > 0) & (clear >= clarity)).nonzero().flatten().tolist()
        found += [
            ConceptVector(
                layer,
                neuron,
                1 - 2 * int(side[neuron]),
                float(clear[neuron]),
                float(score[neuron]),
                float(adds[neuron]),
                tuple(tops[neuron].tolist()),
            )
            for neuron in passed
        ]
    return sorted(found, key=lambda one: -one.attribution)[:most]


def _scored(table: Encoded) -> np.ndarray:
    """The tokens that rows are scored on."""
    return np.unique(np.concatenate([ids[max(start, 1) :] for ids, start in zip(table.ids, table.starts, strict=True)]))


def by_concept(table: Dataset, name: str) -> dict[str, Dataset]:
    """The rows of each concept: grouped by the column ``concept``, else ``person``, else all of them under `name`.

    Rows that are about no person are together.  Raises `InputError` for a row whose concept is empty.
    """
    column = next((one for one in ("concept", "person") if one in table.column_names), None)
    if column is None:
        return {name: table}
    rows: dict[str, list[int]] = {}
    for row, value in enumerate(table[column]):
        concept = str(value or "").strip()
        if not concept and column == "concept":
            raise InputError(f"record {row + 1} has an empty concept: say what it is about")
        rows.setdefault(concept or name, []).append(row)
    return {concept: table.select(found) for concept, found in rows.items()}


def noise(vectors: Tensor, places: Sequence[Place], strength: float, seed: int) -> Tensor:
    """Gaussian noise for (n, D) vectors, in expectation `strength` times as long as each; drawn place by place."""
    drawn = [torch.randn(vectors.shape[1], generator=torch_rng(seed, "noise", *place)) for place in places]
    scale = strength * vectors.float().norm(dim=1, keepdim=True) / vectors.shape[1] ** 0.5
    return torch.stack(drawn) * scale if drawn else torch.empty(0, vectors.shape[1])


@contextmanager
def noised(model: nn.Module, places: Sequence[Place], added: Tensor) -> Iterator[None]:
    """Inside, the vectors at `places` have `added` (n, D) on them.  No weight is written to: none needs restoring."""
    projected = projections(model)

    def on(which: list[int]):
        neurons, rows = [places[one][1] for one in which], added[which]

        def hook(module: nn.Module, inputs: Any, output: Tensor) -> Tensor:
            return output + inputs[0][..., neurons] @ rows.to(output)

        return hook

    hooks = []
    for layer, projection in enumerate(projected):
        which = [number for number, place in enumerate(places) if place[0] == layer]
        if which:
            hooks.append((projection, on(which)))
    with hooked(*hooks):
        yield


def matched(model: nn.Module, places: Sequence[Place], seed: int, avoid: Sequence[Place] = ()) -> list[Place]:
    """For each place another of its layer, drawn among the vectors nearest to it in norm: the random control.

    None is drawn twice, nor at `places` or `avoid`.  Raises `InputError` where a layer has too few other vectors.
    """
    norms = [value_vectors(projection).detach().float().norm(dim=1).cpu() for projection in projections(model)]
    taken = {*places, *avoid}
    drawn = []
    for number, (layer, neuron) in enumerate(places):
        free = [other for other in range(len(norms[layer])) if (layer, other) not in taken]
        if not free:
            raise InputError(f"layer {layer} has no vector left to compare with")
        free.sort(key=lambda other: abs(float(norms[layer][other] - norms[layer][neuron])))
        nearest = free[: max(4, len(free) // 5)]
        pick = int(torch.randint(len(nearest), (), generator=torch_rng(seed, "matched", number, layer, neuron)))
        drawn.append((layer, nearest[pick]))
        taken.add(drawn[-1])
    return drawn
