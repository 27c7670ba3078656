"""Losses on a causal language model's tokens: likelihood, divergence from a reference, and the preference family.

Only labelled positions reach the output head, in chunks that are recomputed in the backward pass, so the (B, T, V)
array of log-probabilities never exists.  Every mean divides by the totals of the whole step (see data/batches.py).
Shapes: B rows, T tokens, N labelled tokens of the batch, n of them at once, D hidden units, V words.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Protocol, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from palimpsest.data.batches import IGNORE, Batch

WHOLE_ELEMENTS = 2**24  # up to so many logits (64 MiB in float32) are kept for the backward pass: computed once
CHUNK_ELEMENTS = 2**22  # beyond that, logits held at once: 16 MiB
CHUNK_ROWS = 256  # tokens in a chunk at least, however many words there are: below, reading the head takes longest

CACHED_ELEMENTS = 2**19  # float32 numbers that stay in a core's cache from one pass over them to the next

Head = Callable[[Tensor], Tensor]  # (N, D) -> (N, V)
_split: weakref.WeakKeyDictionary[nn.Module, bool] = weakref.WeakKeyDictionary()


class ReferenceStates(Protocol):
    """A frozen model's final hidden states for the labelled tokens of a batch, and its head (core/reference.py)."""

    @property
    def head(self) -> Head: ...

    def hidden(self, batch: Batch) -> Tensor:
        """(N, D) in the order of the batch's labelled tokens, row by row, as the head wants them."""
        ...


def per_token(
    model: nn.Module, batch: Batch, score: Callable[..., Tensor], reference: ReferenceStates | None = None
) -> Tensor:
    """A value for each labelled token, (B, T-1) float32; 0 where there is no label.

    ``score(logits, targets)`` gets logits (n, V) in float32 and the words (n,) that follow, and returns (n,) values.
    With a `reference` it gets a third argument: the frozen model's logits (n, V), which carry no gradient.
    """
    hidden_ND, head = hidden_states(model, batch)
    labelled = batch.targets != IGNORE
    beside = [batch.targets[labelled]]
    if reference is not None:
        beside.append(reference.hidden(batch).to(hidden_ND.device))
        if len(beside[-1]) != len(hidden_ND):
            raise ValueError("the reference was made for another table than the batch comes from")

    def values(hidden: Tensor, targets: Tensor, frozen: Tensor | None = None) -> Tensor:
        logits = head(hidden).float()
        if reference is None:
            return score(logits, targets)
        with torch.no_grad():
            wanted = reference.head(cast(Tensor, frozen)).float()
        return score(logits, targets, wanted)

    values_N = in_chunks(values, (hidden_ND, *beside), getattr(head, "out_features", None) or hidden_ND.shape[-1])
    scattered = torch.zeros(labelled.shape, dtype=values_N.dtype, device=values_N.device)
    return scattered.masked_scatter(labelled, values_N)


