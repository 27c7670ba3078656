"""Demonstrations as tokens, and answers behind a prefix: what learners that distil a prompt share with the prompt.

`zero_shot` and `in_context` are the two ends between which a distilled prompt lies; both change no weight.
Shapes: Q queries, O options, P places of the prefix, D hidden units.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import TYPE_CHECKING, Any

import numpy as np

from palimpsest.core.errors import InputError
from palimpsest.data.tasks import Task
from palimpsest.data.text_tasks import Pair, TextTask
from palimpsest.models.prefix import Prefix

if TYPE_CHECKING:
    from palimpsest.models.lm import LM


@dataclass(frozen=True, eq=False)
class Layout:
    """How pairs become tokens: input, a space, output, and `separator`; each pair of at most `most` tokens."""

    tokenizer: Any
    separator: str = ""
    most: int = 256

    @property
    def start(self) -> tuple[int, ...]:
        bos = self.tokenizer.bos_token_id
        return () if bos is None else (int(bos),)

    @cached_property
    def _ids(self) -> Any:
        """The tokens of a text; the same texts are asked for in every step."""

        @lru_cache(maxsize=2**18)
        def ids(text: str) -> tuple[int, ...]:
            return tuple(self.tokenizer(text, add_special_tokens=False)["input_ids"])

        return ids

    def tokens(self, text: str) -> tuple[int, ...]:
        return self._ids(text)

    def output(self, output: str) -> tuple[int, ...]:
        """An output's tokens, which begin with the space before it."""
        return self.tokens(f" {output}")[: self.most]

    def pair(self, pair: Pair) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Input and output; if they are too long together the input loses its end first."""
        output = self.output(pair[1])
        return self.tokens(pair[0])[: self.most - len(output)], output

    def demonstrations(self, pairs: Sequence[Pair], room: int) -> list[tuple[int, ...]]:
        """The tokens of each pair, as many from the first on as fit into `room` tokens beside the start token.

        Raises `InputError` if there is no pair, or no room for the first one.
        """
        if not pairs:
            raise InputError("there is no demonstration")
        found: list[tuple[int, ...]] = []
        left = room - len(self.start)
        for one in pairs:
            question, answer = self.pair(one)
            whole = (*question, *answer, *self.tokens(self.separator))
            if len(whole) > left:
                break
            found.append(whole)
            left -= len(whole)
        if not found:
            raise InputError(f"the first demonstration does not fit into {room} tokens: shorten it")
        return found

    def joined(self, demonstrations: Sequence[tuple[int, ...]]) -> list[int]:
        return [*self.start, *(token for one in demonstrations for token in one)]


@dataclass(frozen=True, eq=False)
class PrefixPredictor:
    """Answers to a task's inputs behind a prefix.  Each input is answered by itself."""

    prefix: Prefix
    layout: Layout
    options: tuple[str, ...] = ()

    def __call__(self, x: Sequence[str]) -> np.ndarray:
        """(Q,) int64: the option of the highest score.  Raises `InputError` for a task without options."""
        return self.scores(x).argmax(1)

    def scores(self, inputs: Sequence[str], options: Sequence[str] | None = None) -> np.ndarray:
        """(Q, O) float64: the mean log-probability of an option's tokens after each input."""
        options = self.options if options is None else options
        if not options:
            raise InputError("the task has no options to choose among: generate answers instead")
        if isinstance(inputs, str) or not all(isinstance(text, str) for text in inputs):
            raise InputError("wanted a list of texts")
        rows = [self.layout.pair((text, option)) for text in inputs for option in options]
        return self.prefix.mean_logprobs(rows).reshape(len(inputs), len(options))

    def generate(self, inputs: Sequence[str], *, max_new_tokens: int = 32, stop: str = "\n") -> list[str]:
        """The greedy answer to each input, up to `stop` and without the spaces around it."""
        prompts = [self.layout.tokens(text)[: self.layout.most] for text in inputs]
        said = self.prefix.generate(prompts, max_new_tokens)
        return [text.lstrip().split(stop)[0].strip() for text in said]


def zero_shot(lm: LM, task: TextTask | Task, *, separator: str = "", most: int = 256) -> PrefixPredictor:
    """The model's answers without any demonstration."""
    layout = Layout(lm.tokenizer, separator, most)
    start = layout.start or (lm.tokenizer.eos_token_id,)  # where GPT-2 begins a document
    return PrefixPredictor(Prefix.of(lm, start), layout, TextTask.of(task).options)


def in_context(
    lm: LM, task: TextTask | Task, shots: int = 16, *, separator: str = "", most: int = 256
) -> PrefixPredictor:
    """The model's answers behind the first `shots` demonstrations as text, as many as fit beside a query."""
    task = TextTask.of(task)
    layout = Layout(lm.tokenizer, separator, most)
    longest = max(sum(map(len, layout.pair(pair))) for pair in task.examples)
    shown = layout.demonstrations(task.examples[:shots], lm.max_length - longest)
    return PrefixPredictor(Prefix.of(lm, layout.joined(shown)), layout, task.options)
