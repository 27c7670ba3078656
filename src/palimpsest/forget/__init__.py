"""The methods of the verb 'forget': each a frozen dataclass, called with a model and a request, returning a new model.

The losses they are made of are in `palimpsest.forget.losses`.
"""

from __future__ import annotations

from palimpsest.forget import losses
from palimpsest.forget.ascent import LLMU, FinetuneRetain, GradDiff, GradientAscent, KLMin
from palimpsest.forget.content_filter import ContentFiltering
from palimpsest.forget.dmm import DMM
from palimpsest.forget.eco import ECO
from palimpsest.forget.eul import EUL
from palimpsest.forget.in_context import Guardrail, InContext
from palimpsest.forget.key_space import KeySpaceDetection
from palimpsest.forget.kga import KGA
from palimpsest.forget.merge import TaskVector
from palimpsest.forget.needle import Needle
from palimpsest.forget.o3 import O3
from palimpsest.forget.preference import NPO, IdkDPO, Relabel, SimNPO
from palimpsest.forget.retrain import Retrain
from palimpsest.forget.rmu import RMU
from palimpsest.forget.scrub import Scrub
from palimpsest.forget.skill_unlearning import NeuronAdjust, SelectivePruning
from palimpsest.forget.uoe import UOE
from palimpsest.forget.weighted import CEU, UNDIAL, WGA, SatImp
from palimpsest.forget.whp import WhosHarryPotter

__all__ = [
    "CEU",
    "DMM",
    "ECO",
    "EUL",
    "KGA",
    "LLMU",
    "NPO",
    "O3",
    "RMU",
    "UNDIAL",
    "UOE",
    "WGA",
    "ContentFiltering",
    "FinetuneRetain",
    "GradDiff",
    "GradientAscent",
    "Guardrail",
    "IdkDPO",
    "InContext",
    "KLMin",
    "KeySpaceDetection",
    "Needle",
    "NeuronAdjust",
    "Relabel",
    "Retrain",
    "SatImp",
    "Scrub",
    "SelectivePruning",
    "SimNPO",
    "TaskVector",
    "WhosHarryPotter",
    "losses",
]
