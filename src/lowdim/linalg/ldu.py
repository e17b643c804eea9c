"""The pivoted LDU decomposition."""

from __future__ import annotations

import torch
from torch import Tensor

from lowdim.linalg.svd import compute_dtype

__all__ = ["ldu", "ldu_steps"]


def ldu(
    matrix: Tensor,  # (m, n)
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Lower triangle, diagonal and upper triangle of a matrix with its rows ordered by partial pivoting.

    Formula: `A[perm] = L diag(d) U` with `k = min(m, n)`; `L (m, k)` unit lower, no entry above 1 in magnitude; `U (k, n)` unit
    upper. Where a pivot is zero to rounding, `|dᵢ| ≤ eps · max(m, n) · max |d|`, `dᵢ` is 1 and row i of `U` stays undivided,
    so that the product holds and nothing is infinite.

    Args:
        matrix: real, any floating dtype; decomposed in float32 or better.

    Returns:
        `perm (m,)` int64, `L`, `d (k,)`, `U`.

    Raises:
        ValueError: NaN or infinity in the matrix.

    Example:
        >>> import torch, lowdim.linalg as la
        >>> perm, L, d, U = la.ldu(torch.tensor([[1.0, 2.0], [4.0, 4.0]]))
        >>> perm.tolist(), L.tolist(), d.tolist(), U.tolist()
        ([1, 0], [[1.0, 0.0], [0.25, 1.0]], [4.0, 1.0], [[1.0, 1.0], [0.0, 1.0]])

    It is not spectral: the first pivots depend on the order of the rows and say nothing about importance (use `svd`). Tied
    pivots may be chosen differently on another device: keep `perm`, and repeat the elimination with `ldu_steps`.
    """
    work = _finite(matrix)
    small = min(work.shape)
    factors, pivots, _ = torch.linalg.lu_factor_ex(work)  # its info only reports a zero pivot, which is handled below
    lower = factors[:, :small].tril(-1)
    lower.diagonal().fill_(1)
    upper = factors[:small].triu()
    d = upper.diagonal()
    zero = d.abs() <= torch.finfo(work.dtype).eps * max(work.shape) * d.abs().max()
    d = torch.where(zero, torch.ones_like(d), d)
    order = list(range(work.shape[0]))
    for i, other in enumerate(pivots.tolist()):  # LAPACK's record: row i was exchanged with row `other`, counted from 1
        order[i], order[other - 1] = order[other - 1], order[i]
    return torch.tensor(order, device=work.device), lower, d, upper / d[:, None]


def ldu_steps(
    matrix: Tensor,  # (m, n)
    rows: Tensor,  # (r,): the pivots' rows in order
) -> tuple[Tensor, Tensor, Tensor]:
    """The first `r` steps of `ldu` with known pivots: the same numbers on every device, at the cost of `r` steps.

    Formula: with `A₁ = A[rows]`, whose first r columns are `L₁ U₁` unpivoted: `diag(d) U = L₁⁻¹ A₁`, `L = A[:, :r] U₁⁻¹`.

    Args:
        matrix: real, any floating dtype; worked on in float32 or better.
        rows: the first `r` entries of `perm` that `ldu` gave. Pivots that are zero to rounding cannot be repeated.

    Returns:
        `L (m, r)` in the matrix's own order of rows, `d (r,)`, `U (r, n)`: `L diag(d) U` is the part that r steps eliminate.

    Raises:
        ValueError: NaN or infinity in the matrix.

    Example:
        >>> import torch, lowdim.linalg as la
        >>> L, d, U = la.ldu_steps(torch.tensor([[1.0, 2.0], [4.0, 4.0]]), torch.tensor([1]))
        >>> L.tolist(), d.tolist(), U.tolist()
        ([[0.25], [1.0]], [4.0], [[1.0, 1.0]])
    """
    work = _finite(matrix)
    taken = work[rows]
    square = _eliminate(taken[:, : len(rows)])
    upper = torch.linalg.solve_triangular(square, taken, upper=False, unitriangular=True)
    lower = torch.linalg.solve_triangular(square, work[:, : len(rows)], upper=True, left=False)
    d = upper.diagonal()
    return lower, d, upper / d[:, None]


def _eliminate(a: Tensor) -> Tensor:
    """`L` below and `U` on and above the diagonal of a square matrix `a = L U`, without pivoting; by halves."""
    half = len(a) // 2
    if not half:
        return a
    first = _eliminate(a[:half, :half])
    right = torch.linalg.solve_triangular(first, a[:half, half:], upper=False, unitriangular=True)
    below = torch.linalg.solve_triangular(first, a[half:, :half], upper=True, left=False)
    rest = _eliminate(a[half:, half:] - below @ right)
    return torch.cat([torch.cat([first, right], 1), torch.cat([below, rest], 1)])


def _finite(matrix: Tensor) -> Tensor:
    low, high = torch.aminmax(matrix.detach())  # both are NaN if any entry is; one pass, where isfinite needs several
    if not bool(torch.isfinite(low) & torch.isfinite(high)):
        raise ValueError("matrix has NaN or infinite entries; a decomposition of it would be meaningless")
    return matrix.detach().to(compute_dtype(matrix.dtype))
