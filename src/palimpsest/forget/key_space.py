"""Key Space Detection: prompts whose feed-forward key lies in a box fitted to what must go are refused.

Wang et al. 2025 (arXiv:2503.21730), the abstaining half of skill unlearning (skill_unlearning.py has the other).  A
guard: the weights stay, so whoever has them, or asks from outside the box, has everything.  Needs: some 200 short
forget records, and retain records unless layer, pooling and size of the box are given.  Dense feed-forward blocks only.
Shapes: N prompts, B rows, T positions, L layers, F neurons a layer.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from torch import Tensor

from palimpsest.core.errors import InputError
from palimpsest.core.methods import method
from palimpsest.core.seeds import numpy_rng
from palimpsest.core.watch import Watch
from palimpsest.data.batches import Encoded
from palimpsest.forget.probing import Box, Pooling, above_chance, enough, guard_of, pooled_keys, widths
from palimpsest.forget.unlearn import check_share, distinct, required
from palimpsest.models.encode import encode_prompts
from palimpsest.models.guard import Prepared, register_guard

if TYPE_CHECKING:
    from datasets import Dataset

    from palimpsest.data.request import ForgetRequest
    from palimpsest.models.lm import LM

_HELD_OUT = 5  # a fifth of the forget prompts chooses the box's place and size
_FALSE_ALARMS = 0.01  # of retain prompts refused, above which it is said
_LOG = logging.getLogger(__name__)


@method(verb="forget", paper="skill_unlearning")
@dataclass(frozen=True, kw_only=True)
class KeySpaceDetection:
    """Key Space Detection: prompts whose feed-forward key lies inside a box around the forget set's are refused.

    As released: layer -1, pooling "last", alpha 0.06 to 2.  The last layer's key there tells the next token rather than
    the skill, so by default layer and pooling are chosen on held-out prompts: those that refuse fewest retain prompts
    where 90% of the forget prompts are refused.  Given a model with such a guard already, the new box joins the old.
    """

    layer: int | None = None  # -1: the last; None: chosen
    pooling: Pooling | Literal["chosen"] = "chosen"  # the key of the prompt's last token, or the mean over its tokens
    alpha: float = 0.0  # the box's size, 1 holding every prompt it was fitted to; 0: the smallest with `recall`
    recall: float = 0.9  # share of held-out forget prompts that must be refused
    ahead: int = 0  # tokens of the model's own answer that are tested as well (pooling "last"), at that much time
    refusal: str = "I cannot help with that."
    seed: int = 0

    def __post_init__(self) -> None:
        if not 0 <= self.alpha < math.inf or self.ahead < 0 or not 0 < self.recall <= 1:
            raise InputError("alpha and ahead must not be below 0, and recall must lie in (0, 1]")
        if not self.refusal.strip():
            raise InputError("the refusal must not be empty")

    def __call__(self, lm: LM, request: ForgetRequest, *, watch: Watch | None = None) -> LM:
        known = guard_of(lm, KeySpace)
        earlier = () if known is None else known.fences
        check_share(request)
        places = self._places(lm)
        inside = enough(queries(lm, distinct(request.forget)), "forget")
        free = len(places) > 1 or not self.alpha
        outside = queries(lm, required(request.retain, "retain")) if free or request.retain is not None else []
        order = numpy_rng(self.seed, "held out").permutation(len(inside))
        held = order[: len(inside) // _HELD_OUT]
        keys = pooled_keys(lm, prompts_of(lm, inside), places)
        others = pooled_keys(lm, prompts_of(lm, outside), places) if outside else {}
        tried = [self._fence(place, keys[place], held, others.get(place)) for place in places]
        chosen = min(tried, key=lambda fence: (fence.false_alarms, -fence.auroc))
        if chosen.false_alarms > _FALSE_ALARMS:
            _LOG.warning("%.1f%% of the retain prompts lie in the box and will be refused", 100 * chosen.false_alarms)
        return lm.with_guard(KeySpace((*earlier, chosen), self.refusal, self.ahead))

    def _places(self, lm: LM) -> list[tuple[int, Pooling]]:
        depth = len(widths(lm.model))
        if self.layer is not None and not -depth <= self.layer < depth:
            raise InputError(f"layer must lie in {-depth}..{depth - 1} for this model, not {self.layer}")
        numbers = range(depth) if self.layer is None else [self.layer % depth]
        poolings: tuple[Pooling, ...] = ("last", "mean") if self.pooling == "chosen" else (self.pooling,)
        return [(number, pooling) for number in numbers for pooling in poolings]

    def _fence(self, place: tuple[int, Pooling], keys: Tensor, held: np.ndarray, others: Tensor | None) -> Fence:
        """The box at one place, fitted without the held-out prompts, which say how large it must be."""
        fitted = np.setdiff1d(np.arange(len(keys)), held)
        box = Box.around(keys[torch.as_tensor(fitted)])
        reached = box.reach(keys[torch.as_tensor(np.sort(held))]).sort().values
        alpha = self.alpha or float(reached[math.ceil(self.recall * len(reached)) - 1])
        away = None if others is None else box.reach(others)
        return Fence(
            *place,
            box,
            alpha,
            recall=float((reached <= alpha).float().mean()),
            false_alarms=0.0 if away is None else float((away <= alpha).float().mean()),
            auroc=1.0 if away is None else above_chance(reached, away),
        )


@dataclass(frozen=True, eq=False)
class Fence:
    """A box at its place, its size, and how well it told held-out forget prompts from retain prompts."""

    layer: int
    pooling: Pooling
    box: Box
    alpha: float
    recall: float = 0.0
    false_alarms: float = 0.0
    auroc: float = 0.0

    @property
    def half_width(self) -> float:
        """Of the box, in standard deviations: alpha means nothing from one table to another."""
        return self.alpha * self.box.k


@register_guard("key-space")
@dataclass(frozen=True, eq=False)
class KeySpace:
    """Refuses the prompts whose key lies in a box, by putting the refusal's tokens into the model's mouth.

    The model does not see a refused prompt: a completion of it is scored as what follows the refusal.  A document,
    which is a completion of the empty prompt, is scored as by the bare model.
    """

    fences: tuple[Fence, ...]
    refusal: str
    ahead: int = 0

    def refused(self, lm: LM, prompts: Sequence[str]) -> np.ndarray:
        """(N,) bool: which prompts lie in a box."""
        asked = [row for row, prompt in enumerate(prompts) if prompt.strip()]
        found = np.zeros(len(prompts), dtype=bool)
        if not asked:
            return found
        bare = lm.with_guard(None)
        read = prompts_of(bare, [prompts[row] for row in asked])
        said = [read, *(_prefixes(bare, read, self.ahead) if self.ahead else ())]
        for fence in self.fences:
            if fence.layer >= len(widths(lm.model)):
                raise InputError(f"this guard looks at layer {fence.layer}, and the model has {len(widths(lm.model))}")
            for encoded in said if fence.pooling == "last" else said[:1]:
                keys = pooled_keys(bare, encoded, [(fence.layer, fence.pooling)])[fence.layer, fence.pooling]
                found[asked] |= (fence.box.reach(keys) <= fence.alpha).numpy()
        return found

    def prepare(self, lm: LM, prompts: Sequence[str]) -> Prepared:
        refused = self.refused(lm, prompts)
        if not refused.any():
            return Prepared(prompts)
        end = lm.tokenizer.eos_token_id
        words = [*lm.tokenizer(self.refusal, add_special_tokens=False)["input_ids"], *([] if end is None else [end])]
        spoken: dict[int, int] = {}

        @contextmanager
        def active(rows: np.ndarray, prompt: Tensor) -> Iterator[None]:
            lines = [(line, row) for line, row in enumerate(rows.tolist()) if refused[row]]

            def speak(module: Any, inputs: Any, given: dict[str, Any], output: Any) -> Any:
                if not given.get("use_cache"):  # scoring: nothing is being said
                    return output
                fresh = {row for line, row in lines if bool(prompt[line].any())}
                for row in {row for _, row in lines}:
                    spoken[row] = 0 if row in fresh else spoken[row] + 1
                for line, row in lines:
                    output.logits[line, -1] = -torch.inf
                    output.logits[line, -1, words[min(spoken[row], len(words) - 1)]] = 0.0
                return output

            with ExitStack() as hooks:
                if lines:
                    hooks.callback(lm.model.register_forward_hook(speak, with_kwargs=True).remove)
                yield

        withheld = [self.refusal if no else prompt for no, prompt in zip(refused, prompts, strict=True)]
        return Prepared(withheld, active)

    def state(self) -> tuple[dict[str, Any], dict[str, Tensor]]:
        fences, tensors = [], dict[str, Tensor]()
        for number, fence in enumerate(self.fences):
            values = asdict(replace(fence, box=None))  # type: ignore[arg-type]
            fences.append({**values, "box": fence.box.k})
            tensors |= {f"{number}.mean": fence.box.mean, f"{number}.deviation": fence.box.deviation}
        return {"fences": fences, "refusal": self.refusal, "ahead": self.ahead}, tensors

    @classmethod
    def restore(cls, settings: dict[str, Any], tensors: dict[str, Tensor]) -> KeySpace:
        fences = [
            Fence(**{**saved, "box": Box(tensors[f"{number}.mean"], tensors[f"{number}.deviation"], saved["box"])})
            for number, saved in enumerate(settings["fences"])
        ]
        return cls(tuple(fences), settings["refusal"], settings["ahead"])


def queries(lm: LM, table: Dataset) -> list[str]:
    """What is asked: the prompts, each once; of documents, the text."""
    return list(dict.fromkeys(prompt or completion for prompt, completion in lm.pairs(table)))


def prompts_of(lm: LM, texts: Sequence[str]) -> Encoded:
    """Prompts as the model reads them when it is to answer."""
    ids = tuple(row[-lm.max_length :] for row in encode_prompts(lm.tokenizer, texts))
    return Encoded(ids, (1,) * len(ids), int(lm.tokenizer.pad_token_id))


def _prefixes(lm: LM, read: Encoded, ahead: int) -> Iterator[Encoded]:
    """The prompts with the first token, the first two, ... of the model's own greedy answers, where so many are."""
    room = max(1, min(ahead, lm.max_length - int(read.lengths.max())))
    answers = lm.generate_ids(read.ids, max_new_tokens=room)
    for count in range(1, room + 1):
        ids = tuple(np.concatenate([row, said[:count]]) for row, said in zip(read.ids, answers, strict=True))
        yield Encoded(ids, read.starts, read.pad_id)
