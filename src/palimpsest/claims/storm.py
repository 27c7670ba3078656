"""STORM's claim on real data: a share of the training labels is made wrong, and nobody is told which.

Two tasks.  Questions: the kind of answer that a question of the TREC collection asks for (six kinds), from vectors of a
small frozen sentence encoder; where the collection is not at hand, generated questions.  Digits: the pictures that
scikit-learn brings.  Every arm trains the same small network for as many steps on the same batches.
Negative control: within each batch the weights go to other samples.
"""

from __future__ import annotations

import gzip
import json
import time
from dataclasses import dataclass
from functools import cached_property, lru_cache
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from palimpsest.claims.definition import Expect, claim
from palimpsest.core import cache
from palimpsest.core.seeds import numpy_rng, seed_everything
from palimpsest.curate import learners, noise
from palimpsest.curate.samples import Vectors
from palimpsest.curate.storm import Storm, Trained
from palimpsest.data.development import development_data
from palimpsest.data.lexicon import invent

NOISE, LEARNABLE = 0.4, 0.3  # share of wrong labels where any class may stand in, and where always the next one does
TRAIN, TEST = 1000, 797
EPOCHS, BATCH, LR = 25, 64, 1e-3
_QUESTIONS = 1797  # of the collection, the same for all seeds: as many as there are digits
_HELD_OUT = 0.1  # of the noisy training samples, for early stopping


@claim(
    paper="storm",
    statement=(
        "With 40% wrong training labels and no clean ones, STORM beats plain training at its end and its weights tell "
        "wrong from right labels at least as well as plain training's losses do; on clean labels it does no harm."
    ),
    paper_says={"direction": "better than cross-entropy under 10 to 40% injected noise (its tables were not read)"},
    expectations=(
        Expect("digits_storm", minus="digits_plain", at_least=1.0),
        Expect("digits_auc", at_least=0.9),
        Expect("digits_auc", minus="digits_auc_loss", at_least=0.0),
        Expect("questions_storm", minus="questions_plain", at_least=1.0),
        Expect("questions_auc", at_least=0.9),
        Expect("questions_auc", minus="questions_auc_loss", at_least=0.0),
        Expect("clean_storm", minus="clean_plain", at_least=-0.5),  # questions with all labels right
    ),
    minutes=3,
    data="real: TREC questions (generated ones where the development data are missing) and scikit-learn digits",
    note=(
        "Accuracy in percent on clean test labels; auc: of the weights, auc_loss: of plain training's final losses. "
        "Under noise the gains hold, but on the questions the weights' auc is about 0.85, not 0.9; "
        "with all labels right it costs them about a point, because some sample of a batch always gets little weight. "
        "On noisy questions early stopping and trimming (told the rate) do better."
    ),
)
def measure(seed: int, mechanism: bool = True, scale: float = 1.0) -> dict[str, float]:
    values: dict[str, float] = {"questions_are_real": float(_collection() is not None)}
    for task in (questions(seed, scale), digits(seed, scale)):
        found = task.compare(mechanism)
        if mechanism:  # the control would leave the rivals as they are
            found |= task.rivals()
        values |= {f"{task.name}_{name}": value for name, value in found.items()}
    clean = questions(seed, scale, share=0.0)
    values["clean_plain"] = clean.score(clean.plain.train(clean.start, clean.noisy))
    values["clean_storm"] = clean.score(clean.storm(mechanism).model)
    if mechanism:
        rule = digits(seed, scale, share=LEARNABLE, how="next")
        values["next_plain"] = rule.score(rule.plain.train(rule.start, rule.noisy))
        values["next_storm"] = rule.score(rule.storm(mechanism).model)
    return values


