"""Products with thin factors that never build the dense matrix."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from lowdim.linalg.svd import svd

__all__ = ["add_low_rank", "add_product", "compress_factors", "low_rank_norm", "low_rank_product"]


def low_rank_product(
    x: Tensor,  # (..., in)
    A: Tensor,  # (rank, in)
    B: Tensor,  # (out, rank)
    scale: float = 1.0,
) -> Tensor:
    """`scale · B (A x)`, `(..., out)`. The scale is applied to the thin product."""
    hidden = F.linear(x, A)
    return F.linear(hidden if scale == 1.0 else hidden * scale, B)


def add_low_rank(
    y: Tensor,  # (..., out)
    x: Tensor,  # (..., in)
    A: Tensor,  # (rank, in)
    B: Tensor,  # (out, rank)
    scale: float = 1.0,
    *,
    inplace: bool = False,
) -> Tensor:
    """`y + scale · B (A x)` as one fused multiply-add onto `y`.

    Autograd keeps `x` only where `A` is trained, and `A x` only where `B` is; never the product `(..., out)`.
    """
    return add_product(y, F.linear(x, A), B, scale, inplace=inplace)


def add_product(
    y: Tensor,  # (..., out)
    hidden: Tensor,  # (..., rank)
    B: Tensor,  # (out, rank)
    scale: float = 1.0,
    *,
    inplace: bool = False,
) -> Tensor:
    """`y + scale · B hidden` as one fused multiply-add.

    `inplace=True` overwrites `y`, allowed where nothing else needs it (the output of a plain linear layer).
    """
    if y.ndim == 1:
        return y + scale * F.linear(hidden, B)
    flat, rows = y.reshape(-1, y.shape[-1]), hidden.reshape(-1, hidden.shape[-1])
    if not flat.dtype == rows.dtype == B.dtype:  # autocast: the base output may have another dtype than the thin product
        return y + (scale * F.linear(hidden, B)).to(y.dtype)
    if inplace:
        return flat.addmm_(rows, B.mT, alpha=scale).view(y.shape)
    return torch.addmm(flat, rows, B.mT, alpha=scale).view(y.shape)


def low_rank_norm(
    A: Tensor,  # (rank, in)
    B: Tensor,  # (out, rank)
) -> Tensor:
    """`‖B A‖_F` from the two Gram matrices, without the product."""
    return ((B.mT @ B) * (A @ A.mT)).sum().clamp_min(0).sqrt()


def compress_factors(
    A: Tensor,  # (k, in)
    B: Tensor,  # (out, k)
    rank: int,
) -> tuple[Tensor, Tensor, float]:
    """The best approximation of `B A` at `rank`: `A' (r, in)`, `B' (out, r)` balanced, and `‖B A − B' A'‖_F / ‖B A‖_F`.

    Two thin QR decompositions and the SVD of a `(k, k)` matrix at most; the product is never built. `r` is
    `min(rank, k, in, out)`.

    Example:
        >>> import torch
        >>> from lowdim.linalg import compress_factors
        >>> A, B, error = compress_factors(torch.eye(3, 5), torch.eye(4, 3), 2)
        >>> A.shape, round(error, 4)
        (torch.Size([2, 5]), 0.5774)
    """
    q_b, r_b = torch.linalg.qr(B)
    q_a, r_a = torch.linalg.qr(A.mT)
    u, s, vh = svd(r_b @ r_a.mT)
    keep = min(rank, len(s))
    total = s.double().square().sum()
    error = float((s[keep:].double().square().sum() / total).sqrt()) if float(total) else 0.0
    root = s[:keep].sqrt()
    return (root[:, None] * vh[:keep]) @ q_a.mT, (q_b @ u[:, :keep]) * root, error
