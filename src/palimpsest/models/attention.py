"""Attention with momentum (Dai et al. 2023, arXiv:2212.10559, section 5), alone and inside any Hugging Face decoder.

If values act as gradients, momentum is an average of past values that decays with distance:
``MoAttn(q_t) = softmax attention + sum_{i<t} eta^(t-i) v_i``, in every head, before the output projection.
What a query may not see (padding, other documents of a pack) is not averaged either, so the average restarts with each
document.  The sum is written as a product with a (Q, K) matrix, as attention itself is.
Shapes: B rows, H heads, Q queries, K keys, D dimensions of a head.
"""

from __future__ import annotations

import copy
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from palimpsest.core.errors import InputError

NAME = "palimpsest_momentum"  # of the attention implementation, as transformers knows it

Model = TypeVar("Model", bound=nn.Module)


def decayed(distance: Tensor, eta: Tensor, reach: int = 0) -> Tensor:
    """``eta^distance`` where the distance is positive, 0 elsewhere: what a query gives to the values before it.

    `distance`: (..., Q, K) integers, query's place minus key's.  `eta`: a scalar, or (H, 1, 1) for one a head.
    `reach`: how far back, 0 for all the way.
    """
    past = (distance > 0) & (distance <= reach) if reach else distance > 0
    return torch.where(past, eta ** distance.clamp(min=1).to(eta.dtype), 0.0)


def momentum(value: Tensor, eta: Tensor, queries: int, visible: Tensor | None = None, reach: int = 0) -> Tensor:
    """(B, H, Q, D): the decayed sum of the values before each of the last `queries` of the K positions.

    `value`: (B, H, K, D).  `visible`: bool, broadcastable to (B, H, Q, K), which keys a query may see; None for all.
    """
    keys = value.shape[-2]
    places = torch.arange(keys, device=value.device)
    distance = places[keys - queries :, None] - places
    weights = decayed(distance, eta.float() if eta.dtype.itemsize < 4 else eta, reach)
    if visible is not None:
        weights = weights * visible
    return weights.to(value.dtype) @ value


def momentum_attention(query: Tensor, key: Tensor, value: Tensor, eta: Tensor) -> Tensor:
    """(B, H, T, D): causal softmax attention plus momentum, for (B, H, T, D) queries, keys and values."""
    attended = F.scaled_dot_product_attention(query, key, value, is_causal=True)
    return attended + momentum(value, eta, query.shape[-2])


def with_momentum(model: Model, eta: float = 0.5, *, learned: bool = False, reach: int = 0) -> Model:
    """A copy of a Hugging Face causal LM whose attention layers have momentum; the softmax part stays fused.

    `eta` in (0, 1): the decay a token; `learned`: each layer trains its own decay for each head, starting at `eta`.
    `reach`: how many values back the sum goes, 0 for all (1 shows what access to the previous token alone is worth).
    Works for every architecture that takes its attention from transformers' registry, with cached decoding as well.
    The decay is a parameter ``momentum_logit`` of each attention module and lies in its state dict; to load such a
    model, load its configuration, call this function, then load the weights.
    Raises `InputError` for an `eta` outside (0, 1) and for a model whose attention cannot be replaced.
    """
    if not 0 < eta < 1:
        raise InputError(f"eta must lie between 0 and 1, not {eta}: it is a decay a token")
    register(NAME, _forward)
    changed = copy.deepcopy(model)
    found = attention_modules(changed)
    use_attention(changed, NAME)
    for module in found:
        parameter = next(module.parameters())
        heads = _heads(module, changed) if learned else 1
        logit = torch.full((heads, 1, 1), eta, dtype=torch.float32, device=parameter.device).logit()
        module.register_parameter("momentum_logit", nn.Parameter(logit, requires_grad=learned))
        module.__dict__["momentum_reach"] = reach
    return changed


def use_attention(model: nn.Module, name: str) -> None:
    """Let `model` take its attention from the registered implementation `name`, in place."""
    try:
        model.set_attn_implementation(name)  # type: ignore[operator]
    except (AttributeError, ValueError, KeyError) as error:
        found = str(error).splitlines()[0]
        raise InputError(f"the attention of {type(model).__name__} cannot be replaced: {found}") from error


def attention_modules(model: nn.Module) -> list[nn.Module]:
    """The self-attention modules, first layer to last: in each layer, the module that holds `layer_idx`."""
    numbered = [module for module in model.modules() if isinstance(getattr(module, "layer_idx", None), int)]
    inner = [module for module in numbered if not any(one in numbered for one in list(module.modules())[1:])]
    if not inner:
        raise InputError(f"{type(model).__name__} has no attention modules that can be addressed")
    return inner


def _heads(module: nn.Module, model: Any) -> int:
    return int(getattr(module, "num_heads", None) or model.config.get_text_config().num_attention_heads)


def register(name: str, forward: Any) -> None:
    """Make `forward` an attention implementation that transformers knows by `name`; masks as for sdpa."""
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS

    AttentionInterface.register(name, forward)
    AttentionMaskInterface.register(name, ALL_MASK_ATTENTION_FUNCTIONS["sdpa"])


def _forward(
    module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **settings: Any
) -> tuple[Tensor, None]:
    """What transformers calls in the place of its own attention; returns (B, Q, H, D)."""
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    attended, _ = sdpa_attention_forward(module, query, key, value, attention_mask, **settings)
    values = value.repeat_interleave(query.shape[1] // value.shape[1], dim=1)
    visible = attention_mask
    if visible is not None and visible.dtype != torch.bool:
        visible = visible > torch.finfo(visible.dtype).min / 2
    past = momentum(values, module.momentum_logit.sigmoid(), query.shape[-2], visible, module.momentum_reach)
    return attended + past.transpose(1, 2), None
