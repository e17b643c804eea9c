"""Tests of every solver: the known solution, the input's kind of array, and the reason for stopping.

A test makes a problem whose solution it knows (a matrix of bounded condition, so that a failure is a bug and not bad luck)::

    class TestConjugateGradients(SolveCase):
        kinds = ("numpy", "torch", "sparse")

        def problem(self):
            root = conditioned(20, 20, condition=3)
            A = root.T @ root
            return A, A @ self.solution()

        def solution(self):
            return np.random.default_rng(1).normal(size=20)

        def solve(self, A, b):
            return conjugate_gradients(A, b)

        def residual(self, A, b, x):
            return np.linalg.norm(b - A @ x)

A function in scipy's style, `(x, info)`, uses `ScipySolveCase`.
"""

from __future__ import annotations

from abc import abstractmethod
from typing import Any, ClassVar

import numpy as np
import pytest
import torch

from lowdim.testing.agreement import agrees
from lowdim.testing.result_case import ResultCase, ValueCase

__all__ = ["ScipySolveCase", "SolutionCase", "SolveCase", "conditioned"]


def conditioned(rows: int, columns: int, *, condition: float = 10.0, seed: int = 0) -> np.ndarray:
    """A random matrix `(rows, columns)` whose singular values fall from 1 to `1 / condition`, evenly in their logarithm."""
    rng, rank = np.random.default_rng(seed), min(rows, columns)
    u, v = (np.linalg.qr(rng.normal(size=(size, rank)))[0] for size in (rows, columns))
    return u * condition ** -np.linspace(0.0, 1.0, rank) @ v.T


class SolutionCase(ValueCase):
    """Tests of both styles of solver: define the problem, the solver and the solution.

    Attributes:
        kinds: the kinds of arrays that the solver accepts: `"numpy"`, `"torch"`, `"sparse"` (scipy.sparse matrices; numpy comes
            out).
        tolerance: of the solution, relative to its largest entry.
        kinds_tolerance: between kinds of dense arrays 0: the same bits; a sparse product may sum in another order.
    """

    kinds: ClassVar[tuple[str, ...]] = ("numpy", "torch")
    tolerance: ClassVar[float] = 1e-8
    kinds_tolerance: ClassVar[dict[str, float]] = {"torch": 0.0, "sparse": 1e-10}

    @abstractmethod
    def problem(self) -> tuple[Any, ...]:
        """Positional arguments of `solve`, arrays as numpy."""

    @abstractmethod
    def solve(self, *problem: Any) -> Any:
        """The result."""

    @abstractmethod
    def solution(self) -> Any:
        """The required answer: known in advance, not computed by the solver."""

    @abstractmethod
    def residual(self, *problem_and_answer: Any) -> float:
        """The formula of the residual that the result states, of the problem (numpy) and the answer."""

    def answer(self, result: Any) -> Any:
        """The value to compare with the solution; by default the field `x`."""
        return result.x

    def arrays(self, result: Any) -> list[Any]:
        """The arrays of a result, which keep the input's kind."""
        return [self.answer(result)]

    def result(self) -> Any:
        """The result of the problem as it is."""
        return self.solve(*self.problem())

    def expected(self) -> Any:
        """The solution."""
        return self.solution()

    def _given(self, kind: str) -> tuple[Any, ...]:
        return tuple(_as_kind(value, kind) if isinstance(value, np.ndarray) else value for value in self.problem())

    def test_the_kind_of_array_is_kept(self):
        """The same numbers, in the input's kind and in float64."""
        want = self.arrays(self.solve(*self._given("numpy")))
        assert want
        assert all(isinstance(a, np.ndarray) and a.dtype == np.float64 for a in want)
        for kind in self.kinds:
            if kind == "sparse":
                pytest.importorskip("scipy.sparse", reason="sparse matrices are scipy's")
            got = self.arrays(self.solve(*self._given(kind)))
            for ours, theirs in zip(got, want, strict=True):
                assert isinstance(ours, torch.Tensor if kind == "torch" else np.ndarray), kind
                assert ours.dtype in (torch.float64, np.float64), kind
                agrees(ours, theirs, self.kinds_tolerance.get(kind, 0.0))


class SolveCase(SolutionCase, ResultCase):
    """A solver that returns a `Result`: subclass in a test file.

    Attributes:
        rounding: allowed difference between two ways of computing the same residual.
    """

    rounding: ClassVar[float] = 1e-12

    def stated_residual(self, result: Any) -> float:
        """The residual that the result states at the end."""
        return result.residual

    def test_it_says_how_far_it_came_and_why_it_stopped(self):
        """The stated residual is that of the answer; iterations and reason are in the record."""
        problem = self.problem()
        result = self.solve(*problem)
        stated, computed = self.stated_residual(result), self.residual(*problem, self.answer(result))
        assert abs(stated - computed) <= 1e-6 * computed + self.rounding
        record = result.to_dict()
        assert record["reason"]
        assert record["iterations"] >= 1


class ScipySolveCase(SolutionCase):
    """A solver in scipy's style: it returns `(x, info)`, and `info` is 0 if it converged.

    Attributes:
        stated: largest residual that an answer with `info == 0` may have.
    """

    stated: ClassVar[float] = 1e-6

    def answer(self, result: Any) -> Any:
        """The first of the pair."""
        return result[0]

    def test_it_says_how_far_it_came_and_why_it_stopped(self):
        """`info` follows scipy, and is correct."""
        problem = self.problem()
        x, info = self.solve(*problem)
        assert isinstance(info, int)
        assert info == 0
        assert self.residual(*problem, x) <= self.stated


def _as_kind(array: np.ndarray, kind: str) -> Any:
    if kind == "torch":
        return torch.from_numpy(array)
    if kind == "sparse" and array.ndim == 2:
        from scipy import sparse

        return sparse.csr_array(array)
    return array
