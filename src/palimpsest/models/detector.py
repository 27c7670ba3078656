"""A detector: how typical is a text of one set of texts, learned from that set alone?  Nothing outside it is ever seen.

The out-of-distribution detector of O3 (Gao et al. 2024, arXiv:2407.10223, section 3.2; sheet `o3`, parts 2 and 3).
A sentence encoder is tuned on the set by contrastive entropy and masked words (low-rank factors, the encoder stays);
a text's distances from the set at every layer go through a one-class SVM; and where the result lies among those of
texts that trained it and of texts held out becomes a weight between 0 and 1.
Knows nothing of what is done with the weight.  Shapes: N texts, n used, m held out, L layers, D dimensions, W words.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from functools import cache, cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from palimpsest.core.errors import InputError
from palimpsest.core.seeds import numpy_rng
from palimpsest.core.watch import Watch
from palimpsest.models.anatomy import sharing_copy
from palimpsest.models.encoder import PACKAGED, Encoder
from palimpsest.models.low_rank import Factors, LowRank, side_by_side
from palimpsest.models.score import by_tokens, evaluating
from palimpsest.models.typicality import Distances, Scale

FEWEST = 10  # different texts: below, there is nothing to hold out
_QUERY_KEY_VALUE = ("query", "key", "value", "q", "k", "v", "q_lin", "k_lin", "v_lin", "q_proj", "k_proj", "v_proj")
_RANK, _ALPHA, _DROPOUT = 8, 32.0, 0.1
_BATCH = 8
_MASKED = 0.15  # share of the tokens that the masked view lacks
_HELD_OUT = 0.2  # share of the texts
_LONGEST = 256  # tokens
_TOGETHER = 8  # sets of factors that share a pass


@dataclass(frozen=True, eq=False)
class Detector:
    """What is kept of a set of texts: their features, and what the encoder learned from them.  Make one with `fit`."""

    used: Tensor = field(repr=False)  # (n, L, D) float32, of the texts that the encoder was tuned on
    rest: Tensor = field(repr=False)  # (m, L, D), of those held out
    factors: Factors = field(repr=False)  # low-rank factors of the encoder; none: as it came
    encoder: str = PACKAGED
    gamma: float = 1000.0  # of the cosine distance, beside the squared Mahalanobis distance
    nu: float = 0.1  # of the one-class SVM: the share of the used texts that may lie outside
    zeta: float = 10.0  # how soon a typical text has the whole weight
    floor: float = 0.2  # weights up to it are 0

    def __post_init__(self) -> None:
        if not (self.gamma >= 0 and 0 < self.nu <= 1 and self.zeta > 0 and 0 <= self.floor < 1):
            raise InputError(
                f"a detector with gamma={self.gamma:g}, nu={self.nu:g}, zeta={self.zeta:g}, floor={self.floor:g} "
                "cannot be made: wanted gamma >= 0, 0 < nu <= 1, zeta > 0, 0 <= floor < 1"
            )

    @staticmethod
    def fit(
        texts: Sequence[str],
        *,
        encoder: str = PACKAGED,
        epochs: int = 2,
        lr: float = 1e-5,
        seed: int = 0,
        watch: Watch | None = None,
        **scoring: Any,
    ) -> Detector:
        """Learn a set of texts; a seeded fifth of them is held out.

        `epochs` and `lr` are of the tuning (0 epochs: the encoder stays as it is); `scoring`: `gamma`, `nu`, `zeta`
        and `floor`.  `InputError` for fewer than `FEWEST` different texts and for an encoder that cannot be tuned.
        """
        different = [text for text in dict.fromkeys(texts) if text.strip()]
        if len(different) < FEWEST:
            raise InputError(f"a detector needs at least {FEWEST} different texts, not {len(different)}")
        order = numpy_rng(seed, "held out").permutation(len(different))
        held_out = max(2, round(_HELD_OUT * len(different)))
        rest, used = ([different[place] for place in part] for part in (order[:held_out], order[held_out:]))
        factors = _tuned(encoder, used, epochs, lr, seed, watch or Watch()) if epochs else {}
        seen, unseen = (torch.from_numpy(features(part, encoder, factors)) for part in (used, rest))
        return Detector(seen, unseen, factors, encoder, **scoring)

    def weight(self, texts: Sequence[str]) -> np.ndarray:
        """(N,) float64 in [0, 1]: how much each text belongs to the set.  An empty text does not: 0."""
        return self.weight_of(self.score(features(texts, self.encoder, self.factors))) * _written(texts)

    def weight_of(self, scores: np.ndarray) -> np.ndarray:
        """sigmoid(zeta p - 2), and 0 where that is at most `floor`; p = 2 G(score), at most 1, is the typicality.

        G is the distribution function of an even mixture of two normal ones, around the mean scores of the used texts
        and of those held out, both as wide as the latter are spread.  The paper's p falls on both sides of the middle;
        a text that is *more* typical than most is no stranger, so ours does not.
        """
        from scipy.special import expit
        from scipy.stats import norm

        scale = self._scale
        below = np.mean([norm.cdf((scores - centre) / scale.spread) for centre in scale.centres], axis=0)
        weights = expit(self.zeta * np.minimum(2 * below, 1.0) - 2.0)
        return np.where(weights > self.floor, weights, 0.0)

    def score(self, found: np.ndarray) -> np.ndarray:
        """(N,) the one-class SVM's score of features (N, L, D): the higher, the more typical."""
        return self._scale(self._distances(found.astype(np.float64)))

    @cached_property
    def _distances(self) -> Distances:
        return Distances.of(self.used.double().numpy(), self.gamma)

    @cached_property
    def _scale(self) -> Scale:
        used, rest = self.used.double().numpy(), self.rest.double().numpy()
        return Scale.of(self._distances(used, own=True), self._distances(rest), self.nu)

    def state(self) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """JSON-able settings, and tensors: what `restore` makes the same detector from."""
        names = ("encoder", "gamma", "nu", "zeta", "floor")
        factors = {f"factors.{name}": value for name, value in self.factors.items()}
        return {name: getattr(self, name) for name in names}, {"used": self.used, "rest": self.rest, **factors}

    @staticmethod
    def restore(settings: dict[str, Any], tensors: dict[str, Tensor]) -> Detector:
        start = "factors."
        factors = {name.removeprefix(start): value for name, value in tensors.items() if name.startswith(start)}
        return Detector(tensors["used"], tensors["rest"], factors, **settings)


