"""Tucker decomposition: one orthonormal factor per mode of a tensor, and a small core."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from lowdim.errors import check_int
from lowdim.linalg.leading import has_numbers, leading_vectors
from lowdim.linalg.svd import compute_dtype

__all__ = ["mode_products", "tucker", "tucker_reconstruct", "unfold"]


def unfold(
    tensor: Tensor,  # (d_0, ..., d_k)
    mode: int,
) -> Tensor:
    """`(d_mode, product of the others)`: the tensor as a matrix whose rows are the indices of one mode."""
    return tensor.movedim(mode, 0).flatten(1)


def mode_products(
    tensor: Tensor,  # (d_0, ..., d_k)
    matrices: Sequence[Tensor],  # one a mode: (d_i, r_i), or (r_i, d_i) where transposed
    *,
    transpose: bool = True,
    skip: int | None = None,
) -> Tensor:
    """`tensor ×_i M_iᵀ` for every mode (`transpose=True`: project), or `×_i M_i` (reconstruct); `skip` leaves one mode out.

    Example:
        >>> import torch
        >>> from lowdim.linalg import mode_products
        >>> mode_products(torch.ones(2, 3, 4), [torch.ones(2, 1), torch.ones(3, 1), torch.ones(4, 1)]).flatten().tolist()
        [24.0]
    """
    for mode, matrix in enumerate(matrices):
        if mode != skip:  # contracting mode i and appending the result, once per mode, keeps the order of the modes
            tensor = torch.tensordot(tensor, matrix if transpose else matrix.mT, dims=([0], [0]))  # type: ignore[arg-type]
        else:
            tensor = tensor.movedim(0, -1)
    return tensor


def tucker_reconstruct(
    core: Tensor,  # (r_0, ..., r_k)
    factors: Sequence[Tensor],  # one a mode: (d_i, r_i)
) -> Tensor:
    """`core ×_0 F_0 … ×_k F_k (d_0, ..., d_k)`, axes in the order of the factors; differentiable.

    Example:
        >>> import torch
        >>> from lowdim.linalg import tucker_reconstruct
        >>> tucker_reconstruct(torch.ones(1, 2), [torch.ones(3, 1), torch.ones(4, 2)]).shape
        torch.Size([3, 4])
    """
    return mode_products(core, factors, transpose=False)


def tucker(
    tensor: Tensor,  # (d_0, ..., d_k)
    ranks: Sequence[int],
    *,
    tolerance: float = 1e-4,
    max_sweeps: int = 100,
) -> tuple[Tensor, list[Tensor]]:
    """Orthonormal factors and core of a low multilinear rank approximation, by HOSVD and then HOOI.

    Formula: `T ≈ C ×_0 F_0 … ×_k F_k`, `C = T ×_i F_iᵀ`. HOSVD uses the leading left singular vectors of each unfolding; a
    sweep of HOOI recomputes them from the tensor projected on all other modes; it ends when the norm of the core, relative to
    the tensor's, grows by less than `tolerance`.

    Args:
        ranks: one per mode, each in [1, d_i].

    Returns:
        `core (r_0, …, r_k)` and `[F_i (d_i, r_i)]`, in float32 or better, columns with canonical signs.

    Raises:
        ValueError: the number of ranks differs from the number of modes, or a rank is out of range.

    Example:
        >>> import torch
        >>> from lowdim.linalg import mode_products, tucker
        >>> t = torch.ones(3, 4, 5)
        >>> core, factors = tucker(t, (1, 1, 1))
        >>> bool(torch.allclose(mode_products(core, factors, transpose=False), t, atol=1e-5))
        True

    Source: De Lathauwer, De Moor, Vandewalle, "On the best rank-1 and rank-(R1, …, RN) approximation of higher-order tensors",
    SIAM J. Matrix Anal. Appl. 2000.
    """
    if len(ranks) != tensor.ndim:
        raise ValueError(f"ranks must have one entry per mode ({tensor.ndim}); got {tuple(ranks)}")
    for mode, (rank, size) in enumerate(zip(ranks, tensor.shape)):
        check_int(f"ranks[{mode}]", rank, 1, size)
    work = tensor.detach().to(compute_dtype(tensor.dtype))
    # Once the other modes are truncated, an unfolding can have fewer columns than the rank: then all its vectors, padded.
    factors = [_leading(unfold(work, mode), rank) for mode, rank in enumerate(ranks)]
    core = mode_products(work, factors)
    norm, before = torch.linalg.vector_norm(work), torch.linalg.vector_norm(core)
    for _ in range(max_sweeps if has_numbers(work) else 1):
        for mode, rank in enumerate(ranks):
            factors[mode] = _leading(unfold(mode_products(work, factors, skip=mode), mode), rank)
        core = mode_products(work, factors)
        now = torch.linalg.vector_norm(core)
        if has_numbers(work) and float(now - before) <= tolerance * float(norm):
            break
        before = now
    return core, factors


def _leading(matrix: Tensor, rank: int) -> Tensor:
    if rank <= min(matrix.shape):
        return leading_vectors(matrix, rank, method="exact")[0]
    basis, _ = leading_vectors(matrix, min(matrix.shape), method="exact")
    spare = torch.eye(matrix.shape[0], dtype=matrix.dtype, device=matrix.device)
    rest = torch.linalg.qr(torch.cat([basis, spare], dim=1)).Q[:, basis.shape[1] : rank]
    return torch.cat([basis, rest], dim=1)
