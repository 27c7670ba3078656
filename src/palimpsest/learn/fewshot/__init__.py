"""Learners of few-shot episodes: metric learners, gradient learners, and those that may answer "none of the above"."""

from palimpsest.learn.fewshot.demonstration_retrieval import DemonstrationRetrieval
from palimpsest.learn.fewshot.fast_slow import FastSlow
from palimpsest.learn.fewshot.gpam import GPAM
from palimpsest.learn.fewshot.maml import ANIL, MAML
from palimpsest.learn.fewshot.matching import MatchingNet
from palimpsest.learn.fewshot.open_set import MNAV, OProto, ProtoBias
from palimpsest.learn.fewshot.prototypical import ProtoNet
from palimpsest.learn.fewshot.raml import RAML
from palimpsest.learn.fewshot.relation import RelationNet
from palimpsest.learn.fewshot.susana_distancia import SusanaDistancia

__all__ = [
    "ANIL",
    "GPAM",
    "MAML",
    "MNAV",
    "RAML",
    "DemonstrationRetrieval",
    "FastSlow",
    "MatchingNet",
    "OProto",
    "ProtoBias",
    "ProtoNet",
    "RelationNet",
    "SusanaDistancia",
]