def weights(detectors: Sequence[Detector], texts: Sequence[str]) -> np.ndarray:
    """(N, detectors) the weight of each text by each detector; those with the same encoder share its passes."""
    found = np.zeros((len(texts), len(detectors)))
    for encoder in dict.fromkeys(one.encoder for one in detectors):
        numbers = [number for number, one in enumerate(detectors) if one.encoder == encoder]
        for first in range(0, len(numbers), _TOGETHER):
            several = numbers[first : first + _TOGETHER]
            seen = features_by(texts, [detectors[number].factors for number in several], encoder)
            for number, one in zip(several, seen, strict=True):
                detector = detectors[number]
                found[:, number] = detector.weight_of(detector.score(one)) * _written(texts)
    return found


def features(texts: Sequence[str], encoder: str = PACKAGED, factors: Factors | None = None) -> np.ndarray:
    """(N, L, D) float32: the hidden states of every layer but the embedding, averaged over a text's tokens.

    With low-rank `factors` beside the encoder's own weights.  Padding never counts, nor does who shares a batch.
    """
    return features_by(texts, [factors or {}], encoder)[0]


def features_by(texts: Sequence[str], several: Sequence[Factors], encoder: str = PACKAGED) -> np.ndarray:
    """(F, N, L, D): `features` with each of F sets of factors, all in the same passes: a row for each text and set."""
    model, tokenizer = _parts(encoder)
    ids = _tokens(tokenizer, texts)
    shape = (len(several), len(ids), model.config.num_hidden_layers, model.config.hidden_size)
    found = np.empty(shape, dtype=np.float32)
    adapter, shares = side_by_side(several, alpha=_ALPHA)
    with evaluating(model):
        for places in by_tokens(np.array([len(row) for row in ids])):
            rows, mask = (
                part.repeat(len(several), 1).to(model.device)
                for part in _padded([ids[place] for place in places], tokenizer.pad_token_id)
            )
            strength = shares.repeat_interleave(len(places), 0).to(model.device)
            with adapter.to(model.device).eval().attached(model, strength) if adapter else nullcontext():
                pooled, _ = _forward(model, rows, mask)
            found[:, places] = pooled.cpu().numpy().reshape(len(several), len(places), *shape[2:])
    return found


