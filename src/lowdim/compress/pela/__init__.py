"""PELA: low-rank factors from a weight SVD, and an intermediate stage in which the dense model teaches the factorized one."""

from lowdim.compress.pela.factoring import PELAConfig, pela, pela_factors, pela_rank
from lowdim.compress.pela.objective import PELALoss, PELAObjective, perturbation_loss

__all__ = ["PELAConfig", "PELALoss", "PELAObjective", "pela", "pela_factors", "pela_rank", "perturbation_loss"]
