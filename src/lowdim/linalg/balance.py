"""Balanced, orthogonal factors of a product, so that a step on either factor has the same effect."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from lowdim.linalg.sharded import gather, is_sharded, match
from lowdim.linalg.svd import canonical_signs, compute_dtype, svd

__all__ = ["balance_factors", "balance_factors_"]


def balance_factors(
    A: Tensor,  # (rank, in)
    B: Tensor,  # (out, rank)
) -> tuple[Tensor, Tensor]:
    """Other factors of the same product, `B' = U √S` and `A' = √S Vᵀ` with `B A = U S Vᵀ`, in float32 or better.

    Formula: QR of `B` and of `Aᵀ`, SVD of the `(rank, rank)` core `R_B R_Aᵀ`; the `(out, in)` product is never built. Then
    `B'ᵀ B' = A' A'ᵀ = S`. A direction without a singular value (below 1e-12 of the largest one, or below the rounding of the
    dtype) gets a zero column in `B'` and keeps its old row of `A`: with `√0` in both, neither factor would ever get a
    gradient again. Factors whose product is zero are returned unchanged.

    Args:
        A, B: two matrices with one inner size; where it is above `min(in, out)` the extra directions have no singular value.

    Returns:
        `A' (rank, in)` and `B' (out, rank)`.

    Raises:
        ValueError: shapes that do not fit, NaN or infinite entries.

    Example:
        >>> import torch
        >>> from lowdim.linalg import balance_factors
        >>> A, B = balance_factors(torch.tensor([[8.0, 0.0]]), torch.tensor([[0.5], [0.0]]))
        >>> A.tolist(), B.tolist()
        ([[2.0, 0.0]], [[2.0], [0.0]])

    Source: Glentis et al., "Scalable Parameter and Memory Efficient Pretraining for LLM", arXiv 2505.22922 (the balanced
    factors; they decompose the product itself).
    """
    if A.ndim != 2 or B.ndim != 2 or A.shape[0] != B.shape[1] or A.shape[0] < 1:
        raise ValueError(f"A must be (rank, in) and B (out, rank); got {tuple(A.shape)} and {tuple(B.shape)}")
    dtype = compute_dtype(torch.promote_types(A.dtype, B.dtype))
    with torch.autocast(A.device.type, enabled=False):
        a, b = A.detach().to(dtype), B.detach().to(dtype)
        (q_b, r_b), (q_a, r_a) = torch.linalg.qr(b), torch.linalg.qr(a.mT)
        u, s, vh = svd(r_b @ r_a.mT)
        left, right = canonical_signs(q_b @ u, vh @ q_a.mT)
        assert right is not None
        beyond = a.shape[0] - len(s)
        s, left, right = F.pad(s, (0, beyond)), F.pad(left, (0, beyond)), F.pad(right, (0, 0, 0, beyond))
        root = s.sqrt()
        dead = s <= s[0] * max(1e-12, torch.finfo(dtype).eps)
        zero = s[0] == 0
        balanced_a = torch.where(dead[:, None], a, root[:, None] * right)
        balanced_b = torch.where(dead & ~zero, 0, torch.where(zero, b, left * root))
    return balanced_a, balanced_b


@torch.no_grad()
def balance_factors_(A: Any, B: Any) -> None:
    """`balance_factors` in place, in the factors' own dtypes; sharded factors stay sharded.

    The factors of one layer are gathered, and all processes use the result of one: a decomposition may differ in its last
    bits, or in its basis, between kinds of hardware.
    """
    a, b = balance_factors(gather(A), gather(B))
    for factor, value in ((A, a), (B, b)):
        value = value.to(factor.dtype).contiguous()
        if is_sharded(factor):
            mesh = factor.device_mesh
            for axis in range(mesh.ndim):  # the first process's first line, then every line from its first member
                torch.distributed.broadcast(value, group=mesh.get_group(axis), group_src=0)
        factor.copy_(match(value, factor))
