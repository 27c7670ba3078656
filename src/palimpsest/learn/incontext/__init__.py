"""Learning without changing a weight: what stands in the context decides the answer."""

from palimpsest.learn.incontext.bayesian_prism import BayesianPrism
from palimpsest.learn.incontext.gpicl import GPICL
from palimpsest.learn.incontext.meta_optimizers import MomentumAttention

__all__ = ["GPICL", "BayesianPrism", "MomentumAttention"]
