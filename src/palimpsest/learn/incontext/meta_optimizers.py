"""Meta-optimizers: is learning in context like gradient descent on the same examples?  And momentum attention.

Dai et al. 2023 (arXiv:2212.10559).  Softmax-free attention over demonstrations equals a weight update built from them
(`dual_form`).  `compare` asks how alike "demonstrations in the prompt" and "one epoch of SGD on them" change any
Hugging Face causal LM, beside the controls that the paper lacks (an untrained copy, shuffled demonstrations, other
queries' updates, layer-wise descent: Deutch et al. 2024, arXiv:2311.07772).  `MomentumAttention` is the paper's analogy
turned into a design.  Similar numbers are no proof of mechanism: read each beside its controls.
Shapes: N demonstrations, Q queries, L layers, H heads, D hidden units, C labels.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from palimpsest.core.errors import InputError
from palimpsest.core.methods import method
from palimpsest.core.seeds import numpy_rng
from palimpsest.learn.incontext.conditions import Labelled, Reading, Texts, fine_tuned, read
from palimpsest.learn.incontext.gpicl import GPICL
from palimpsest.models.sequences import SequenceModel, build

if TYPE_CHECKING:
    from palimpsest.models.lm import LM

TEMPLATE = "{text} Label: {label}"


@method(verb="learn", paper="meta_optimizers")
@dataclass(frozen=True)
class MomentumAttention(GPICL):
    """Meta-train an in-context classifier whose attention adds a decayed sum of past values.

    If values act as gradients, that is momentum.  Trained as `GPICL` trains its transformer; for language models there
    is `models.attention.with_momentum`.
    """

    eta: float = 0.5  # decay a token; the paper's value is not known

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.kind != "transformer" or not 0 < self.eta < 1:
            raise InputError(f"wanted a transformer and eta between 0 and 1, not kind={self.kind}, eta={self.eta}")

    def model(self, features: int, classes: int, length: int) -> SequenceModel:
        plain = super().model(features, classes, length)
        return build(replace(plain.config, eta=self.eta), self.seed)


# the dual form


def linear_attention(values: Tensor, keys: Tensor, query: Tensor) -> Tensor:
    """``sum_i v_i (k_i . q)``: attention without softmax and scale, for (n, V) values, (n, K) keys and a (K,) query."""
    return values.T @ (keys @ query)


def dual_form(w_value: Tensor, w_key: Tensor, demonstrations: Tensor, rest: Tensor) -> tuple[Tensor, Tensor]:
    """``(W_ZSL, dW_ICL)``, both (V, K): linear attention over demonstrations and rest is ``(W_ZSL + dW_ICL) q``.

    `w_value`: (V, D), `w_key`: (K, D), `demonstrations`: (n, D), `rest`: (m, D) the query's own tokens.
    """
    zero_shot, update = (w_value @ tokens.T @ tokens @ w_key.T for tokens in (rest, demonstrations))
    return zero_shot, update


def descent_as_attention(w: Tensor, errors: Tensor, inputs: Tensor, query: Tensor) -> tuple[Tensor, Tensor]:
    """Both sides of the other reading: a linear layer after gradient steps, and its start plus linear attention.

    `w`: (V, K), `errors`: (n, V), minus the learning rate times the output gradients, `inputs`: (n, K).
    """
    return (w + errors.T @ inputs) @ query, w @ query + linear_attention(errors, inputs, query)


# learning in context against fine-tuning


@dataclass(frozen=True, eq=False)
class Similarity:
    """How alike demonstrations in the prompt (ICL) and fine-tuning on them (FT) change a model; arrays are (L,)."""

    accuracy: dict[str, float]  # of zero-shot, in-context, fine-tuned
    put_right: int  # queries that are wrong zero-shot and right after fine-tuning
    recall: float  # Rec2FTP: the share of them that ICL puts right as well; NaN if there is none
    recall_expected: float  # the share of all zero-shot errors that ICL puts right: recall if the two were unrelated
    update: np.ndarray  # SimAOU: cosine of the changes of attention outputs at the last token
    update_gaussian: np.ndarray  # its baselines: a random direction,
    update_uniform: np.ndarray  # the paper's, uniform numbers, whose mean is not zero,
    update_others: np.ndarray  # the fine-tuning change of another query,
    update_shuffled: np.ndarray  # and the change by the same demonstrations with their tokens shuffled
    attention_before: np.ndarray  # SimAM: cosine of attention scores over the query's tokens, ICL and zero-shot,
    attention_after: np.ndarray  # and ICL and fine-tuned
    kendall: np.ndarray  # rank correlation of attention to demonstration tokens and of fine-tuning's inner products
    kendall_examples: np.ndarray  # the same after summing the tokens of each demonstration
    kendall_random: np.ndarray  # of attention and a random order

    def means(self) -> dict[str, float]:
        """Every number, layers averaged."""
        found = {f"accuracy {name}": value for name, value in self.accuracy.items()}
        return found | {
            name: float(np.mean(value)) for name, value in vars(self).items() if isinstance(value, np.ndarray | float)
        }


def compare(
    lm: LM,
    demonstrations: Labelled,
    queries: Labelled,
    *,
    lr: float,
    template: str = TEMPLATE,
    labels: Sequence[str] | None = None,
    layer_causal: bool = False,
    batch_size: int = 64,
    seed: int = 0,
) -> Similarity:
    """Zero-shot, in-context and fine-tuned answers of `lm` to the queries, and how alike the latter two are.

    Fine-tuning is the paper's: one epoch over the demonstrations in their order, batch 1, plain SGD on key and value
    projections alone, language-model loss on all tokens.  Its learning rate decides everything: take `best_rate`.
    `template` holds ``{text}``, then ``{label}``; `labels` are the label words, by default those of the
    demonstrations.  `layer_causal` trains each layer on its own unembedded output alone.
    The untrained control is ``compare(fresh(lm, seed), ...)`` with `models.train.fresh`.
    Raises `InputError` for fewer than two labels, labels that share their first token, words that are no label,
    demonstrations longer than the context, and a model whose key and value projections cannot be addressed.
    """
    texts = Texts.of(lm, demonstrations, queries, template, labels)
    shown = list(texts.start)
    for demonstration in texts.demonstrations:
        shown += demonstration
    longest = max(map(len, texts.queries)) + max(map(len, texts.labels))
    if len(shown) + longest > lm.max_length:
        raise InputError(
            f"{len(demonstrations)} demonstrations and a query have up to {len(shown) + longest} tokens, the model can "
            f"see {lm.max_length}: give fewer demonstrations"
        )
    shuffled = [*texts.start, *numpy_rng(seed, "shuffled").permutation(shown[len(texts.start) :]).tolist()]
    model = lm.model.eval()
    zero, context, neutral = (read(model, prefix, texts, batch_size) for prefix in (list(texts.start), shown, shuffled))
    tuned_model, trained_queries = fine_tuned(model, texts, lr, layer_causal)
    tuned = read(tuned_model, list(texts.start), texts, batch_size)
    gold = torch.tensor(texts.gold)
    right = {
        name: one.labels.argmax(1) == gold
        for name, one in (("zero-shot", zero), ("in-context", context), ("fine-tuned", tuned))
    }
    wrong = ~right["zero-shot"]
    changed = context.change(zero)
    tuning = tuned.change(zero)
    rng = numpy_rng(seed, "baselines")
    gaussian, uniform = rng.standard_normal(changed.shape), rng.random(changed.shape)
    prefix = len(shown)
    spans = np.cumsum([len(texts.start), *map(len, texts.demonstrations)])
    kendall = _kendall(context, tuned, trained_queries, spans, rng)
    return Similarity(
        accuracy={name: float(values.double().mean()) for name, values in right.items()},
        put_right=int((wrong & right["fine-tuned"]).sum()),
        recall=_share(right["in-context"], wrong & right["fine-tuned"]),
        recall_expected=_share(right["in-context"], wrong),
        update=_cosine(changed, tuning),
        update_gaussian=_cosine(changed, torch.from_numpy(gaussian)),
        update_uniform=_cosine(changed, torch.from_numpy(uniform)),
        update_others=_cosine(changed, tuning.roll(1, 0)),
        update_shuffled=_cosine(neutral.change(zero), tuning),
        attention_before=_scores_alike(context, zero, prefix, len(texts.start)),
        attention_after=_scores_alike(context, tuned, prefix, len(texts.start)),
        kendall=kendall[0],
        kendall_examples=kendall[1],
        kendall_random=kendall[2],
    )


def best_rate(
    lm: LM,
    tasks: Sequence[tuple[Labelled, Labelled]],
    rates: Sequence[float] = (0.001, 0.01, 0.05, 0.2),
    *,
    template: str = TEMPLATE,
    labels: Sequence[str] | None = None,
    batch_size: int = 64,
) -> float:
    """The rate at which fine-tuning answers best, over (demonstrations, queries) of other tasks than those compared."""

    def accuracy(lr: float) -> float:
        found = []
        for demonstrations, queries in tasks:
            texts = Texts.of(lm, demonstrations, queries, template, labels)
            tuned, _ = fine_tuned(lm.model, texts, lr, False)
            answers = read(tuned, list(texts.start), texts, batch_size).labels.argmax(1)
            found.append(float((answers == torch.tensor(texts.gold)).double().mean()))
        return float(np.mean(found))

    return max(rates, key=accuracy)


def _share(among: Tensor, of: Tensor) -> float:
    """The share of True in `among` where `of` is; NaN if that is nowhere."""
    return float(among[of].double().mean()) if of.any() else float("nan")


def _cosine(one: Tensor, other: Tensor) -> np.ndarray:
    """(L,): mean over queries of the cosine of (Q, L, D) vectors."""
    return F.cosine_similarity(one.double(), other.double(), dim=-1).mean(0).numpy()


def _scores_alike(one: Reading, other: Reading, prefix: int, other_prefix: int) -> np.ndarray:
    """(L,): mean over queries and heads of the cosine of scores over the query's own tokens."""
    found = [
        F.cosine_similarity(a[..., prefix:].double(), b[..., other_prefix:].double(), dim=-1).mean(-1)
        for a, b in zip(one.scores, other.scores, strict=True)
    ]
    return torch.stack(found).mean(0).numpy()


