"""NMC's claim: on a pretrained encoder, class means that are never trained do as well as continual learners.

Real requests to an assistant (CLINC150), a hundred intents in ten tasks of ten, 20 to learn from and 10 to test on of
each.  Every learner sees the same frozen features of the packaged encoder; each baseline tries four settings on a
quarter of the training examples held out, at the same number of passes; NMC has nothing to set.  No baseline trains the
encoder itself.  Two controls without pretraining are always beside it: the encoder with random weights, and words
counted (TF-IDF).

The negative control gives NMC, and it alone, the encoder with random weights.
"""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from typing import Any

import numpy as np

from palimpsest.claims import Expect, claim
from palimpsest.core.errors import InputError
from palimpsest.core.seeds import numpy_rng, seed_everything
from palimpsest.core.watch import Watch
from palimpsest.data.development import development_data
from palimpsest.data.labelled import read_rows
from palimpsest.data.tasks import Examples
from palimpsest.learn.continual.baselines import EWC, KNN, FineTuning, LinearProbe, LwF, Replay
from palimpsest.learn.continual.continual import ContinualLearner
from palimpsest.learn.continual.nmc import NMC
from palimpsest.learn.continual.protocol import ContinualStream, run
from palimpsest.models.encoder import Encoder
from palimpsest.models.features import text_features

FILE = "fewshot_text/clinc150.jsonl.gz"
CLASSES, TASKS, LEARNT, TESTED = 100, 10, 20, 10
EPOCHS = 10
QUIET = Watch(progress=False)

RATES = (0.003, 0.01, 0.03, 0.1)
BASELINES: dict[str, tuple[Any, ...]] = {  # frozen dataclasses of different fields
    "knn": tuple(KNN(neighbours=k) for k in (1, 3, 5, 9)),
    "fine_tuning": tuple(FineTuning(lr=lr, epochs=EPOCHS) for lr in RATES),
    "replay_2": tuple(Replay(lr=lr, epochs=EPOCHS, exemplars=2) for lr in RATES),
    "replay_10": tuple(Replay(lr=lr, epochs=EPOCHS, exemplars=10) for lr in RATES),
    "ewc": tuple(EWC(lr=lr, epochs=EPOCHS, strength=s) for lr in RATES[1:3] for s in (100.0, 10_000.0)),
    "lwf": tuple(LwF(lr=lr, epochs=EPOCHS, strength=s) for lr in RATES[1:3] for s in (1.0, 10.0)),
    "joint": tuple(LinearProbe(lr=lr, epochs=EPOCHS) for lr in RATES),
}


@claim(
    paper="nmc",
    statement="Class means of frozen pretrained features come within 5 points of a joint linear probe and do not lose "
    "to replay, whatever the order of the classes.",
    paper_says={
        "NMC, Split-CIFAR-100, ViT-B/16, v2, %": 83.70,
        "replay of 50 a class": 82.53,
        "joint training": 90.85,
    },
    expectations=(
        Expect("nmc", minus="joint", at_least=-5.0),
        Expect("nmc", minus="replay_2", at_least=0.0),
        Expect("nmc", minus="replay_10", at_least=-2.0),
        Expect("nmc", minus="random_encoder", at_least=3.0),
        Expect("nmc", minus="word_counts", at_least=3.0),
        Expect("order_difference", at_most=0.0),
        Expect("forget_difference", at_most=1e-10),
    ),
    minutes=3,
    data="real: CLINC150, 100 intents of 30 requests (needs the development data)",
)
def measure(seed: int, mechanism: bool = True, scale: float = 1.0) -> dict[str, float]:
    """Last accuracies in percent; `order_difference` is the largest change of a mean under another order of tasks."""
    pretrained, random, words = _pools(seed, max(2 * TASKS, round(CLASSES * scale)))
    ours = pretrained if mechanism else random
    last = {
        "nmc": _last(NMC(), *ours, seed),
        "random_encoder": _last(NMC(), *random, seed),
        "word_counts": _last(NMC(), *words, seed),
    }
    tries = slice(None) if scale == 1 else slice(1, 2)
    for name, settings in BASELINES.items():
        last[name] = _last(
            _tuned([replace(one, seed=seed) for one in settings[tries]], pretrained[0], seed), *pretrained, seed
        )
    return last | _exactness(pretrained[0], seed)


