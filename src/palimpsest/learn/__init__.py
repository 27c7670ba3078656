"""Learn a new task from a few examples, a stream, an instruction or a context.

A learner is a frozen dataclass: ``fitted = learner.meta_fit(stream)``, ``predictor = fitted.adapt(task)``,
``labels = predictor(x)`` (see `learner`).  Families are packages: ``fewshot``, ``continual``, ``incontext``, ...
"""

from palimpsest.data.episodes import Episodes, Examples, Task, Tasks, TaskStream
from palimpsest.learn.learner import Fitted, Learner, Predictor, load, save

__all__ = ["Episodes", "Examples", "Fitted", "Learner", "Predictor", "Task", "TaskStream", "Tasks", "load", "save"]