def _kendall(
    context: Reading, tuned: Reading, trained: Tensor, spans: np.ndarray, rng: np.random.Generator
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(L,) each: rank correlation over tokens, over demonstrations, and with a random order; means over queries."""
    from scipy.stats import kendalltau

    first, last = int(spans[0]), int(spans[-1])
    heads = context.scores[0].shape[1]
    scale = (trained.shape[-1] / heads) ** -0.5
    products = scale * torch.einsum("qle,lte->qlt", tuned.queries, trained)
    places = torch.from_numpy(np.repeat(np.arange(len(spans) - 1), np.diff(spans)))
    found = np.empty((len(context.scores), products.shape[1], 3))
    for query, scores in enumerate(context.scores):
        attended = scores[..., first:last].sum(1)  # over heads
        for layer in range(len(attended)):
            a, b = attended[layer].softmax(-1), products[query, layer].softmax(-1)
            sums = [torch.zeros(len(spans) - 1).index_add_(0, places, part) for part in (a, b)]
            # softmax rounds small weights to ties; the ranks are those of the scores
            found[query, layer] = (
                kendalltau(attended[layer], products[query, layer]).statistic,
                kendalltau(*sums).statistic if len(spans) > 2 else np.nan,
                kendalltau(attended[layer], rng.permutation(last - first)).statistic,
            )
    means = found.mean(0)
    return means[:, 0], means[:, 1], means[:, 2]
