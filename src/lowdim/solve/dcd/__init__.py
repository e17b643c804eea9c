"""Deep conjugate directions: a network proposes search directions for a symmetric positive definite system."""

from lowdim.solve.dcd.applied import as_model, as_preconditioner
from lowdim.solve.dcd.iteration import DCDResult, solve_dcd
from lowdim.solve.dcd.network import DCDNet
from lowdim.solve.dcd.ritz import ritz_dataset, ritz_vectors
from lowdim.solve.dcd.scipy_form import dcd
from lowdim.solve.dcd.training import dcd_loss, train_dcd

__all__ = [
    "DCDNet",
    "DCDResult",
    "as_model",
    "as_preconditioner",
    "dcd",
    "dcd_loss",
    "ritz_dataset",
    "ritz_vectors",
    "solve_dcd",
    "train_dcd",
]
