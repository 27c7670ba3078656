"""Learn a new task from a few examples, a stream, an instruction or a context.

A learner is a frozen dataclass: ``fitted = learner.meta_fit(stream)``, ``predictor = fitted.adapt(task)``,
``labels = predictor(x)`` (see `learner`).  Families are packages: ``fewshot``, ``continual``, ``incontext``, ...
"""

from palimpsest.data.episodes import Episodes
from palimpsest.data.evaluation import Scores, evaluate
from palimpsest.data.tasks import Examples, Task, Tasks, TaskStream
from palimpsest.learn.continual import EWC, KNN, NMC, FineTuning, LinearProbe, LwF, Replay
from palimpsest.learn.fewshot import (
    ANIL,
    GPAM,
    MAML,
    MNAV,
    RAML,
    DemonstrationRetrieval,
    FastSlow,
    MatchingNet,
    OProto,
    ProtoBias,
    ProtoNet,
    RelationNet,
    SusanaDistancia,
)
from palimpsest.learn.incontext import (
    GPICL,
    MEND,
    BayesianPrism,
    HyperTuning,
    MachineLearningLM,
    MomentumAttention,
    PromptTuning,
)
from palimpsest.learn.learner import Fitted, Learner, Predictor, load, save

__all__ = [
    "ANIL",
    "EWC",
    "GPAM",
    "GPICL",
    "KNN",
    "MAML",
    "MEND",
    "MNAV",
    "NMC",
    "RAML",
    "BayesianPrism",
    "DemonstrationRetrieval",
    "Episodes",
    "Examples",
    "FastSlow",
    "FineTuning",
    "Fitted",
    "HyperTuning",
    "Learner",
    "LinearProbe",
    "LwF",
    "MachineLearningLM",
    "MatchingNet",
    "MomentumAttention",
    "OProto",
    "Predictor",
    "PromptTuning",
    "ProtoBias",
    "ProtoNet",
    "RelationNet",
    "Replay",
    "Scores",
    "SusanaDistancia",
    "Task",
    "TaskStream",
    "Tasks",
    "evaluate",
    "load",
    "save",
]
