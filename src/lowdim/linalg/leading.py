"""Leading singular vectors of one side only: enough for subspace methods, and cheaper than a full decomposition."""

from __future__ import annotations

import torch
from torch import Tensor

from lowdim.errors import check_choice, check_int
from lowdim.linalg.svd import canonical_signs, compute_dtype, range_finder

__all__ = ["has_numbers", "leading_vectors"]

#: Up to this smaller side the exact decomposition is cheap (the rule of `truncated_svd`), and up to the next one it is still
#: cheaper than a sketch of more than a quarter of the side.
_SMALL, _MEDIUM = 512, 2048
#: Above this rank the sketch's orthonormal basis is returned: turning it into singular vectors needs a decomposition of a
#: square matrix of the rank's size, which costs ten times the sketch on a GPU.
_UNTURNED = 512


def has_numbers(tensor: Tensor) -> bool:
    """Whether entries can be read: not on the meta device, not a fake tensor of a forecast."""
    from torch._subclasses.fake_tensor import FakeTensor

    return not (tensor.is_meta or isinstance(tensor, FakeTensor))


def leading_vectors(
    matrix: Tensor,  # (m, n)
    rank: int,
    *,
    method: str = "auto",
    start: Tensor | None = None,  # (m, k): a basis from an earlier call
    oversample: int = 8,
    power_iterations: int | None = None,
    generator: torch.Generator | None = None,
) -> tuple[Tensor, Tensor]:
    """The `rank` leading left singular vectors and the share of the energy that they hold.

    Formula: `A = U S Vᵀ`, `basis = U[:, :rank]`, `energy = ‖basisᵀ A‖²_F / ‖A‖²_F`. The right vectors of `A` are the left ones
    of `A.mT`.

    Exact: a triangular factor of the long side first, so that no matrix of A's size besides A is built. Randomised: a sketch
    `A Ω` with power iterations. With `start = Q`, `Ω = Aᵀ (Q + N)`, N Gaussian with columns of norm about one: one pass
    finds the old basis again, and a direction that it lacks can still enter through every column.

    A sketch of more than 512 directions gives an orthonormal basis of the leading subspace, close to the singular vectors
    but not equal: rotating it onto them would cost ten times as much.

    Args:
        method: `"exact"`, `"randomized"`, or `"auto"`: exact when `min(m, n) <= 512`, or up to 2048 where `rank` is above a
            quarter of it.
        start: warm start, in the space of the result (randomised only).
        power_iterations: default 2, or 1 with a warm start (which is itself half of one).

    Returns:
        `basis (m, rank)` orthonormal, in float32 or better, each column's entry of largest magnitude positive; `energy`, 0-dim,
        in [0, 1] (1 for a zero matrix). The input is not checked for NaN or infinity.

    Raises:
        ValueError: rank outside [1, min(m, n)], unknown method, not a matrix.

    Example:
        >>> import torch
        >>> from lowdim.linalg import leading_vectors
        >>> basis, energy = leading_vectors(torch.diag(torch.tensor([1.0, -3.0])), 1)
        >>> basis.flatten().tolist(), round(float(energy), 3)
        ([0.0, 1.0], 0.9)

    Where both sides or the singular values are needed, use `truncated_svd`.

    Source: Halko, Martinsson, Tropp, "Finding structure with randomness", SIAM Review 2011.
    """
    if matrix.ndim != 2:
        raise ValueError(f"matrix must have two dimensions; got shape {tuple(matrix.shape)}")
    small = min(matrix.shape)
    check_int("rank", rank, 1, small)
    check_choice("method", method, ("auto", "exact", "randomized"))
    work = matrix.detach().to(compute_dtype(matrix.dtype))
    if method == "auto":
        method = "exact" if small <= _SMALL or (4 * rank > small and small <= _MEDIUM) else "randomized"
    if method == "exact":
        vectors, squares = _left_vectors(work)
        total = squares.sum()
    elif rank > _UNTURNED:
        vectors = _span(work, rank, start, power_iterations, generator)
        squares = torch.linalg.vector_norm(vectors.mT @ work, dim=1).square()
        total = torch.linalg.vector_norm(work).square()
    else:
        q = _sketch(work, rank, start, oversample, power_iterations, generator)
        inner, squares = _left_vectors(q.mT @ work)
        vectors = q @ inner[:, :rank]
        total = torch.linalg.vector_norm(work).square()
    basis, _ = canonical_signs(vectors[:, :rank])
    held = squares[:rank].sum()
    return basis.contiguous(), torch.where(total > 0, held / total, 1.0).clamp(max=1.0)


def _left_vectors(work: Tensor) -> tuple[Tensor, Tensor]:
    """All left singular vectors and squared singular values; the long right side is reduced to a triangle first."""
    m, n = work.shape
    if n > m:
        work = torch.linalg.qr(work.mT, mode="r").R.mT
    u, s, _ = torch.linalg.svd(work, full_matrices=False)
    return u, s.square()


def _span(work: Tensor, rank: int, start: Tensor | None, power: int | None, generator: torch.Generator | None) -> Tensor:
    """An orthonormal basis of about the leading subspace: products with `A Aᵀ`, one QR after each, and none between the two."""
    m = work.shape[0]
    device = work.device if generator is None else generator.device
    mixed = torch.randn(m, rank, dtype=work.dtype, device=device, generator=generator).to(work.device).div_(m**0.5)
    if start is not None:
        kept = min(start.shape[1], rank)
        mixed[:, :kept] += start[:, :kept].to(work.dtype)
    times = 1 + (power if power is not None else 2 if start is None else 1)
    for _ in range(times):
        mixed = torch.linalg.qr(work @ (work.mT @ mixed)).Q
    return mixed


def _sketch(
    work: Tensor, rank: int, start: Tensor | None, oversample: int, power: int | None, generator: torch.Generator | None
) -> Tensor:
    if start is None:
        return range_finder(
            work, rank, oversample=oversample, power_iterations=2 if power is None else power, generator=generator
        )
    m = work.shape[0]
    k = min(rank + oversample, *work.shape)
    device = work.device if generator is None else generator.device
    mixed = torch.randn(m, k, dtype=work.dtype, device=device, generator=generator).to(work.device).div_(m**0.5)
    kept = min(start.shape[1], k)
    mixed[:, :kept] += start[:, :kept].to(work.dtype)
    return range_finder(
        work, rank, oversample=oversample, power_iterations=1 if power is None else power, start=work.mT @ mixed
    )
