"""Systems that make the gradient and the optimizer state low-dimensional.

Every optimizer here is a composition of four parts (`lowdim.optim.core.parts`) run by one driver (`lowdim.optim.core.driver`).
"""

from lowdim.optim.core.adafactor import AdafactorRule
from lowdim.optim.core.driver import ProjectedOptimizer
from lowdim.optim.core.groups import ParamGroups, param_groups, state_bytes
from lowdim.optim.core.half import AdamW16bitRule
from lowdim.optim.core.inner import AdamW8bitRule, AdamWRule
from lowdim.optim.core.int8 import Int8Linear, Int8Parameter, Int8Store, quantize_linears
from lowdim.optim.core.options import TrainingOptions
from lowdim.optim.core.parts import DenseStore, InnerRule, NoResidual, Parts, Projector, ResidualRule, WeightStore
from lowdim.optim.core.plain import AdamW, AdamW8bit
from lowdim.optim.core.projectors import Identity, SVDProjector, TuckerProjector
from lowdim.optim.core.residuals import ErrorFeedback, NormScaledResidual
from lowdim.optim.dct import DCTAdamW, DCTProjector
from lowdim.optim.fira import Fira
from lowdim.optim.galore import GaLore
from lowdim.optim.q_galore import QGaLore, QuantizedSVDProjector
from lowdim.optim.restart import Restart, quick_recovery_cosine

How = TrainingOptions  # the name in 0.1

__all__ = [
    "AdafactorRule",
    "AdamW",
    "AdamW8bit",
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
    "TrainingOptions",
    "TuckerProjector",
    "WeightStore",
    "param_groups",
    "quantize_linears",
    "quick_recovery_cosine",
    "state_bytes",
]