def _forward(model: Any, ids: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """The pooled states of every layer (N, L, D), and the last layer's states of every token (N, T, D)."""
    states = model(input_ids=ids, attention_mask=mask, output_hidden_states=True).hidden_states[1:]
    shares = mask / mask.sum(1, keepdim=True)
    return torch.stack([(state * shares[..., None]).sum(1) for state in states], dim=1), states[-1]


def _tuned(encoder: str, texts: list[str], epochs: int, lr: float, seed: int, watch: Watch) -> dict[str, Tensor]:
    """Low-rank factors on queries, keys and values, trained by contrastive entropy and masked words on the texts."""
    own, tokenizer = _parts(encoder)
    if tokenizer.mask_token_id is None:
        raise InputError(f"the encoder '{encoder}' has no token for masked words: set the detector's epochs to 0")
    model: Any = sharing_copy(own)
    matrices = {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and name.rpartition(".")[2] in _QUERY_KEY_VALUE
    }
    if not matrices:
        raise InputError(f"the encoder '{encoder}' has no queries, keys and values that can be addressed")
    adapter = LowRank.fresh(matrices, rank=_RANK, alpha=_ALPHA, dropout=_DROPOUT, seed=seed).to(own.device)
    model.add_module("low_rank", adapter)
    views = _Views(_tokens(tokenizer, texts), torch.from_numpy(features(texts, encoder)), tokenizer, seed)
    words = model.get_input_embeddings().weight

    def loss(model: nn.Module, batch: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        pooled, last = _forward(model, batch["ids"], batch["mask"])
        entropy, diagonal = contrastive_entropy(pooled, batch["keys"])
        masked = batch["labels"] >= 0
        guesses = last[masked] @ words.T  # the head of the encoder's own pretraining is not with it: tied to its words
        value = nn.functional.cross_entropy(guesses, batch["labels"][masked])
        return entropy + value, {"entropy": entropy.detach(), "masked": value.detach(), "diagonal": diagonal}

    steps = epochs * views.steps_per_epoch
    with adapter.attached(model):
        watch.fit(
            "detector",
            model,
            loss,
            views,
            main=False,
            steps=steps,
            lr=lr,
            weight_decay=0.01,
            warmup=round(0.06 * steps),
            schedule="linear",
            precision="fp32",  # the dot products are large, and it is their differences that count
            seed=seed,
            identity=[encoder, texts],
        )
    return {name: value.cpu() for name, value in adapter.tensors().items()}


def contrastive_entropy(masked: Tensor, clean: Tensor) -> tuple[Tensor, Tensor]:
    """The entropy of which clean view each masked view resembles, both (B, L, D): mean over texts, sum over layers.

    Delta = softmax over the batch's clean views of the dot product; -sum Delta log(Delta + 1e-5).  Nothing says which
    view is the right one: it is the likest to begin with.  Also the mean Delta of a text's own view: near 1 / B, the
    views have collapsed into one.
    """
    shares = torch.einsum("ild,jld->lij", masked, clean).softmax(-1)
    entropy = -(shares * (shares + 1e-5).log()).sum(-1).mean(-1).sum()
    return entropy, shares.diagonal(dim1=1, dim2=2).mean().detach()


@dataclass(frozen=True)
class _Views:
    """Batches of texts with masked words beside the features of the same texts unmasked: a function of the step."""

    ids: list[list[int]]
    keys: Tensor  # (n, L, D), of the encoder as it came
    tokenizer: Any
    seed: int

    @property
    def size(self) -> int:
        return min(_BATCH, len(self.ids))

    @property
    def steps_per_epoch(self) -> int:
        return len(self.ids) // self.size

    def __call__(self, step: int) -> dict[str, Tensor]:
        epoch, place = divmod(step, self.steps_per_epoch)
        order = numpy_rng(self.seed, "detector epoch", epoch).permutation(len(self.ids))
        rows = order[place * self.size : (place + 1) * self.size]
        ids, mask = _padded([self.ids[row] for row in rows], self.tokenizer.pad_token_id)
        special = torch.isin(ids, torch.tensor(self.tokenizer.all_special_ids))
        draws = torch.from_numpy(numpy_rng(self.seed, "masked", step).random(ids.shape)).masked_fill(special, 2.0)
        hidden = draws < torch.clamp(draws.min(1, keepdim=True).values + 1e-12, min=_MASKED)  # at least one a text
        hidden &= draws < 1
        labels = torch.where(hidden, ids, -1)
        return {
            "ids": ids.masked_fill(hidden, self.tokenizer.mask_token_id),
            "mask": mask,
            "labels": labels,
            "keys": self.keys[rows],
        }


def _written(texts: Sequence[str]) -> np.ndarray:
    return np.array([bool(text.strip()) for text in texts], dtype=np.float64)


def _tokens(tokenizer: Any, texts: Sequence[str]) -> list[list[int]]:
    if not len(texts):
        return []
    return tokenizer(list(texts), truncation=True, max_length=_LONGEST, verbose=False)["input_ids"]


def _padded(rows: Sequence[Sequence[int]], pad_id: int) -> tuple[Tensor, Tensor]:
    width = max(len(row) for row in rows)
    ids = torch.full((len(rows), width), pad_id)
    mask = torch.zeros(len(rows), width, dtype=torch.int64)
    for line, row in enumerate(rows):
        ids[line, : len(row)] = torch.as_tensor(row)
        mask[line, : len(row)] = 1
    return ids, mask


@cache
def _parts(name: str) -> tuple[Any, Any]:
    """The transformer in a sentence encoder, and its tokenizer; loading takes seconds."""
    encoder = Encoder.load(name)
    first: Any = encoder.model[0]
    model = getattr(first, "auto_model", None)
    if model is None or not hasattr(model.config, "num_hidden_layers"):
        raise InputError(f"the encoder '{name}' is no transformer whose hidden states can be read")
    return model, encoder.model.tokenizer
