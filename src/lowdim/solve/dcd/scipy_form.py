"""Deep conjugate directions with the signature of scipy's conjugate gradients."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from lowdim.errors import check_float, warn_caller
from lowdim.solve.core.reading import as_given, read_vector
from lowdim.solve.dcd.iteration import solve_dcd

__all__ = ["dcd"]


def dcd(
    A: Any,  # (n, n)
    b: Any,  # (n,) or (n, 1)
    x0: Any = None,  # (n,) or (n, 1)
    *,
    rtol: float = 1e-5,
    atol: float = 0.0,
    maxiter: int | None = None,
    M: Any = None,
    callback: Callable[[Any], Any] | None = None,
    orth: int = 2,
) -> tuple[Any, int]:
    """`solve_dcd` in the shape of `scipy.sparse.linalg.cg`, with the network as `M`.

    Formula: that of solve_dcd, stopped at `‖b - A x‖ <= max(rtol ‖b‖, atol)`.

    Args:
        A, b, x0, callback: as in solve_dcd; `callback` gets a copy of x, not the live vector as in scipy.
        rtol: relative to `‖b‖`, as scipy's (solve_dcd's is relative to the initial residual).
        maxiter: `10 n` by default.
        M: the network as a callable, such as `as_model(net, grid)`; or a matrix, sparse array or `LinearOperator`. With None or
            a fixed symmetric positive definite M, and `orth >= 2`, this is preconditioned conjugate gradients.
        orth: earlier directions to which a new one is made A-orthogonal.

    Returns:
        `(x, info)`: x in the kind of `b`; info 0 if it converged, > 0 the iterations done without converging, < 0 after a
        breakdown. Both of the latter come with a RuntimeWarning that states the residual; scipy is silent.

    Raises:
        ValueError, TypeError: as solve_dcd.

    Example:
        >>> import numpy as np
        >>> from lowdim.solve import dcd
        >>> A, b = np.array([[4.0, 1.0], [1.0, 3.0]]), np.array([1.0, 2.0])
        >>> x, info = dcd(A, b, rtol=1e-10)
        >>> info, bool(np.allclose(A @ x, b))
        (0, True)

    Source: Kaneda et al., ICML 2023, arXiv 2205.10763; the signature is that of scipy 1.17.
    """
    check_float("rtol", rtol, 0.0)
    check_float("atol", atol, 0.0)
    b, x0 = _flat(b), _flat(x0)
    right = read_vector("b", b, on_cpu=False)
    limit = max(rtol * float(right.norm()), atol)
    if not bool(right.any()):
        return as_given(right.clone(), b), 0
    result = solve_dcd(
        A,
        b,
        _identity if M is None else M,
        x0=x0,
        rtol=0.0,
        atol=limit,
        maxiter=10 * len(right) if maxiter is None else maxiter,
        orth=orth,
        callback=callback,
    )
    if result.info:
        why = f"stopped after {result.iterations} iterations" if result.info > 0 else result.reason
        message = f"dcd did not converge: {why}; the residual is {result.residual:.3g}, {limit:.3g} was asked for"
        warn_caller(message, RuntimeWarning)
    return result.x, result.info


def _identity(r: Any) -> Any:
    return r


def _flat(vector: Any) -> Any:
    """`(n,)` of `(n, 1)`, as scipy does."""
    shape = getattr(vector, "shape", ())
    return vector.reshape(-1) if len(shape) == 2 and shape[1] == 1 else vector
