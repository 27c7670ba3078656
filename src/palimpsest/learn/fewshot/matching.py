"""Matching networks: a query's class is the similarity-weighted vote of all supports.

Vinyals et al. 2016 (arXiv:1606.04080), without full-context embeddings (their gain is small and they make an answer
depend on the order of the support).  A baseline of `susana_distancia`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor
from torch.nn import functional as F

from palimpsest.core.methods import method
from palimpsest.learn.fewshot.episodic import Episodic


@method(verb="learn", paper="susana_distancia", name="matching-net")
@dataclass(frozen=True, kw_only=True)
class MatchingNet(Episodic):
    """Matching network: supports vote for their class, each weighted by a softmax over cosine similarities."""

    sharpness: float = 10.0  # cosines are multiplied by it; 1 in the paper, where the vote stays nearly even

    def scores(self, network: Any, support: Tensor, labels: Tensor, query: Tensor, way: int) -> Tensor:
        """Log-probabilities (E, Q, N): they are logits of themselves."""
        cosines = F.normalize(query, dim=-1) @ F.normalize(support, dim=-1).transpose(1, 2)  # (E, Q, S)
        votes = (self.sharpness * cosines).softmax(-1) @ F.one_hot(labels, way).to(cosines.dtype)
        return votes.clamp_min(1e-12).log()
