"""What is solved here in few dimensions: linear systems, regression, matrix completion."""

from lowdim.solve.matrix_completion import CompletionResult, complete_matrix, complete_sparse_matrix, spectral_init

__all__ = ["CompletionResult", "complete_matrix", "complete_sparse_matrix", "spectral_init"]
