"""Conjugate directions proposed by a network: the iteration, and its result."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from lowdim.errors import check_float, check_int
from lowdim.linalg import Operator, as_operator
from lowdim.results import Result
from lowdim.solve.core.reading import as_given, as_tensor, read_operator, read_vector

__all__ = ["DCDResult", "solve_dcd"]

_SPENT = 1e-12  # what is left of a direction, relative to it, after those before it were taken out: only rounding errors
_ROUNDING = 4 * torch.finfo(torch.float64).eps  # of an entry of A x, relative to it


@dataclass(frozen=True)
class DCDResult(Result):
    """The solution of a linear system and how it was found. `x` is numpy or torch, as `b` was."""

    left_out: ClassVar[tuple[str, ...]] = ("x",)

    x: Any  # (n,) float64
    converged: bool
    iterations: int
    reason: str  # "converged", "maxiter", "exact start", or "breakdown: ..."
    residual: float  # ‖b - A x‖, computed from this x
    residuals: list[float]  # the same at the start and after each iteration
    info: int  # as scipy's: 0 converged, > 0 iterations without converging, < 0 breakdown

    def rows(self) -> list[dict[str, Any]]:
        """A row for the start and for each iteration."""
        return [{"iteration": i, "residual": residual} for i, residual in enumerate(self.residuals)]

    @property
    def summary(self) -> str:
        """One line."""
        return f"DCD: {self.reason} after {self.iterations} iterations, residual {self.residual:.3g} of {self.residuals[0]:.3g}"

    def plot(self, *, ax: Any = None) -> Any:
        """The residual by iteration, on a logarithmic axis."""
        axes = self._axes(ax)
        axes.semilogy(range(len(self.residuals)), self.residuals, marker="o")
        axes.set_xlabel("iteration")
        axes.set_ylabel("‖b - A x‖")
        return axes


def solve_dcd(
    A: Any,  # (n, n)
    b: Any,  # (n,)
    model: Any,
    *,
    x0: Any = None,  # (n,)
    rtol: float = 1e-5,
    atol: float = 0.0,
    maxiter: int = 100,
    orth: int = 2,
    callback: Callable[[Any], Any] | None = None,
) -> DCDResult:
    """Solve `A x = b`, A symmetric positive definite, along directions that a network proposes.

    Formula: `q = f(r / ‖r‖)`; for each of the last `orth` directions p: `q ← q - p (qᵀA p) / (pᵀA p)`;
    `x ← x + q (qᵀr) / (qᵀA q)`, `r = b - A x`; stop at `‖r‖ <= max(rtol ‖b - A x0‖, atol)`.

    Args:
        A: a dense array or tensor, a sparse tensor, a scipy sparse array or `LinearOperator`, or anything else that
            `lowdim.linalg.as_operator` takes. Not checked for symmetry.
        b: numpy or torch.
        model: f: a callable (n,) -> (n,) that is given unit residuals of the kind of `b`, such as `as_model(net, grid)`; or a
            matrix or operator, as a fixed linear preconditioner.
        x0: start, zero by default. One whose residual is only rounding error is the solution: no iteration is done.
        rtol: relative to the **initial residual**, as in the paper (`dcd` has scipy's, relative to `‖b‖`).
        orth: how many earlier directions a new one is made A-orthogonal to; 0 is steepest descent along `f(r)`.
        callback: called with a copy of x after each iteration.

    Returns:
        DCDResult in float64, with x in the kind of `b`. It is not an error if it does not converge.

    Raises:
        ValueError: A that is not square or of another size, NaN or infinity in b or x0, options out of range, a model that
            gives another shape. TypeError: complex numbers, a model that cannot be called.

    Example:
        >>> import numpy as np
        >>> from lowdim.solve import solve_dcd
        >>> A, b = np.diag([1.0, 2.0, 4.0]), np.ones(3)
        >>> result = solve_dcd(A, b, lambda r: r / np.diag(A))  # a perfect model: one iteration
        >>> result.x.round(6).tolist(), result.iterations, result.reason
        ([1.0, 0.5, 0.25], 1, 'converged')

    An iteration costs the model, two products with A and `4 orth n` operations. The network costs 100 to 1000 sparse products,
    so fewer iterations save time only on a GPU or where A is expensive; for a Poisson problem on a CPU use scipy's `cg` or
    pyamg. For a singular A (pure Neumann problems) project b and the directions on its range first.

    Source: Kaneda, Akar, Chen, Kala, Hyde, Teran, "A Deep Conjugate Direction Method for Iteratively Solving Linear Systems",
    ICML 2023, arXiv 2205.10763.
    """
    check_float("rtol", rtol, 0.0)
    check_float("atol", atol, 0.0)
    check_int("maxiter", maxiter, 1)
    check_int("orth", orth, 0)
    right = read_vector("b", b, on_cpu=False)
    operator = read_operator("A", A, len(right))
    x = torch.zeros_like(right)
    if x0 is not None:
        x = read_vector("x0", x0, on_cpu=False).to(right.device, copy=True)
        if len(x) != len(right):
            raise ValueError(f"x0 must have {len(right)} entries, as b has; got {len(x)}")
    propose = _proposer(model, b, len(right))

    image = operator @ x
    r = right - image
    residuals = [float(r.norm())]
    limit = max(rtol * residuals[0], atol)
    exact = residuals[0] < float("inf") and residuals[0] <= _ROUNDING * len(right) ** 0.5 * float(right.norm() + image.norm())
    before: deque[tuple[Tensor, Tensor, float]] = deque(maxlen=orth)  # directions p, A p, pᵀA p
    broken = "" if residuals[0] < float("inf") else "breakdown: the residual of the start is not finite"
    while not exact and not broken and residuals[-1] > limit and len(residuals) <= maxiter:
        q = propose(r / residuals[-1])
        length = float(q.norm())
        for p, image, curvature in before:
            q = q - p * (float(q @ image) / curvature)
        if float(q.norm()) < _SPENT * length:
            broken = "breakdown: the model proposes no new direction; it needs more training"
            break
        image = operator @ q
        curvature = float(q @ image)
        if not 0.0 < curvature < float("inf"):
            broken = f"breakdown: qᵀA q = {curvature:g}, so A is not positive definite or the model's direction is useless"
            break
        x = x + q * (float(q @ r) / curvature)
        r = right - operator @ x
        residuals.append(float(r.norm()))
        before.append((q, image, curvature))
        if not residuals[-1] < float("inf"):
            broken = "breakdown: the residual is not finite"
            break
        if callback is not None:
            callback(as_given(x.clone(), b))

    done = len(residuals) - 1
    converged = not broken and (exact or residuals[-1] <= limit)
    reason = "converged" if converged else broken or "maxiter"
    return DCDResult(
        x=as_given(x, b),
        converged=converged,
        iterations=done,
        reason="exact start" if exact else reason,
        residual=residuals[-1],
        residuals=residuals,
        info=0 if converged else -1 if broken else done,
    )


def _proposer(model: Any, b: Any, n: int) -> Callable[[Tensor], Tensor]:
    """The model as a function of a float64 tensor."""
    if isinstance(model, Operator) or hasattr(model, "shape"):  # a matrix or an operator; scipy's can be called, too
        try:
            return as_operator(model, n).matvec
        except ValueError as error:
            raise ValueError(f"the model or preconditioner does not fit: {error}") from error
    if isinstance(model, nn.Module) and hasattr(model, "grid"):
        raise TypeError(f"{type(model).__name__} takes grids, not vectors: give as_model(net, grid)")
    if not callable(model):
        raise TypeError(f"the model must be a callable, a matrix or an operator; got {type(model).__name__}")

    def propose(unit: Tensor) -> Tensor:
        given = model(as_given(unit.clone(), b))
        out = as_tensor(given).to(device=unit.device, dtype=torch.float64)
        if out.shape != unit.shape:
            raise ValueError(f"the model must give shape {tuple(unit.shape)} for that shape; got {tuple(out.shape)}")
        return out

    return propose
