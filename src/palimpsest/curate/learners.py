"""What STORM trains on a pool of texts and labels: the model, its samples, and how it is written when it is done.

Three learners: a small head on frozen sentence vectors (nothing to download, seconds for thousands of rows), any
sequence classifier, and any causal language model that should give the labels as answers.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from palimpsest.core.errors import InputError
from palimpsest.core.files import atomic_folder
from palimpsest.core.seeds import seed_everything
from palimpsest.curate.samples import Answers, Samples, Texts, Vectors

if TYPE_CHECKING:
    from palimpsest.curate.storm import Storm

_WIDTH = 128  # of the head's hidden layer
_DROPOUT = 0.2


@dataclass(frozen=True)
class Learner:
    """A model before training, its samples, and what their classes are called."""

    model: nn.Module
    samples: Samples
    classes: list[str]
    save: Callable[[nn.Module, Path], None]  # write the trained model


def make(plan: Storm, texts: Sequence[str], labels: Sequence[str]) -> Learner:
    """What `plan` trains on texts with labels, one each.  `InputError` for labels that say nothing."""
    if not texts:
        raise InputError(f"no row has both '{plan.text}' and '{plan.label}'")
    with torch.random.fork_rng(devices=[]):
        seed_everything(plan.seed, "head")
        if plan.kind == "answer":
            return _answers(plan, texts, labels)
        numbers, classes = class_numbers(labels)
        return _classifier(plan, texts, numbers, classes) if plan.model else _head(texts, numbers, classes)


def class_numbers(labels: Sequence[str]) -> tuple[Tensor, list[str]]:
    """Labels as int64 numbers (N,), and the classes' names in order.  `InputError` unless some class comes twice."""
    names, numbers, counts = np.unique(np.asarray(labels, dtype=object), return_inverse=True, return_counts=True)
    if len(names) < 2:
        raise InputError(f"all {len(labels)} labels are '{names[0]}'; wanted at least 2 classes")
    if counts.max() < 2 or 2 * len(names) > len(labels):
        raise InputError(
            f"{len(names)} different labels in {len(labels)} rows: these are no classes (kind 'answer' is for answers)"
        )
    return torch.from_numpy(numbers.reshape(-1).astype(np.int64)), [str(name) for name in names]


def head(inputs: int, classes: int, width: int = _WIDTH) -> nn.Module:
    """One hidden layer with dropout on vectors."""
    return nn.Sequential(
        nn.Dropout(_DROPOUT), nn.Linear(inputs, width), nn.ReLU(), nn.Dropout(_DROPOUT), nn.Linear(width, classes)
    )


def vectors(texts: Sequence[str]) -> Tensor:
    """(N, D) float32 sentence vectors of length D ** 0.5, so that their entries are about 1 as first weights expect."""
    from palimpsest.models.encoder import Encoder

    unit = torch.from_numpy(Encoder.load().embed(texts))
    return unit * unit.shape[1] ** 0.5


def _head(texts: Sequence[str], labels: Tensor, classes: list[str]) -> Learner:
    inputs = vectors(texts)
    return Learner(head(inputs.shape[1], len(classes)), Vectors(inputs, labels, len(classes)), classes, _no_save)


def _no_save(model: nn.Module, folder: Path) -> None:
    raise InputError("the head on sentence vectors is not written: name a model to be fine-tuned")


def _classifier(plan: Storm, texts: Sequence[str], labels: Tensor, classes: list[str]) -> Learner:
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    from palimpsest.models.storage import quiet

    names = {"id2label": dict(enumerate(classes)), "label2id": {name: i for i, name in enumerate(classes)}}
    try:
        with quiet():
            model: Any = AutoModelForSequenceClassification.from_pretrained(
                plan.model,
                num_labels=len(classes),
                problem_type="single_label_classification",
                use_safetensors=True,
                ignore_mismatched_sizes=True,  # a head for other classes is drawn anew
                **names,
            )
            tokenizer = AutoTokenizer.from_pretrained(plan.model)
    except (OSError, ValueError) as error:
        raise InputError(f"{plan.model}: not a text classifier or encoder ({str(error).splitlines()[0]})") from error
    if tokenizer.pad_token_id is None:
        raise InputError(f"{plan.model}: its tokenizer has no padding token")
    model.config.pad_token_id = tokenizer.pad_token_id  # where a decoder classifies, it looks for the last real token
    samples = Texts.read(texts, labels, len(classes), tokenizer, max_length=plan.max_length)

    def save(trained: Any, folder: Path) -> None:
        with atomic_folder(folder) as temporary, quiet():
            trained.save_pretrained(temporary)
            tokenizer.save_pretrained(temporary)

    return Learner(_placed(model), samples, classes, save)


def _answers(plan: Storm, prompts: Sequence[str], answers: Sequence[str]) -> Learner:
    from palimpsest.models.lm import LM

    if not plan.model:
        raise InputError("kind 'answer' needs model: a folder or hub name of a causal language model")
    lm = LM.load(plan.model)
    joined = [
        answer if not prompt or prompt[-1].isspace() or answer[:1].isspace() else f" {answer}"
        for prompt, answer in zip(prompts, answers, strict=True)
    ]
    encoded = lm.encode(list(zip(prompts, joined, strict=True)), max_length=plan.max_length)

    def save(trained: Any, folder: Path) -> None:
        lm.with_model(trained.cpu()).save(folder)

    return Learner(_placed(lm.model.float()), Answers(encoded), [], save)


def _placed(model: nn.Module) -> nn.Module:
    return model.to("cuda" if torch.cuda.is_available() else "cpu")
