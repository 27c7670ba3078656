"""Two models at once: a model's predictions, less what another that was trained on the text raises above them.

The decode-time form of Who's Harry Potter that the MUSE benchmark uses (sheet `whp`, variants), and the formula.
Shapes: B rows, T tokens, D hidden units, n tokens, V words, L layers.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache, DynamicLayer

from palimpsest.core.errors import InputError
from palimpsest.forget.unlearn import check_vocabulary
from palimpsest.models.anatomy import base_of, sharing_copy
from palimpsest.models.guard import Prepared, register_guard

if TYPE_CHECKING:
    from palimpsest.models.lm import LM


def generic_logits(base: Tensor, reinforced: Tensor, alpha: float, normalise: bool = True) -> Tensor:
    """v_base - alpha ReLU(v_reinforced - v_base), (n, V).

    A model's logits are defined up to a constant of each position, and the ReLU of a difference is not blind to it:
    with `normalise` both are log-probabilities first.
    """
    if normalise:
        base, reinforced = base.log_softmax(-1), reinforced.log_softmax(-1)
    return base - alpha * (reinforced - base).relu()


@register_guard("interpolation")
@dataclass(frozen=True, eq=False)
class InterpolationGuard:
    """Corrects every prediction of the model by that of its reinforced copy, of which it holds the changed weights.

    Both models read the same tokens; the second keeps its keys and values as further layers of the first one's cache.
    The correction acts on what the output head says, before any cap or scale that an architecture puts on its logits.
    """

    alpha: float
    normalise: bool
    changed: dict[str, Tensor] = field(repr=False)  # the reinforced model's weights that differ from the model's
    built: weakref.WeakKeyDictionary[nn.Module, nn.Module] = field(
        default_factory=weakref.WeakKeyDictionary, repr=False
    )

    @staticmethod
    def between(lm: LM, reinforced: LM, alpha: float, normalise: bool) -> InterpolationGuard:
        check_vocabulary(lm, reinforced)
        own = dict(lm.model.named_parameters())
        changed = {
            name: value.detach().clone()
            for name, value in reinforced.model.named_parameters()
            if not torch.equal(value, own[name].to(value.device))
        }
        if not changed:
            raise InputError("the reinforced model equals the model: raise reinforce_lr or reinforce_epochs")
        return InterpolationGuard(alpha, normalise, changed)

    def prepare(self, lm: LM, prompts: Sequence[str]) -> Prepared:
        other = self._reinforced(lm)

        @contextmanager
        def active(rows: np.ndarray, prompt: Tensor) -> Iterator[None]:
            with _corrected(base_of(lm.model), other, self.alpha, self.normalise):
                yield

        return Prepared(prompts, active)

    def state(self) -> tuple[dict[str, Any], dict[str, Tensor]]:
        return {"alpha": self.alpha, "normalise": self.normalise}, self.changed

    @classmethod
    def restore(cls, settings: dict[str, Any], tensors: dict[str, Tensor]) -> InterpolationGuard:
        return cls(settings["alpha"], settings["normalise"], tensors)

    def _reinforced(self, lm: LM) -> Any:
        """The reinforced model on `lm`'s device: its unchanged weights are the model's own memory."""
        if lm.model not in self.built:
            model = base_of(sharing_copy(lm.model))
            parameters = dict(model.named_parameters())
            strange = [name for name, value in self.changed.items() if not _fits(parameters.get(name), value)]
            if strange:
                raise InputError(f"the guard's reinforced model is of another architecture: {strange[0]} does not fit")
            for name, value in self.changed.items():
                parameters[name].data = value.to(lm.device)
            layers = model.config.get_text_config().num_hidden_layers
            for module in model.modules():
                if isinstance(getattr(module, "layer_idx", None), int):
                    module.layer_idx += layers  # its place in the common cache
            self.built[lm.model] = model.eval()
        return self.built[lm.model]


def _fits(parameter: Tensor | None, value: Tensor) -> bool:
    return parameter is not None and parameter.shape == value.shape


@contextmanager
def _corrected(model: Any, other: Any, alpha: float, normalise: bool) -> Iterator[None]:
    """Inside, `model`'s head gives generic logits.

    Its decoder's output carries the other decoder's beside it, (B, T, 2D), so that whoever takes the head apart from
    the decoder, or asks it about some positions only, has the two together.
    """
    decoder, head = getattr(model, model.base_model_prefix), model.get_output_embeddings()
    beside, other_head = getattr(other, other.base_model_prefix), other.get_output_embeddings()
    states: list[Tensor] = []

    def first_the_other(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        cache = next((value for value in kwargs.values() if isinstance(value, Cache)), None)
        if cache is not None:  # before the model's own layers have grown: both see the same past
            room = 2 * model.config.get_text_config().num_hidden_layers - len(cache.layers)
            cache.layers.extend(DynamicLayer() for _ in range(room))
        states.append(beside(*args, **kwargs).last_hidden_state)

    def join(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        output.last_hidden_state = torch.cat([output.last_hidden_state, states.pop()], -1)
        return output

    def apart(module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor]:
        own, others = args[0].chunk(2, dim=-1)
        states.append(others)
        return (own,)

    def correct(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
        wanted = generic_logits(output.float(), other_head(states.pop()).float(), alpha, normalise)
        return wanted.to(output.dtype)

    handles = [
        decoder.register_forward_pre_hook(first_the_other, with_kwargs=True),
        decoder.register_forward_hook(join, with_kwargs=True),
        head.register_forward_pre_hook(apart),
        head.register_forward_hook(correct),
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
