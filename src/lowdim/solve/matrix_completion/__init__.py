"""Matrix completion by alternating minimization."""

from lowdim.solve.matrix_completion.complete import CompletionResult, complete_matrix, spectral_init

__all__ = ["CompletionResult", "complete_matrix", "spectral_init"]
