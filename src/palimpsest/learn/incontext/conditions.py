"""The conditions that learning in context and fine-tuning are compared in: read after a prefix, or after training.

What is kept of each is what attention did at the last token of every query.  Knows nothing of how conditions are
compared.  Shapes: Q queries, L layers, H heads, K tokens of prefix and query, D hidden units, E = H times a head's
size, C labels.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from palimpsest.core.errors import InputError
from palimpsest.models.anatomy import base_of, hooked, layers, output_of, with_output
from palimpsest.models.attention import attention_modules
from palimpsest.models.recorder import recording

if TYPE_CHECKING:
    from palimpsest.models.lm import LM

Labelled = Sequence[tuple[str, str]]  # (text, label word)


@dataclass(frozen=True)
class Texts:
    """Everything as tokens; nothing has special tokens but `start`."""

    start: tuple[int, ...]  # the token that begins every sequence
    demonstrations: tuple[list[int], ...]
    queries: tuple[list[int], ...]
    gold: tuple[int, ...]  # the queries' labels, as numbers
    labels: tuple[list[int], ...]

    @staticmethod
    def of(lm: LM, demonstrations: Labelled, queries: Labelled, template: str, words: Sequence[str] | None) -> Texts:
        if "{text}" not in template or not template.endswith("{label}"):
            raise InputError(f"a template holds {{text}} and ends with {{label}}, not {template!r}")
        if not demonstrations or not queries:
            raise InputError("demonstrations and queries are needed, at least one of each")
        words = list(dict.fromkeys(label for _, label in demonstrations) if words is None else words)
        if len(words) < 2 or len(set(words)) < len(words):
            raise InputError(f"at least 2 different label words are needed, not {words}")
        if unknown := [label for _, label in (*demonstrations, *queries) if label not in words]:
            raise InputError(f"'{unknown[0]}' is not among the label words {words}")
        start = lm.tokenizer.bos_token_id if lm.tokenizer.bos_token_id is not None else lm.tokenizer.eos_token_id
        if start is None:
            raise InputError("the tokenizer has no token to begin a sequence with (neither <bos> nor <eos>)")

        def ids(text: str) -> list[int]:
            return list(lm.tokenizer(text, add_special_tokens=False)["input_ids"])

        def prompt(text: str) -> list[int]:
            return ids(" " + template.removesuffix("{label}").format(text=text).strip())

        labels = tuple(ids(f" {word}") for word in words)
        if len({tuple(label) for label in labels}) < len(labels):
            raise InputError(f"the label words {words} are not different as tokens")
        return Texts(
            (int(start),),
            tuple(prompt(text) + labels[words.index(label)] for text, label in demonstrations),
            tuple(prompt(text) for text, _ in queries),
            tuple(words.index(label) for _, label in queries),
            labels,
        )


@dataclass(frozen=True, eq=False)
class Reading:
    """A model's answers to all queries after one prefix, and what its attention did at each query's last token."""

    labels: Tensor  # (Q, C) mean log-probability of the label's tokens
    outputs: Tensor  # (Q, L, D)
    scores: list[Tensor]  # Q of (L, H, K), the prefix first
    queries: Tensor  # (Q, L, E)

    def change(self, other: Reading) -> Tensor:
        """(Q, L, D): the difference of the outputs, each scaled to length 1 first, or the norms would decide."""
        return F.normalize(self.outputs, dim=-1) - F.normalize(other.outputs, dim=-1)


def read(model: Any, prefix: Sequence[int], texts: Texts, batch_size: int) -> Reading:
    """The prefix is read once; queries of one length are read together, so nothing is padded."""
    device = next(model.parameters()).device
    count = len(texts.queries)
    labels = torch.empty(count, len(texts.labels))
    outputs: list[Any] = [None] * count
    scores: list[Any] = [None] * count
    asked: list[Any] = [None] * count
    lengths = np.array([len(query) for query in texts.queries])
    order = np.argsort(lengths, kind="stable")
    groups = np.split(order, np.flatnonzero(np.diff(lengths[order])) + 1)
    with torch.inference_mode(), recording(model) as recorder:
        cache = _Prefix(model, torch.tensor([list(prefix)], device=device))
        for rows in (group[i : i + batch_size] for group in groups for i in range(0, len(group), batch_size)):
            ids = torch.tensor([texts.queries[row] for row in rows], device=device)
            logits = cache.logits(ids)[:, -1]
            kept = [torch.stack(part, dim=1).float().cpu() for part in (recorder.outputs, recorder.scores)]
            last = torch.stack([part[:, -1] for part in recorder.queries], dim=1).float().cpu()
            for line, row in enumerate(rows):
                outputs[row], scores[row], asked[row] = kept[0][line], kept[1][line], last[line]
            for number, label in enumerate(texts.labels):
                found = _label_logprobs(cache, ids, logits, label)
                labels[torch.from_numpy(rows), number] = found.mean(1).cpu()
    return Reading(labels, torch.stack(outputs), scores, torch.stack(asked))


def _label_logprobs(cache: _Prefix, ids: Tensor, logits: Tensor, label: list[int]) -> Tensor:
    """(B, tokens of the label): their log-probabilities after the queries `ids`, whose last logits are known."""
    wanted = torch.tensor(label, device=ids.device)
    first = logits.float().log_softmax(-1)[:, wanted[:1]]
    if len(label) == 1:
        return first
    whole = cache.logits(torch.cat([ids, wanted[:-1].expand(len(ids), -1)], dim=1))[:, ids.shape[1] :]
    rest = whole.float().log_softmax(-1).gather(2, wanted[1:].expand(len(ids), -1)[..., None])[..., 0]
    return torch.cat([first, rest], dim=1)


class _Prefix:
    """Keys and values of a prefix, computed once."""

    def __init__(self, model: Any, ids: Tensor):
        from transformers import DynamicCache

        self.model = model
        parameters = inspect.signature(base_of(model).forward).parameters
        self.name = "cache" if "cache" in parameters else "past_key_values"
        self.cache = DynamicCache(config=base_of(model).config)
        model(input_ids=ids, use_cache=True, **{self.name: self.cache})

    def logits(self, ids: Tensor) -> Tensor:
        """(B, T, V) after the prefix and each row of (B, T) tokens."""
        cache = copy.deepcopy(self.cache)
        cache.batch_repeat_interleave(len(ids))
        return self.model(input_ids=ids, use_cache=True, **{self.name: cache}).logits


def fine_tuned(model: nn.Module, texts: Texts, lr: float, layer_causal: bool) -> tuple[nn.Module, Tensor]:
    """A copy after one epoch, and the (L, tokens, E) queries of the demonstrations as each was trained on.

    Its own loop, for it is the paper's object and not a training of ours: plain SGD, one demonstration a step, in the
    order of the prompt, with what attention did recorded before each step.
    """
    if not 0 < lr < float("inf"):
        raise InputError(f"lr must be positive, not {lr}")
    tuned = copy.deepcopy(model).eval()
    masks = _key_value_masks(tuned)
    for parameter in tuned.parameters():
        parameter.requires_grad_(False)
    for parameter in masks:
        parameter.requires_grad_(True)
    device = next(tuned.parameters()).device
    seen = []
    with ExitStack() as stack:
        recorder = stack.enter_context(recording(tuned))
        loss_of = stack.enter_context(layer_losses(tuned)) if layer_causal else _whole_loss
        for demonstration in texts.demonstrations:
            ids = torch.tensor([[*texts.start, *demonstration]], device=device)
            loss = loss_of(tuned, ids)
            seen.append(torch.stack([part[0, len(texts.start) :] for part in recorder.queries]).float().cpu())
            gradients = torch.autograd.grad(loss, list(masks))
            with torch.no_grad():
                for (parameter, mask), gradient in zip(masks.items(), gradients, strict=True):
                    parameter.sub_(gradient if mask is None else gradient * mask, alpha=lr)
    return tuned, torch.cat(seen, dim=1)


def _whole_loss(model: Any, ids: Tensor) -> Tensor:
    logits = model(input_ids=ids, use_cache=False).logits
    return F.cross_entropy(logits[0, :-1].float(), ids[0, 1:])


@contextmanager
def layer_losses(model: Any) -> Iterator[Callable[[Any, Tensor], Tensor]]:
    """Each layer's output unembedded by itself, no gradient from one layer to the one below."""
    stack = layers(model)
    norm = _final_norm(model, stack)
    head = model.get_output_embeddings()
    outputs: list[Tensor] = []

    def keep(module: nn.Module, inputs: Any, returned: Any) -> Any:
        outputs.append(output_of(returned))
        return with_output(returned, output_of(returned).detach())

    def loss(model: Any, ids: Tensor) -> Tensor:
        outputs.clear()
        model(input_ids=ids, use_cache=False)
        parts = [F.cross_entropy(head(norm(hidden))[0, :-1].float(), ids[0, 1:]) for hidden in outputs]
        return torch.stack(parts).sum()

    with hooked(*((layer, keep) for layer in stack)):
        yield loss


