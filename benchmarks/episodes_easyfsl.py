"""10,000 5-way 5-shot episodes on 384-d features: drawn and answered here, against the package `easyfsl`.

Both answer with the nearest class mean, and on the same episodes must give the same answers.  easyfsl's side is the
loop of its own `evaluate` over its own sampler (a data loader without workers), for a twentieth of the episodes, scaled
up; beside it stands its classifier alone, on episodes that are already in memory.

    pip install easyfsl
    python benchmarks/episodes_easyfsl.py
"""

from __future__ import annotations

import importlib.util
import sys
from types import ModuleType
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset, Sampler

from common import in_turns, ratio_of, report
from palimpsest.core.watch import Watch
from palimpsest.data.episodes import Episodes
from palimpsest.data.tasks import Examples
from palimpsest.learn import ProtoNet, evaluate

EPISODES, SHARE = 10_000, 20
CLASSES, EACH, D = 60, 40, 384
WAY, SHOT, QUERIES = 5, 5, 15


def peer() -> tuple[Any, Any]:
    """easyfsl's prototypical network and its sampler."""
    if importlib.util.find_spec("torchvision") is None:  # what easyfsl takes from it when imported is not used here
        for part in ("", ".models", ".models.resnet", ".transforms", ".datasets"):
            stand_in = ModuleType(f"torchvision{part}")
            stand_in.__getattr__ = lambda name: type(name, (), {})  # type: ignore[method-assign]
            sys.modules[stand_in.__name__] = stand_in
    Sampler.__init__ = lambda self, data_source=None: None  # type: ignore[method-assign]  # easyfsl 1.5 still passes it
    from easyfsl.methods import PrototypicalNetworks
    from easyfsl.samplers import TaskSampler

    return PrototypicalNetworks, TaskSampler


class Features(Dataset):
    """What easyfsl's sampler asks for."""

    def __init__(self, pool: Examples):
        self.x, self.y = torch.from_numpy(pool.x), pool.y.tolist()

    def __len__(self) -> int:
        return len(self.y)

    def __getitem__(self, row: int) -> tuple[torch.Tensor, int]:
        return self.x[row], self.y[row]

    def get_labels(self) -> list[int]:
        return self.y


def main() -> None:
    rng = np.random.default_rng(0)
    y = np.repeat(np.arange(CLASSES), EACH)
    x = rng.normal(size=(CLASSES, D))[y] + 5 * rng.normal(size=(len(y), D))
    pool = Examples(x.astype(np.float32), y, tuple(map(str, range(CLASSES))))
    episodes = Episodes(pool=pool, way=WAY, shot=SHOT, queries=QUERIES, count=EPISODES)
    fitted = ProtoNet(steps=0).meta_fit(episodes, watch=Watch(progress=False))
    network, task_sampler = peer()
    features, model = Features(pool), network().eval()
    found: dict[str, float] = {}

    def ours() -> None:
        found["ours"] = float(evaluate(fitted, episodes).accuracy.mean())

    def theirs() -> None:
        sampler = task_sampler(features, WAY, SHOT, QUERIES, EPISODES // SHARE)
        loader = DataLoader(features, batch_sampler=sampler, collate_fn=sampler.episodic_collate_fn)
        right = total = 0
        with torch.no_grad():
            for support, support_labels, query, labels, _ in loader:
                model.process_support_set(support, support_labels)
                right += (model(query).detach().data.max(1)[1] == labels).sum().item()
                total += len(labels)
        found["theirs"] = right / total

    rows = episodes.rows(0, EPISODES // SHARE)
    tensors = [(features.x[s.reshape(-1)], features.x[q]) for s, q in zip(rows.support, rows.query, strict=True)]
    support_labels = torch.arange(WAY).repeat_interleave(SHOT)

    def classifier() -> None:
        answers = []
        with torch.no_grad():
            for support, query in tensors:
                model.process_support_set(support, support_labels)
                answers.append(model(query).argmax(1))
        found["agree"] = float((torch.stack(answers).numpy() == fitted.predict(episodes, rows)).mean())

    in_turns(ours, theirs, classifier, rounds=1)  # warm up
    seconds, loop, alone = in_turns(ours, theirs, classifier, rounds=5)
    loop, alone = ([one * SHARE for one in side] for side in (loop, alone))
    assert found["agree"] > 0.9999, found["agree"]
    report(
        "episodes_easyfsl",
        20.0,
        ratio_of(loop, seconds),
        episodes_a_second=EPISODES / float(np.median(seconds)),
        episodes_a_second_easyfsl=EPISODES / float(np.median(loop)),
        episodes_a_second_easyfsl_classifier_alone=EPISODES / float(np.median(alone)),
        ratio_to_its_classifier_alone=ratio_of(alone, seconds),
        same_answers_on_the_same_episodes=found["agree"],
        accuracy=found["ours"],
        accuracy_easyfsl_on_its_own_draws=found["theirs"],
    )


if __name__ == "__main__":
    main()
