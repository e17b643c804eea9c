"""Singular value decompositions with reproducible signs, and randomised range finders."""

from __future__ import annotations

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from lowdim.linalg.remember import remembered

__all__ = ["balanced_factors", "canonical_signs", "captured_energy", "compute_dtype", "range_finder", "svd", "truncated_svd"]


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype in which a subspace of a `dtype` matrix is computed: float32 or better."""
    if dtype in (torch.float64, torch.complex128, torch.complex64):
        return dtype
    return torch.float32


def canonical_signs(
    u: Tensor,  # (..., m, r)
    vh: Tensor | None = None,  # (..., r, n)
) -> tuple[Tensor, Tensor | None]:
    """Flip singular vectors so that the entry of largest magnitude of each column of `u` is positive.

    `vh` is flipped too, so the product `u diag(s) vh` does not change. Complex columns are rotated so that the
    entry is real and positive. Ties go to the first entry.
    """
    index = u.abs().argmax(dim=-2, keepdim=True)
    pivot = torch.gather(u, -2, index)
    phase = torch.sgn(pivot)
    phase = torch.where(phase == 0, torch.ones_like(phase), phase)
    u = u * (phase.conj() if phase.is_complex() else phase)
    if vh is None:
        return u, None
    return u, phase.transpose(-2, -1) * vh


@remembered
def svd(
    matrix: Tensor,  # (..., m, n)
) -> tuple[Tensor, Tensor, Tensor]:
    """Thin SVD in float32 or better with canonical signs.

    Args:
        matrix: `(..., m, n)`, real or complex, any floating dtype.

    Returns:
        `u (..., m, k)`, `s (..., k)` descending, `vh (..., k, n)` with `k = min(m, n)`, in float32 or better.

    Raises:
        ValueError: if an entry is NaN or infinite.

    Example:
        >>> import torch, lowdim.linalg as la
        >>> u, s, vh = la.svd(torch.diag(torch.tensor([1.0, 3.0])))
        >>> s.tolist()
        [3.0, 1.0]
    """
    work = matrix.detach().to(compute_dtype(matrix.dtype))
    _finite(work)
    u, s, vh = torch.linalg.svd(work, full_matrices=False)
    u, vh = canonical_signs(u, vh)
    assert vh is not None
    return u, s, vh


def range_finder(
    matrix: Tensor,  # (m, n)
    rank: int,
    *,
    oversample: int = 8,
    power_iterations: int = 1,
    start: Tensor | None = None,  # (n, k): a basis from an earlier call
    generator: torch.Generator | None = None,
) -> Tensor:
    """Orthonormal `Q (m, k)` with `Q Qᵀ A ≈ A`, by a randomised sketch with power iterations.

    Formula: `Y = (A Aᵀ)^p A Ω`, `Q = qr(Y)`, re-orthonormalised between products. `start` replaces the
    first columns of the Gaussian `Ω` (warm start); the rest stay random, so a direction that the old basis
    lacks can still enter.

    Args:
        rank: number of directions wanted; `k = min(rank + oversample, m, n)` are returned.

    Source: Halko, Martinsson, Tropp, "Finding structure with randomness", SIAM Review 2011.
    """
    m, n = matrix.shape
    k = min(rank + oversample, m, n)
    work = matrix.detach().to(compute_dtype(matrix.dtype))
    given = 0 if start is None else min(start.shape[1], k)
    fresh = torch.randn(n, k - given, dtype=work.dtype, device=_draw_device(generator, work), generator=generator)
    omega = fresh.to(work.device)
    if start is not None:
        omega = torch.cat([start[:, :given].to(work), omega / n**0.5], dim=1)
    q = torch.linalg.qr(work @ omega).Q
    for _ in range(power_iterations):
        q = torch.linalg.qr(work.mT @ q).Q
        q = torch.linalg.qr(work @ q).Q
    return q


def truncated_svd(
    matrix: Tensor,  # (m, n)
    rank: int,
    *,
    method: str = "auto",
    oversample: int = 8,
    power_iterations: int = 2,
    start: Tensor | None = None,
    generator: torch.Generator | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """The `rank` largest singular triplets.

    Args:
        method: `"exact"`; `"randomized"`; `"auto"` uses the exact method when `min(m, n) <= 512` or when `rank` is more than
            a quarter of it (where the sketch saves nothing), else the randomised one.
        start: `(n, k)` right basis of an earlier call (randomised only).

    Returns:
        `u (m, rank)`, `s (rank,)`, `vh (rank, n)` with canonical signs. `captured_energy(matrix, s)` states the error.

    Raises:
        ValueError: rank outside [1, min(m, n)], unknown method, NaN or infinity in the matrix.

    Example:
        >>> import torch, lowdim.linalg as la
        >>> u, s, vh = la.truncated_svd(torch.eye(4)[:, :3], 2)
        >>> u.shape, vh.shape
        (torch.Size([4, 2]), torch.Size([2, 3]))

    Source: Halko, Martinsson, Tropp, SIAM Review 2011.
    """
    from lowdim.errors import check_choice, check_int

    small = min(matrix.shape)
    check_int("rank", rank, 1, small)
    check_choice("method", method, ("auto", "exact", "randomized"))
    if method == "auto":
        method = "exact" if small <= 512 or 4 * rank > small else "randomized"
    if method == "exact":
        u, s, vh = svd(matrix)
        return u[:, :rank], s[:rank], vh[:rank]
    _finite(matrix)
    q = range_finder(matrix, rank, oversample=oversample, power_iterations=power_iterations, start=start, generator=generator)
    ub, s, vh = torch.linalg.svd(q.mT @ matrix.detach().to(q.dtype), full_matrices=False)
    u, vh = canonical_signs(q @ ub[:, :rank], vh[:rank])
    assert vh is not None
    return u, s[:rank], vh


def balanced_factors(
    weight: Tensor,  # (out, in)
    rank: int,
) -> tuple[Tensor, Tensor]:
    """The best approximation of a weight at this rank as two factors of equal spectra.

    Formula: `W ≈ B A` with `A = √S_r V_rᵀ`, `B = U_r √S_r`, so that `A Aᵀ = Bᵀ B = S_r`.

    Returns:
        `A (rank, in)`, `B (out, rank)`, in float32 or better.

    Raises:
        ValueError: rank outside [1, min(out, in)], NaN or infinity in the weight.

    Example:
        >>> import torch
        >>> from lowdim.linalg import balanced_factors
        >>> A, B = balanced_factors(torch.diag(torch.tensor([9.0, 4.0, 1.0])), 2)
        >>> (B @ A).diag().round().tolist(), (A @ A.T).diag().round().tolist()
        ([9.0, 4.0, 0.0], [9.0, 4.0])

    Source: Eckart, Young, "The approximation of one matrix by another of lower rank", Psychometrika 1936.
    """
    u, s, vh = truncated_svd(weight, rank, method="exact")
    root = s.sqrt()
    return root[:, None] * vh, u * root


def captured_energy(matrix: Tensor, singular_values: Tensor) -> float:
    """Share of `‖A‖_F²` that these singular values hold, in [0, 1] (1 for a zero matrix)."""
    total = float(matrix.detach().to(compute_dtype(matrix.dtype)).square().sum())
    return 1.0 if total == 0 else float(singular_values.square().sum()) / total


def _finite(matrix: Tensor) -> None:
    if matrix.is_meta or isinstance(matrix, FakeTensor):
        return  # a forecast: there are shapes, but no numbers to check
    if not bool(torch.isfinite(matrix).all()):
        raise ValueError("matrix has NaN or infinite entries; a decomposition of it would be meaningless")


def _draw_device(generator: torch.Generator | None, like: Tensor) -> torch.device:
    return like.device if generator is None else generator.device