def _final_norm(model: nn.Module, stack: Sequence[nn.Module]) -> nn.Module:
    """The module that stands beside the stack of layers and has a norm's name."""
    for parent in base_of(model).modules():
        children = dict(parent.named_children())
        if any(child is stack for child in children.values()):
            for name, child in reversed(children.items()):
                if "norm" in name or name.startswith("ln"):
                    return child
    raise InputError(f"{type(model).__name__} has no final norm that can be addressed")


def _key_value_masks(model: nn.Module) -> dict[nn.Parameter, Tensor | None]:
    """The parameters of all key and value projections; a fused one's come with a mask that leaves out the queries."""
    found: dict[nn.Parameter, Tensor | None] = {}
    for module in attention_modules(model):
        parts: Any = module
        if hasattr(module, "k_proj") and hasattr(module, "v_proj"):
            found |= dict.fromkeys([*parts.k_proj.parameters(), *parts.v_proj.parameters()])
        elif hasattr(module, "c_attn"):  # (.., 3 D): query, key, value
            for parameter in parts.c_attn.parameters():
                mask = torch.ones_like(parameter)
                mask[..., : parts.split_size] = 0
                found[parameter] = mask
        else:
            raise InputError(f"{type(module).__name__} has no key and value projections that can be addressed")
    return found