@dataclass(frozen=True)
class Task:
    """Samples with labels of which a share is wrong, a network to train on them, and clean samples to test it on."""

    name: str
    seed: int
    train: Vectors
    test: Vectors
    width: tuple[int, ...]  # of the network's hidden layers
    share: float
    how: str
    epochs: float

    @cached_property
    def flipped(self) -> tuple[Tensor, Tensor]:
        return noise.flipped(self.train.labels, self.train.classes, self.share, self.seed, self.how)

    @property
    def noisy(self) -> Vectors:
        return Vectors(self.train.inputs, self.flipped[0], self.train.classes)

    @property
    def plain(self) -> noise.Plain:
        return noise.Plain(self.epochs, LR, BATCH, self.seed)

    @cached_property
    def start(self) -> nn.Module:
        """Fresh weights, the same for all arms."""
        seed_everything(self.seed, "network")
        sizes = (self.train.inputs.shape[1], *self.width)
        layers: list[nn.Module] = []
        for before, after in pairwise(sizes):
            layers += [nn.Linear(before, after), nn.ReLU(), nn.Dropout(0.2)]
        return nn.Sequential(*layers, nn.Linear(sizes[-1], self.train.classes))

    def storm(self, mechanism: bool) -> Trained:
        method = Storm(epochs=self.epochs, lr=LR, batch_size=BATCH, seed=self.seed)
        return method.train(self.start, self.noisy, shuffle=not mechanism)

    def score(self, model: nn.Module) -> float:
        return 100 * noise.agreement(model, self.test)

    @property
    def right(self) -> np.ndarray:
        return ~self.flipped[1].numpy()

    def compare(self, mechanism: bool) -> dict[str, float]:
        """STORM and plain training: accuracy, and how well weights and losses tell right labels from wrong ones."""
        from sklearn.metrics import roc_auc_score

        began = time.perf_counter()
        plain = self.plain.train(self.start, self.noisy)
        took = time.perf_counter() - began
        storm = self.storm(mechanism)
        weights, right = storm.weights[:, -1], self.right
        return {
            "plain": self.score(plain),
            "storm": self.score(storm.model),
            "auc": float(roc_auc_score(right, weights)),
            "auc_loss": float(roc_auc_score(right, -noise.outcomes(plain, self.noisy)[0])),
            "auc_own_loss": float(roc_auc_score(right, -noise.outcomes(storm.model, self.noisy)[0])),
            "weight_right": float(weights[right].mean()),
            "weight_wrong": float(weights[~right].mean()),
            "times_slower": storm.seconds / took,
        }

    def rivals(self) -> dict[str, float]:
        """Accuracy of the other ways to train on these labels; the oracle knows which are right."""
        held_out = round(_HELD_OUT * len(self.noisy))
        rest, aside = np.arange(held_out, len(self.noisy)), np.arange(held_out)
        smooth = Vectors(self.noisy.inputs, self.noisy.labels, self.noisy.classes, smoothing=0.1)
        arms = {
            "stopped": self.plain.stopped_early(self.start, self.noisy.select(rest), self.noisy.select(aside)),
            "smooth": self.plain.train(self.start, smooth),
            "trimmed": self.plain.small_loss(self.start, self.noisy, self.share),
            "agra": self.plain.agra(self.start, self.noisy),
            "oracle": self._oracle(self.right),
        }
        return {name: self.score(model) for name, model in arms.items()}

    def _oracle(self, right: np.ndarray) -> nn.Module:
        """Trained as long, without the samples whose labels are wrong."""
        kept = self.noisy.select(np.flatnonzero(right))
        longer = noise.Plain(self.epochs * len(self.noisy) / len(kept), LR, BATCH, self.seed)
        return longer.train(self.start, kept)


def digits(seed: int, scale: float, share: float = NOISE, how: str = "uniform") -> Task:
    from sklearn.datasets import load_digits

    inputs, labels = load_digits(return_X_y=True)
    return _task("digits", seed, scale, (share, how), torch.from_numpy(inputs / 16).float(), labels, (256, 256))


def questions(seed: int, scale: float, share: float = NOISE) -> Task:
    vectors, labels = _vectors()
    return _task("questions", seed, scale, (share, "uniform"), torch.from_numpy(vectors), labels, (128,))


def _task(
    name: str,
    seed: int,
    scale: float,
    wrong: tuple[float, str],
    inputs: Tensor,
    labels: np.ndarray,
    width: tuple[int, ...],
) -> Task:
    classes = int(labels.max()) + 1
    order = numpy_rng(seed, "split", name).permutation(len(labels))
    whole = Vectors(inputs, torch.from_numpy(labels.astype(np.int64)), classes)
    train = whole.select(order[: max(4 * BATCH, round(TRAIN * scale))])
    test = whole.select(order[TRAIN : TRAIN + TEST])
    return Task(name, seed, train, test, width, *wrong, max(2.0, EPOCHS * min(1.0, 4 * scale)))


def _collection() -> Path | None:
    folder = development_data()
    path = None if folder is None else folder / "fewshot_text" / "trec_questions.jsonl.gz"
    return path if path is not None and path.exists() else None


@lru_cache(maxsize=1)
def _vectors() -> tuple[np.ndarray, np.ndarray]:
    """(N, D) vectors of the questions, scaled like those of `learners`, and their kinds (N,)."""
    path = _collection()
    texts, kinds = _generated() if path is None else _read(path)

    def build(folder: Path) -> None:
        np.save(folder / "vectors.npy", learners.vectors(texts).numpy())

    vectors = cache.cached("claims/storm", texts, build, lambda folder: np.load(folder / "vectors.npy"))
    return vectors, np.unique(kinds, return_inverse=True)[1]


def _read(path: Path) -> tuple[list[str], list[str]]:
    with gzip.open(path, "rt", encoding="utf-8") as lines:
        rows = [json.loads(line) for line in lines]
    chosen = numpy_rng(0, "questions").permutation(len(rows))[:_QUESTIONS]
    return [rows[row]["text"] for row in chosen], [rows[row]["coarse"] for row in chosen]


def _generated() -> tuple[list[str], list[str]]:
    """Questions of six kinds, told by words that are no sure sign: two of a question's own kind, one of another."""
    asked = {
        "number": ("how many", "how far", "count", "distance", "percent"),
        "person": ("who", "whose", "author", "president", "actor"),
        "place": ("where", "country", "city", "river", "capital"),
        "thing": ("which animal", "colour", "food", "instrument", "product"),
        "reason": ("why", "meaning", "explain", "origin", "cause"),
        "short": ("abbreviation", "stand for", "acronym", "initials", "code"),
    }
    rng = numpy_rng(0, "generated questions")
    names = invent(200, 2, rng)
    kinds = rng.choice(list(asked), _QUESTIONS)
    texts = []
    for kind in kinds:
        other = rng.choice([one for one in asked if one != kind])
        words = [*rng.choice(asked[kind], 2, replace=False), rng.choice(asked[other]), *rng.choice(names, 2)]
        texts.append(" ".join(rng.permutation(words)) + "?")
    return texts, [str(kind) for kind in kinds]
