"""Randomised Kaczmarz for consistent linear systems (Strohmer and Vershynin, J. Fourier Anal. Appl. 2009)."""

from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch

from lowdim.errors import check_float, check_int
from lowdim.linalg import stream
from lowdim.results import Result
from lowdim.solve.core.reading import as_given, read_matrix, read_vector
from lowdim.testing.solve_case import SolveCase, conditioned


@dataclass(frozen=True)
class KaczmarzResult(Result):
    """The solution, numpy or torch as `b` was, and how it was found."""

    left_out: ClassVar[tuple[str, ...]] = ("x",)
    x: Any  # (n,) float64
    residual: float  # ‖b - A x‖
    iterations: int
    reason: str


def kaczmarz(A: Any, b: Any, *, rtol: float = 1e-10, maxiter: int = 100_000, seed: int = 0) -> KaczmarzResult:
    """Solve `A x = b` one row at a time: `x ← x + (b_i - a_iᵀ x) / ‖a_i‖² · a_i`, row i drawn with probability `‖a_i‖² / ‖A‖²`.

    Args:
        A, b: `(m, n)` and `(m,)`, numpy arrays or torch CPU tensors.
        rtol: stop at `‖b - A x‖ <= rtol ‖b‖`, looked at every m rows.

    Raises:
        ValueError: shapes that do not fit, entries that are not finite, a row of zeros, options out of range.
    """
    check_float("rtol", rtol, 0.0)
    check_int("maxiter", maxiter, 1)
    matrix, vector = read_matrix("A", A), read_vector("b", b)
    if len(vector) != len(matrix):
        raise ValueError(f"b must have one entry for each of the {len(matrix)} rows of A; got {len(vector)}")
    squares = matrix.square().sum(1)
    if not bool(squares.all()):
        raise ValueError(f"A must have no row of zeros; row {int((squares == 0).nonzero()[0])} is one")
    x, generator, done = matrix.new_zeros(matrix.shape[1]), stream(seed, "kaczmarz"), 0
    residual = float(vector.norm())
    while residual > rtol * float(vector.norm()) and done < maxiter:
        for i in torch.multinomial(squares, min(len(matrix), maxiter - done), replacement=True, generator=generator).tolist():
            x += (vector[i] - matrix[i] @ x) / squares[i] * matrix[i]
            done += 1
        residual = float((vector - matrix @ x).norm())
    reason = "converged" if residual <= rtol * float(vector.norm()) else f"reached maxiter={maxiter}"
    return KaczmarzResult(as_given(x, b), residual, done, reason)


class TestKaczmarz(SolveCase):
    def problem(self):
        A = conditioned(30, 8, condition=3)
        return A, A @ self.solution()

    def solution(self):
        return np.arange(1.0, 9.0)

    def solve(self, A, b):
        return kaczmarz(A, b)

    def residual(self, A, b, x):
        return np.linalg.norm(b - A @ x)

    def refusals(self):
        A, b = self.problem()
        return [
            (ValueError, "30 rows", lambda: kaczmarz(A, b[1:])),
            (ValueError, "row 2", lambda: kaczmarz(A * (np.arange(30) != 2)[:, None], b)),
            (ValueError, "b has NaN", lambda: kaczmarz(A, b * np.nan)),
            (ValueError, "rtol", lambda: kaczmarz(A, b, rtol=-1.0)),
        ]
