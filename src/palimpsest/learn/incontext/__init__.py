"""Learning without changing a weight: what stands in the context decides the answer."""

from palimpsest.learn.incontext.bayesian_prism import BayesianPrism
from palimpsest.learn.incontext.gpicl import GPICL
from palimpsest.learn.incontext.machinelearninglm import MachineLearningLM
from palimpsest.learn.incontext.mend import MEND, HyperTuning, PromptTuning
from palimpsest.learn.incontext.meta_optimizers import MomentumAttention

__all__ = ["GPICL", "MEND", "BayesianPrism", "HyperTuning", "MachineLearningLM", "MomentumAttention", "PromptTuning"]
