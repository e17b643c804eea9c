"""Lanczos' tridiagonal form of a symmetric operator, with full re-orthogonalisation."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from lowdim.errors import check_int
from lowdim.linalg.operators import Operator
from lowdim.linalg.wide import wide

__all__ = ["Lanczos", "lanczos"]

_STOP = 1e-10  # an off-diagonal entry below this times max(1, largest diagonal entry): the Krylov space is complete


class Lanczos(NamedTuple):
    """`basis @ A @ basisᵀ = T`, tridiagonal; `m` steps were done.

    Attributes:
        diagonal: of `T`, `(m,)` float64.
        off_diagonal: of `T`, `(m - 1,)` float64, positive.
        basis: orthonormal rows `(m, n)`, float32 or better; the first is the unit start.
        residual: the next off-diagonal entry: an eigenvalue `t` of `T` with unit vector `y` is within `residual · |y_m|` of one
            of `A`.
    """

    diagonal: Tensor
    off_diagonal: Tensor
    basis: Tensor
    residual: float

    def eigh(self) -> tuple[Tensor, Tensor]:
        """Eigenvalues of `T`, ascending, and its eigenvectors in columns `(m, m)`, float64.

        The rows of `vectors.T @ basis` are the Ritz vectors of `A`.
        """
        T = torch.diag(self.diagonal)
        if len(self.off_diagonal):
            T = T + torch.diag(self.off_diagonal, 1) + torch.diag(self.off_diagonal, -1)
        values, vectors = torch.linalg.eigh(T)
        return values, vectors


def lanczos(
    matvec: Operator | Callable[[Tensor], Tensor],
    start: Tensor,  # (n,)
    steps: int,
) -> Lanczos:
    """The tridiagonal form of a symmetric operator in the Krylov space of a vector: `span(v, A v, …, A^(m−1) v)`.

    Each new vector is orthogonalised against all earlier ones, twice: without it, copies of the largest eigenvalues appear.
    It stops early where the space is complete (`off_diagonal < 1e-10 · max(1, |diagonal|)`), at `n` steps at the latest.

    Args:
        matvec: `v (n,) -> A v (n,)`; `A` must be symmetric, which is not checked.
        start: `v (n,)`, not zero. Computed in its dtype or the operator's, whichever is wider, float32 or better.
        steps: products at most, >= 1.

    Returns:
        A `Lanczos`; the basis is on the operator's device.

    Raises:
        ValueError: steps below 1; a start that is not a vector, zero or not finite; a product that is not finite.

    Example:
        >>> import torch
        >>> from lowdim.linalg import lanczos
        >>> found = lanczos(lambda v: torch.tensor([1.0, 2.0, 4.0]) * v, torch.ones(3), 3)
        >>> found.eigh()[0]
        tensor([1.0000, 2.0000, 4.0000], dtype=torch.float64)

    Memory: `steps · n` numbers for the basis; `2 steps² n` operations beside the products.

    Source: Lanczos, "An iteration method for the solution of the eigenvalue problem of linear differential and integral
    operators", 1950; error bounds as in Parlett, "The Symmetric Eigenvalue Problem", 1998.
    """
    check_int("steps", steps, 1)
    if start.ndim != 1 or not len(start):
        raise ValueError(f"start must be a vector; got shape {tuple(start.shape)}")
    vector = wide(start.detach())
    if isinstance(matvec, Operator):
        vector = vector.to(device=matvec.device, dtype=torch.promote_types(vector.dtype, matvec.dtype or vector.dtype))
    length = float(torch.linalg.vector_norm(vector))
    if not 0.0 < length < float("inf"):
        raise ValueError(f"start must be finite and not zero; its norm is {length:g}")
    rows = min(steps, len(vector))
    basis = vector.new_zeros(rows, len(vector))
    basis[0] = vector / length
    diagonal: list[float] = []
    off_diagonal: list[float] = []
    while True:
        done = len(diagonal)
        known = basis[: done + 1]
        image = matvec(basis[done]).to(basis.dtype)
        diagonal.append(float(basis[done] @ image))
        for _ in range(2):
            image = image - known.T @ (known @ image)
        residual = float(torch.linalg.vector_norm(image))
        if residual != residual or residual == float("inf") or diagonal[-1] != diagonal[-1]:
            raise ValueError(f"product {done + 1} of the operator has NaN or infinite entries")
        if residual < _STOP * max(1.0, max(map(abs, diagonal))) or done + 1 == rows:
            break
        off_diagonal.append(residual)
        basis[done + 1] = image / residual
    where = {"dtype": torch.float64, "device": "cpu"}
    return Lanczos(torch.tensor(diagonal, **where), torch.tensor(off_diagonal, **where), basis[: len(diagonal)], residual)
