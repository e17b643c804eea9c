"""Solvers in few dimensions: linear systems, regression, matrix completion."""

from lowdim.solve.matrix_completion.complete import complete_matrix, complete_sparse_matrix
from lowdim.solve.matrix_completion.result import CompletionResult
from lowdim.solve.matrix_completion.start import spectral_init

__all__ = ["CompletionResult", "complete_matrix", "complete_sparse_matrix", "spectral_init"]
