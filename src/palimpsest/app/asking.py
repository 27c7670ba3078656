"""Put one question to the models before, after and reference of a finished run: their answers, token by token.

Many questions at once are one batch a model.  Nothing here knows of the page.
"""

from __future__ import annotations

import json
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from threading import Lock
from typing import Any

import numpy as np

from palimpsest.core.errors import InputError
from palimpsest.core.records import Evidence
from palimpsest.models.lm import LM

LONGEST = 2000  # characters of a question
NEW_TOKENS = 48
_KEPT = 2  # runs whose models stay loaded


@dataclass(frozen=True)
class Answer:
    """A model's answer as (text, probability) of each token, in order."""

    tokens: tuple[tuple[str, float], ...]

    @property
    def text(self) -> str:
        return "".join(text for text, _ in self.tokens)


@dataclass(frozen=True)
class Prepared:
    """A question from the run's own sets, with its true answer."""

    group: str
    prompt: str
    truth: str


class Asker:
    """The models of finished runs, loaded when first asked; the least recently used are let go."""

    def __init__(self) -> None:
        self._models: OrderedDict[str, dict[str, LM]] = OrderedDict()
        self._lock = Lock()  # one batch at a time: models share the processor anyway

    def ask(self, folder: Path, prompts: Sequence[str]) -> list[dict[str, Answer]]:
        """For each prompt the answers of the run's models, by their role.

        Raises `InputError` for an empty or overlong prompt, and where the models cannot be had again.
        """
        for prompt in prompts:
            self.check(prompt)
        with self._lock:
            models = self._of(folder)
            answers = {role: answered(lm, prompts) for role, lm in models.items()}
        return [{role: found[place] for role, found in answers.items()} for place in range(len(prompts))]

    def check(self, prompt: str) -> None:
        """Raises `InputError` for a question that cannot be put."""
        if not prompt.strip():
            raise InputError("an empty question: write one, or choose one")
        if len(prompt) > LONGEST:
            raise InputError(f"a question of {len(prompt):,} characters: at most {LONGEST:,}")

    def _of(self, folder: Path) -> dict[str, LM]:
        stamp = (folder / "certificate.json").stat().st_mtime_ns
        key = f"{folder} {stamp}"
        if key not in self._models:
            self._models[key] = models_of(folder)
            while len(self._models) > _KEPT:
                self._models.popitem(last=False)
        self._models.move_to_end(key)
        return self._models[key]


def answered(lm: LM, prompts: Sequence[str]) -> list[Answer]:
    """The model's greedy answers with the probability it gave to each of their tokens."""
    texts = lm.generate(list(prompts), max_new_tokens=NEW_TOKENS)
    spoken = [place for place, text in enumerate(texts) if text]
    found = [Answer(())] * len(texts)
    rows = [(prompts[place], texts[place]) for place in spoken]
    encoded = lm.encode(rows) if rows else None
    for number, (place, logprobs) in enumerate(zip(spoken, lm.token_logprobs(rows) if rows else (), strict=True)):
        assert encoded is not None
        ids = encoded.ids[number][encoded.starts[number] :]
        words = [
            str(lm.tokenizer.decode(ids[:end])) for end in range(len(ids) + 1)
        ]  # a token's text hangs on those before
        pieces = [words[end + 1][len(words[end]) :] for end in range(len(ids))]
        kept = [(piece, float(np.exp(p))) for piece, p in zip(pieces[: len(logprobs)], logprobs, strict=False) if piece]
        ended = lm.tokenizer.eos_token
        found[place] = Answer(tuple((piece, p) for piece, p in kept if piece != ended))
    return found


def models_of(folder: Path) -> dict[str, LM]:
    """Before, after and, where there is one, reference, of a run that `palimpsest run` wrote."""
    from palimpsest.jobs.material import prepare
    from palimpsest.jobs.run import Run

    try:
        job = json.loads((folder / "job.json").read_text(encoding="utf-8"))
        options: Mapping[str, Any] = job["options"]
        if job["job"] != "Run":
            raise InputError(f"{folder.name}: made by another command than 'run', so its models are not all known")
    except (OSError, KeyError, ValueError) as error:
        raise InputError(f"{folder.name}/job.json: cannot be read ({error})") from None
    material = prepare(Run(**{**options, "set": tuple(options.get("set", ()))}), progress=False)
    models = {"before": material.before, "after": LM.load(folder / "model")}
    return models | ({"reference": material.reference} if material.reference else {})


def prepared(folder: Path, most: int = 30) -> list[Prepared]:
    """Questions from the run's evidence."""
    examples = Evidence.read(folder).extras.get("examples") or ()
    found = [
        Prepared(str(one.get("set", "")), str(one["prompt"]), str(one.get("truth", "")))
        for one in examples
        if one.get("prompt")
    ]
    return found[:most]
