"""Systems that make the gradient and the optimizer state low-dimensional.

Every optimizer here is a composition of four parts (`lowdim.optim.parts`) run by one driver (`lowdim.optim.driver`).
"""

from lowdim.optim.adafactor import AdafactorRule
from lowdim.optim.dct import DCTAdamW, DCTProjector
from lowdim.optim.driver import ProjectedOptimizer
from lowdim.optim.fira import Fira
from lowdim.optim.galore import GaLore
from lowdim.optim.groups import ParamGroups, param_groups, state_bytes
from lowdim.optim.half import AdamW16bitRule
from lowdim.optim.how import How
from lowdim.optim.inner import AdamW8bitRule, AdamWRule
from lowdim.optim.int8 import Int8Linear, Int8Parameter, Int8Store, quantize_linears
from lowdim.optim.parts import DenseStore, InnerRule, NoResidual, Parts, Projector, ResidualRule, WeightStore
from lowdim.optim.projectors import Identity, SVDProjector, TuckerProjector
from lowdim.optim.q_galore import QGaLore, QuantizedSVDProjector
from lowdim.optim.residuals import ErrorFeedback, NormScaledResidual
from lowdim.optim.restart import Restart, quick_recovery_cosine

__all__ = [
    "AdafactorRule",
    "AdamW8bitRule",
    "AdamW16bitRule",
    "AdamWRule",
    "DCTAdamW",
    "DCTProjector",
    "DenseStore",
    "ErrorFeedback",
    "Fira",
    "GaLore",
    "How",
    "Identity",
    "InnerRule",
    "Int8Linear",
    "Int8Parameter",
    "Int8Store",
    "NoResidual",
    "NormScaledResidual",
    "ParamGroups",
    "Parts",
    "ProjectedOptimizer",
    "Projector",
    "QGaLore",
    "QuantizedSVDProjector",
    "ResidualRule",
    "Restart",
    "SVDProjector",
    "TuckerProjector",
    "WeightStore",
    "param_groups",
    "quantize_linears",
    "quick_recovery_cosine",
    "state_bytes",
]
