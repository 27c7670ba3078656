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
from dataclasses import dataclass, field, replace
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
from palimpsest.models.low_rank import LowRank
from palimpsest.models.score import by_tokens, evaluating

FEWEST = 10  # different texts: below, there is nothing to hold out
_QUERY_KEY_VALUE = ("query", "key", "value", "q", "k", "v", "q_lin", "k_lin", "v_lin", "q_proj", "k_proj", "v_proj")
_RANK, _ALPHA, _DROPOUT = 8, 32.0, 0.1
_BATCH = 8
_MASKED = 0.15  # share of the tokens that the masked view lacks
_HELD_OUT = 0.2  # share of the texts
_LONGEST = 256  # tokens


@dataclass(frozen=True, eq=False)
class Detector:
    """What is kept of a set of texts: their features, and what the encoder learned from them.  Make one with `fit`."""

    used: Tensor = field(repr=False)  # (n, L, D) float32, of the texts that the encoder was tuned on
    rest: Tensor = field(repr=False)  # (m, L, D), of those held out
    factors: dict[str, Tensor] = field(repr=False)  # low-rank factors of the encoder; none: as it came
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
    def _distances(self) -> _Distances:
        return _Distances.of(self.used.double().numpy(), self.gamma)

    @cached_property
    def _scale(self) -> _Scale:
        used, rest = self.used.double().numpy(), self.rest.double().numpy()
        return _Scale.of(self._distances(used, own=True), self._distances(rest), self.nu)

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
    """(N, detectors) the weight of each text by each detector; those with the same encoder, untuned, share a pass."""
    found = np.zeros((len(texts), len(detectors)))
    shared: dict[str, np.ndarray] = {}
    for number, detector in enumerate(detectors):
        if detector.factors:
            found[:, number] = detector.weight(texts)
            continue
        if detector.encoder not in shared:
            shared[detector.encoder] = features(texts, detector.encoder)
        found[:, number] = detector.weight_of(detector.score(shared[detector.encoder])) * _written(texts)
    return found


@dataclass(frozen=True)
class _Distances:
    """How far features are from those of the used texts, at every layer."""

    mean: np.ndarray  # (L, D)
    precision: np.ndarray  # (L, D, D)
    bank: np.ndarray  # (n, L, D), of length one
    gamma: float

    @staticmethod
    def of(used: np.ndarray, gamma: float) -> _Distances:
        from sklearn.covariance import ledoit_wolf

        # shrunk: with fewer texts than dimensions the plain covariance has no inverse
        shrunk = [ledoit_wolf(used[:, layer])[0] for layer in range(used.shape[1])]
        precision = np.stack([np.linalg.inv(one + 1e-9 * np.eye(len(one))) for one in shrunk])
        return _Distances(used.mean(0), precision, _unit_length(used), gamma)

    def __call__(self, found: np.ndarray, *, own: bool = False) -> np.ndarray:
        """(N, L) squared Mahalanobis distance from the mean, and `gamma` times the cosine distance from the nearest
        used text; `own`: these are the used texts, none of which is its own neighbour."""
        from_mean = found - self.mean
        mahalanobis = np.einsum("nld,lde,nle->nl", from_mean, self.precision, from_mean, optimize=True)
        cosines = np.einsum("nld,mld->nml", _unit_length(found), self.bank, optimize=True)
        if own:
            cosines[np.arange(len(found)), np.arange(len(found))] = -np.inf
        return mahalanobis + self.gamma * (1 - cosines.max(1))


@dataclass(frozen=True)
class _Scale:
    """A linear one-class SVM on distances, and where its scores lie for texts of the set."""

    farthest: np.ndarray  # (L,) the largest distances of the used texts
    unit: np.ndarray  # (L,) the spread of theirs
    slope: np.ndarray  # (L,)
    offset: float
    centres: tuple[float, float] = (0.0, 0.0)  # mean scores of the used texts and of those held out
    spread: float = 1.0  # standard deviation of the latter

    @staticmethod
    def of(used: np.ndarray, rest: np.ndarray, nu: float) -> _Scale:
        """From the distances of the used texts (n, L) and of those held out (m, L).

        A linear one-class SVM parts its texts from the origin.  That is put where a text would be that is as far away
        at every layer as the farthest used one, so the slope is nowhere below 0: nearness counts for a text at every
        layer.  (With the origin at distance 0, as in the published code, it would count against it.)
        """
        from sklearn.svm import OneClassSVM

        farthest, unit = used.max(0), np.maximum(used.std(0), 1e-9)
        svm = OneClassSVM(kernel="linear", nu=nu).fit((farthest - used) / unit)
        scale = _Scale(farthest, unit, svm.coef_[0], float(svm.intercept_[0]))
        known, unseen = scale(used), scale(rest)
        return replace(
            scale,
            centres=(float(known.mean()), float(unseen.mean())),
            spread=max(float(unseen.std()), 1e-9),
        )

    def __call__(self, distances: np.ndarray) -> np.ndarray:
        """(N,) the SVM's scores."""
        return (self.farthest - distances) / self.unit @ self.slope + self.offset


def features(texts: Sequence[str], encoder: str = PACKAGED, factors: dict[str, Tensor] | None = None) -> np.ndarray:
    """(N, L, D) float32: the hidden states of every layer but the embedding, averaged over a text's tokens.

    With low-rank `factors` beside the encoder's own weights.  Padding never counts, nor does who shares a batch.
    """
    model, tokenizer = _parts(encoder)
    adapter = LowRank.of(factors, alpha=_ALPHA) if factors else None
    ids = _tokens(tokenizer, texts)
    found: list[np.ndarray] = [np.empty(0)] * len(ids)
    if not ids:
        return np.empty((0, model.config.num_hidden_layers, model.config.hidden_size), dtype=np.float32)
    attached = adapter.to(model.device).eval().attached(model) if adapter is not None else nullcontext()
    with evaluating(model), attached:
        for places in by_tokens(np.array([len(row) for row in ids])):
            rows, mask = _padded([ids[place] for place in places], tokenizer.pad_token_id)
            pooled, _ = _forward(model, rows.to(model.device), mask.to(model.device))
            for place, row in zip(places, pooled.cpu().numpy(), strict=True):
                found[place] = row
    return np.stack(found).astype(np.float32)


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


def _unit_length(found: np.ndarray) -> np.ndarray:
    return found / np.maximum(np.linalg.norm(found, axis=-1, keepdims=True), 1e-12)


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