def _last(learner: ContinualLearner, train: Examples, test: Examples, seed: int) -> float:
    if isinstance(learner, LinearProbe):  # what it knew in between is not asked for
        known = learner.start().observe(train, watch=QUIET)
        return 100 * float((known.classify(test.x) == test.y).mean())
    return run(learner, ContinualStream(train, test, TASKS, seed), watch=QUIET).last_accuracy


def _tuned(settings: list[Any], train: Examples, seed: int) -> Any:
    """The setting that is best on the last quarter of each class's training examples; the first of equals."""
    if len(settings) == 1:
        return settings[0]
    place = np.concatenate([np.arange(count) for count in train.counts])  # rows come class by class
    held = place >= 0.75 * train.counts[train.y]
    parts = train.take(np.flatnonzero(~held)), train.take(np.flatnonzero(held))
    return max(settings, key=lambda one: _last(one, *parts, seed))


def _exactness(train: Examples, seed: int) -> dict[str, float]:
    """Means after tasks in another order, and after forgetting a class and some examples, against never seeing them."""
    first, second = (NMC().meta_fit(ContinualStream(train, train, TASKS, order)) for order in (seed, seed + 1))
    places = [second.names.index(name) for name in first.names]
    order = (first.means - second.means[places]).abs().max()

    rng = numpy_rng(seed, "forget")
    gone = train.names[int(rng.integers(train.way))]
    some = rng.random(len(train)) < 0.1
    left = first.forget_examples(train.take(np.flatnonzero(some)))
    left = left.forget(gone) if gone in left.names else left
    stays = train.take(np.flatnonzero(~some))
    never = NMC().start().observe(stays.of_classes([name for name in stays.names if name != gone]))
    places = [left.names.index(name) for name in never.names]
    return {
        "order_difference": float(order),
        "forget_difference": float((never.means - left.means[places]).abs().max()),
    }


Pool = tuple[Examples, Examples]


def _pools(seed: int, classes: int) -> tuple[Pool, Pool, Pool]:
    """(train, test) as features of the pretrained encoder, of one with random weights, and as counted words."""
    whole, *features = _embedded(classes)
    order = [numpy_rng(seed, "rows", label).permutation(np.flatnonzero(whole.y == label)) for label in range(whole.way)]
    rows = [np.concatenate([part[:LEARNT] for part in order]), np.concatenate([part[LEARNT:] for part in order])]
    train, test = (whole.take(part) for part in rows)
    pretrained, random = ((replace(train, x=x[rows[0]]), replace(test, x=x[rows[1]])) for x in features)
    return pretrained, random, _counted(train, test)


def _counted(train: Examples, test: Examples) -> Pool:
    from sklearn.feature_extraction.text import TfidfVectorizer

    counter = TfidfVectorizer().fit(train.x)
    # a request without a known word must not be a zero vector
    parts = [
        np.pad(counter.transform(one.x).toarray(), ((0, 0), (0, 1)), constant_values=1e-6) for one in (train, test)
    ]
    return replace(train, x=parts[0]), replace(test, x=parts[1])


@cache
def _embedded(classes: int) -> tuple[Examples, np.ndarray, np.ndarray]:
    """The requests, their features, and those of the encoder with random weights."""
    folder = development_data()
    path = None if folder is None else folder / FILE
    if path is None or not path.is_file():
        raise InputError(f"the claim of nmc needs {FILE} in the folder that PALIMPSEST_DEV_DATA names")
    whole, _ = read_rows(path, label="label")
    names = [name for name in whole.names if name != "oos"]
    chosen = numpy_rng(0, "intents").permutation(len(names))[:classes]
    whole = whole.of_classes([names[place] for place in sorted(chosen)])
    each = LEARNT + TESTED
    whole = whole.take(np.concatenate([np.flatnonzero(whole.y == label)[:each] for label in range(whole.way)]))
    encoder = Encoder.load()
    return whole, text_features(whole.x, encoder), text_features(whole.x, _untrained(encoder))


def _untrained(encoder: Encoder) -> Encoder:
    """The same architecture and tokenizer with fresh weights."""
    from transformers import AutoModel

    fresh = Encoder.load()
    seed_everything(0, "random encoder")
    transformer: Any = fresh.model[0]
    transformer.auto_model.load_state_dict(AutoModel.from_config(transformer.auto_model.config).state_dict())
    return Encoder(fresh.model.eval(), f"{encoder.source}, random weights")
