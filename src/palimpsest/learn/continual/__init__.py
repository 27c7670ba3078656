"""Continual learners on frozen features: batches come one after another, and no class may be lost."""

from palimpsest.learn.continual.baselines import EWC, KNN, FineTuning, LinearProbe, LwF, Replay
from palimpsest.learn.continual.nmc import NMC
from palimpsest.learn.continual.protocol import ContinualStream, Course, parted, run

__all__ = [
    "EWC",
    "KNN",
    "NMC",
    "ContinualStream",
    "Course",
    "FineTuning",
    "LinearProbe",
    "LwF",
    "Replay",
    "parted",
    "run",
]
