"""Systems that make the gradient and the optimizer state low-dimensional.

Every optimizer here is a composition of four parts (`lowdim.optim.parts`) run by one driver (`lowdim.optim.driver`).
"""

from lowdim.optim.adafactor import AdafactorRule
from lowdim.optim.driver import ProjectedOptimizer
from lowdim.optim.galore import GaLore
from lowdim.optim.groups import ParamGroups, param_groups, state_bytes
from lowdim.optim.inner import AdamW8bitRule, AdamWRule
from lowdim.optim.parts import DenseStore, InnerRule, NoResidual, Parts, Projector, ResidualRule, WeightStore
from lowdim.optim.projectors import Identity, SVDProjector, TuckerProjector

__all__ = [
    "AdafactorRule",
    "AdamW8bitRule",
    "AdamWRule",
    "DenseStore",
    "GaLore",
    "Identity",
    "InnerRule",
    "NoResidual",
    "ParamGroups",
    "Parts",
    "ProjectedOptimizer",
    "Projector",
    "ResidualRule",
    "SVDProjector",
    "TuckerProjector",
    "WeightStore",
    "param_groups",
    "state_bytes",
]
