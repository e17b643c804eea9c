"""What is solved here in few dimensions: linear systems, regression, matrix completion."""

from lowdim.solve.matrix_completion.complete import CompletionResult, complete_matrix, spectral_init

__all__ = ["CompletionResult", "complete_matrix", "spectral_init"]
