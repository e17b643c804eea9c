"""Solvers in few dimensions: linear systems, regression, matrix completion."""

from lowdim.solve.dcd.applied import as_model, as_preconditioner
from lowdim.solve.dcd.iteration import DCDResult, solve_dcd
from lowdim.solve.dcd.network import DCDNet
from lowdim.solve.dcd.ritz import ritz_dataset, ritz_vectors
from lowdim.solve.dcd.scipy_form import dcd
from lowdim.solve.dcd.training import dcd_loss, train_dcd
from lowdim.solve.linf_regression import RegressionResult, linf_lstsq, sketch_rows
from lowdim.solve.matrix_completion.complete import complete_matrix, complete_sparse_matrix
from lowdim.solve.matrix_completion.result import CompletionResult
from lowdim.solve.matrix_completion.start import spectral_init

__all__ = [
    "CompletionResult",
    "DCDNet",
    "DCDResult",
    "RegressionResult",
    "as_model",
    "as_preconditioner",
    "complete_matrix",
    "complete_sparse_matrix",
    "dcd",
    "dcd_loss",
    "linf_lstsq",
    "ritz_dataset",
    "ritz_vectors",
    "sketch_rows",
    "solve_dcd",
    "spectral_init",
    "train_dcd",
]