def in_chunks(values: Callable[..., Tensor], parts: Sequence[Tensor], words: int) -> Tensor:
    """``values(*parts)``, (N,), for (N, ...) parts whose logits have so many words.

    Where the logits would be too many to keep, a chunk at a time, recomputed in the backward pass.
    """
    rows = max(CHUNK_ROWS, CHUNK_ELEMENTS // words)
    if len(parts[0]) <= max(rows, WHOLE_ELEMENTS // words):
        return values(*parts)
    pieces = zip(*(part.split(rows) for part in parts), strict=True)
    return torch.cat([cast(Tensor, checkpoint(values, *piece, use_reentrant=False)) for piece in pieces])


def token_logprobs(model: nn.Module, batch: Batch) -> Tensor:
    """Log-probability of each labelled token, (B, T-1) float32; 0 where there is no label."""
    return per_token(model, batch, lambda logits, targets: _LogProbability.apply(logits, targets)[0])


def sequence_logprobs(model: nn.Module, batch: Batch) -> Tensor:
    """Log-probability of each row's labelled part, summed over its tokens, (B,)."""
    return token_logprobs(model, batch).sum(1)


def nll(model: nn.Module, batch: Batch) -> Tensor:
    """Mean negative log-likelihood a labelled token, in nats."""
    return over_tokens(-token_logprobs(model, batch), batch)


def cross_entropy(model: nn.Module, batch: Batch) -> Tensor:
    """Each row's mean negative log-likelihood a labelled token, (B,) (CE of the sheets: NLL / |y|)."""
    lengths = (batch.targets != IGNORE).sum(1).clamp(min=1)
    return -sequence_logprobs(model, batch) / lengths


def token_kl(model: nn.Module, batch: Batch, reference: ReferenceStates) -> Tensor:
    """KL(reference || model) at each labelled token in nats, (B, T-1); 0 where there is no label."""

    def divergence(logits: Tensor, targets: Tensor, wanted: Tensor) -> Tensor:
        wanted = wanted.log_softmax(-1)
        return F.kl_div(logits.log_softmax(-1), wanted, reduction="none", log_target=True).sum(-1)

    return per_token(model, batch, divergence, reference)


def kl(model: nn.Module, batch: Batch, reference: ReferenceStates) -> Tensor:
    """KL(reference || model), mean over labelled tokens, in nats; only `model` receives a gradient."""
    return over_tokens(token_kl(model, batch, reference), batch)


def over_tokens(values: Tensor, batch: Batch) -> Tensor:
    """The mean of a value a token, (B, T-1), over the labelled tokens of the whole step."""
    return values.sum() / max(batch.total_tokens, 1)


def over_rows(values: Tensor, batch: Batch) -> Tensor:
    """The mean of a value a row, (B,), over the rows of the whole step."""
    return values.sum() / batch.total_rows


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
    arguments = inputs_of(batch)
    predicts = batch.targets != IGNORE
    head = head_of(model)
    if isinstance(head, nn.Identity):
        return model(**arguments).logits[:, :-1][predicts], head
    hidden_BTD = _decoder_and_head(model)[0](**arguments).last_hidden_state
    places = F.pad(predicts, (0, 1)).flatten().nonzero().squeeze(1)  # index_select: a mask's backward pass would sort
    return hidden_BTD.flatten(0, 1).index_select(0, places), head


def inputs_of(batch: Batch) -> dict[str, Any]:
    """The arguments of a decoder for a batch.

    Under causal attention no token of a row looks at the padding to its right, so padding is not masked, which lets the
    fast kernels be used: the mask is all ones (models warn when they get none), and missing where rows are packed.
    """
    arguments: dict[str, Any] = {"input_ids": batch.input_ids, "use_cache": False}
    if batch.position_ids is not None:
        arguments["position_ids"] = batch.position_ids
    if batch.attention_mask is not None:
        arguments["attention_mask"] = torch.ones_like(batch.attention_mask)
    return arguments


def head_of(model: nn.Module) -> nn.Module:
    """What turns `hidden_states` into logits: the model's output head, or the identity."""
    return _decoder_and_head(model)[1] if _is_linear_at_the_end(model) else nn.Identity()


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Inside, the model is in evaluation mode and nothing is recorded; afterwards each of its parts is as it was."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for module, training in modes:
            module.training = training


class _LogProbability(torch.autograd.Function):
    """(log-probability of each target (N,), all log-probabilities (N, V)) from logits (N, V) and targets (N,).

    The backward pass writes (N, V) once, where that of log-softmax and a choice from it fills, scatters and reads an
    array of that size before.  Where a graph of the gradient is wanted it is made of differentiable operations: the
    second output is there so that the saved log-probabilities have a derivative themselves.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        logprobs_NV = logits.log_softmax(-1)
        return logprobs_NV.gather(-1, targets[:, None]).squeeze(-1), logprobs_NV

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor], output: tuple[Tensor, Tensor]) -> None:
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(output[1], inputs[1])

    @staticmethod
    def backward(ctx: Any, picked_N: Tensor | None, whole_NV: Tensor | None) -> tuple[Tensor | None, None]:
        logprobs_NV, targets = ctx.saved_tensors
        if whole_NV is not None:
            if picked_N is not None:
                whole_NV = whole_NV.scatter_add(-1, targets[:, None], picked_N[:, None])
            return whole_NV - logprobs_NV.exp() * whole_NV.sum(-1, keepdim=True), None
        if picked_N is None:
            return None, None
        if torch.is_grad_enabled():
            spread_NV = -picked_N[:, None] * logprobs_NV.exp()
            return spread_NV.scatter_add(-1, targets[:, None], picked_N[:, None]), None
        found_NV, rows = torch.empty_like(logprobs_NV), max(1, CACHED_ELEMENTS // logprobs_NV.shape[-1])
        pieces = (found_NV.split(rows), logprobs_NV.split(rows), picked_N.neg()[:, None].split(rows))
        for out, logprobs, factor in zip(*pieces, strict=True):
            torch.exp(logprobs, out=out).mul_(factor)
        return found_NV.scatter_add_(-1, targets[:, None], picked_N[:, None]), None


def _decoder_and_head(model: nn.Module) -> tuple[nn.Module, nn.Module]:
    causal = cast(Any, model)
    if hasattr(causal, "peft_config"):
        causal = causal.get_base_model()
    return getattr(causal, causal.base_model_prefix), causal.get_output_embeddings()


def _is_linear_at_the_end(model: nn.Module) -> bool:
    """Whether logits = head(decoder(tokens)); tried once a model, on four tokens."""
    if model not in _split:
        tokens = torch.arange(4, device=next(model.parameters()).device)[None]
        arguments = {"input_ids": tokens, "attention_mask": torch.ones_like(tokens), "use_cache": False}
        try:
            with evaluating(model):
                decoder, head = _decoder_and_head(model)
                logits = head(decoder(**arguments).last_hidden_state)
                _split[model] = torch.equal(logits, model(**arguments).logits)
        except (AttributeError, TypeError):
            _split[model] = False
    return _split[model]
