"""Losses on a causal language model's tokens: likelihood, divergence from a reference, and the preference family.

Only labelled positions reach the output head, in chunks that are recomputed in the backward pass, so the (B, T, V)
array of log-probabilities never exists.  Every mean divides by the totals of the whole step (see data/batches.py).
Shapes: B rows, T tokens, N labelled tokens of the batch, D hidden units, V words.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any, Protocol, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from palimpsest.data.batches import IGNORE, Batch

CHUNK_ELEMENTS = 2**24  # logits held at once: 64 MiB in float32

Head = Callable[[Tensor], Tensor]  # (N, D) -> (N, V)
_split: weakref.WeakKeyDictionary[nn.Module, bool] = weakref.WeakKeyDictionary()


class ReferenceStates(Protocol):
    """A frozen model's final hidden states for the labelled tokens of a batch, and its head (core/reference.py)."""

    head: Head

    def hidden(self, batch: Batch) -> Tensor:
        """(N, D) in the order of the batch's labelled tokens, row by row."""
        ...


def token_logprobs(model: nn.Module, batch: Batch) -> Tensor:
    """Log-probability of each labelled token, (B, T-1) float32; 0 where there is no label."""
    hidden_ND, head = hidden_states(model, batch)
    targets_N = batch.targets[batch.targets != IGNORE]

    def logprobs(hidden: Tensor, targets: Tensor) -> Tensor:
        return -F.cross_entropy(head(hidden).float(), targets, reduction="none")

    values_N = _chunked(logprobs, head, hidden_ND, targets_N)
    scattered = torch.zeros(batch.targets.shape, dtype=values_N.dtype, device=values_N.device)
    return scattered.masked_scatter(batch.targets != IGNORE, values_N)


def sequence_logprobs(model: nn.Module, batch: Batch) -> Tensor:
    """Log-probability of each row's labelled part, summed over its tokens, (B,)."""
    return token_logprobs(model, batch).sum(1)


def nll(model: nn.Module, batch: Batch) -> Tensor:
    """Mean negative log-likelihood a labelled token, in nats."""
    return -token_logprobs(model, batch).sum() / max(batch.total_tokens, 1)


def cross_entropy(model: nn.Module, batch: Batch) -> Tensor:
    """Each row's mean negative log-likelihood a labelled token, (B,) (CE of the sheets: NLL / |y|)."""
    lengths = (batch.targets != IGNORE).sum(1).clamp(min=1)
    return -sequence_logprobs(model, batch) / lengths


def kl(model: nn.Module, batch: Batch, reference: ReferenceStates) -> Tensor:
    """KL(reference || model), mean over labelled tokens, in nats; only `model` receives a gradient."""
    hidden_ND, head = hidden_states(model, batch)
    reference_ND = reference.hidden(batch).to(hidden_ND)

    def divergence(hidden: Tensor, frozen: Tensor) -> Tensor:
        with torch.no_grad():
            wanted = reference.head(frozen).float().log_softmax(-1)
        return F.kl_div(head(hidden).float().log_softmax(-1), wanted, reduction="none", log_target=True).sum(-1)

    return _chunked(divergence, head, hidden_ND, reference_ND).sum() / max(batch.total_tokens, 1)


def npo(logprobs: Tensor, reference: Tensor, beta: float) -> Tensor:
    """Negative preference optimisation, -(2/beta) log sigmoid(-beta log(pi/ref)), a value a row.

    `logprobs`, `reference`: (B,) sequence sums.  At pi = ref the value is (2/beta) ln 2 and the gradient is that of
    ascent on the sequence sum (Zhang et al. 2024, eq. 3).
    """
    return -2 / beta * F.logsigmoid(-beta * (logprobs - reference))


def simnpo(mean_nll: Tensor, beta: float, delta: float) -> Tensor:
    """SimNPO, -(2/beta) log sigmoid(beta CE - delta), a value a row (Fan et al. 2024, eq. 4).  `mean_nll`: (B,) CE."""
    return -2 / beta * F.logsigmoid(beta * mean_nll - delta)


def dpo(chosen: Tensor, chosen_reference: Tensor, rejected: Tensor, rejected_reference: Tensor, beta: float) -> Tensor:
    """Direct preference optimisation scaled by 2/beta, which makes it comparable with NPO; a value a row.

    All arguments are (B,) sequence sums (Rafailov et al. 2023, eq. 7).
    """
    margin = (chosen - chosen_reference) - (rejected - rejected_reference)
    return -2 / beta * F.logsigmoid(beta * margin)


def hidden_states(model: nn.Module, batch: Batch) -> tuple[Tensor, Head]:
    """The final hidden states at the positions that predict a label, (N, D), and the head that turns them into logits.

    A model that does more after its decoder than a linear head (soft-capped or scaled logits) yields its logits as the
    "hidden states" with an identity head: right, only less lean.
    """
    arguments: dict[str, Any] = {"input_ids": batch.input_ids, "use_cache": False}
    if batch.attention_mask is not None:
        arguments["attention_mask"] = batch.attention_mask
    if batch.position_ids is not None:
        arguments["position_ids"] = batch.position_ids
    predicts = batch.targets != IGNORE
    if _is_linear_at_the_end(model):
        decoder, head = _decoder_and_head(model)
        return decoder(**arguments).last_hidden_state[:, :-1][predicts], head
    return model(**arguments).logits[:, :-1][predicts], nn.Identity()


def _decoder_and_head(model: nn.Module) -> tuple[nn.Module, nn.Module]:
    causal = cast(Any, model)
    if hasattr(causal, "peft_config"):
        causal = causal.get_base_model()
    return getattr(causal, causal.base_model_prefix), causal.get_output_embeddings()


def _is_linear_at_the_end(model: nn.Module) -> bool:
    """Whether logits = head(decoder(tokens)); tried once a model, on four tokens."""
    if model not in _split:
        tokens = torch.arange(4, device=next(model.parameters()).device)[None]
        training = model.training
        model.eval()
        try:
            with torch.no_grad():
                decoder, head = _decoder_and_head(model)
                logits = head(decoder(input_ids=tokens, use_cache=False).last_hidden_state)
                _split[model] = torch.equal(logits, model(input_ids=tokens, use_cache=False).logits)
        except (AttributeError, TypeError):
            _split[model] = False
        finally:
            model.train(training)
    return _split[model]


def _chunked(score: Callable[[Tensor, Tensor], Tensor], head: Head, states: Tensor, beside: Tensor) -> Tensor:
    """`score` over rows of `states` and `beside` without ever holding more than `CHUNK_ELEMENTS` logits."""
    words = getattr(head, "out_features", None) or states.shape[-1]
    rows = max(1, CHUNK_ELEMENTS // words)
    if len(states) <= rows:
        return score(states, beside)
    pieces = zip(states.split(rows), beside.split(rows), strict=True)
    return torch.cat([checkpoint(score, a, b, use_reentrant=False) for a, b in pieces])
