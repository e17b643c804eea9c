"""Many small symmetric matrices by their blocks: products that leave out the lower half, inverses by products."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["cholesky", "inverse", "symmetric", "through_products", "upper", "upper_products"]

_SIDE = 8  # columns of a symmetric matrix that are kept from the same row on
_LEAF = 16  # side up to which Cholesky's factors are quicker than products of blocks


def upper_products(features: Tensor) -> Tensor:
    """`z_a z_b` of each row, `b` from the start of a's group of columns on: all that a symmetric matrix is made of."""
    parts = [features[:, a : a + _SIDE, None] * features[:, None, a:] for a in range(0, features.shape[1], _SIDE)]
    return torch.cat([part.flatten(1) for part in parts], 1)


def symmetric(given: Tensor, d: int) -> Tensor:
    """Symmetric matrices `(n, d, d)` of their upper blocks."""
    whole, start = given.new_empty(len(given), d, d), 0
    for a in range(0, d, _SIDE):
        side, rest = min(_SIDE, d - a), d - a
        block = given[:, start : start + side * rest].unflatten(1, (side, rest))
        whole[:, a : a + side, a:] = block
        whole[:, a + side :, a : a + side] = block[:, :, side:].mT
        start += side * rest
    return whole


def upper(whole: Tensor) -> Tensor:
    """Upper blocks of symmetric matrices B, those off the diagonal doubled: with `upper_products` they make `zᵀ B z`."""
    parts = []
    for a in range(0, whole.shape[1], _SIDE):
        parts.append(whole[:, a : a + _SIDE, a:].clone())
        parts[-1][:, :, _SIDE:].mul_(2)
    return torch.cat([part.flatten(1) for part in parts], 1)


def through_products(grad: Tensor, features: Tensor) -> Tensor:
    """The gradient by the features of that by `upper_products`."""
    out, start, d = torch.zeros_like(features), 0, features.shape[1]
    for a in range(0, d, _SIDE):
        side, rest = min(_SIDE, d - a), d - a
        block = grad[:, start : start + side * rest].unflatten(1, (side, rest))
        out[:, a : a + side] += (block * features[:, None, a:]).sum(2)
        out[:, a:] += (block * features[:, a : a + side, None]).sum(1)
        start += side * rest
    return out


def inverse(matrices: Tensor) -> tuple[Tensor, Tensor]:
    """Inverses of symmetric positive definite matrices `(n, m, m)` and their logdet; NaN of others.

    Small ones by Cholesky's factors; others by their blocks, with products only.
    """
    m = matrices.shape[-1]
    if m <= _LEAF:
        lower, logdet = cholesky(matrices)
        identity = torch.eye(m, dtype=matrices.dtype, device=matrices.device).expand_as(matrices)
        root = torch.linalg.solve_triangular(lower, identity, upper=False)
        return root.mT @ root, logdet
    k = m // 2
    first, one = inverse(matrices[:, :k, :k])
    across = first @ matrices[:, :k, k:]
    last, other = inverse(torch.baddbmm(matrices[:, k:, k:], matrices[:, k:, :k], across, alpha=-1))
    whole, corner = torch.empty_like(matrices), across @ last
    whole[:, :k, :k] = torch.baddbmm(first, corner, across.mT)
    whole[:, :k, k:], whole[:, k:, :k], whole[:, k:, k:] = -corner, -corner.mT, last
    return whole, one + other


def cholesky(matrices: Tensor) -> tuple[Tensor, Tensor]:
    """Cholesky's factor and the logdet of symmetric positive definite matrices; NaN of others."""
    lower, failed = torch.linalg.cholesky_ex(matrices)
    return lower, torch.where(failed == 0, 2 * lower.diagonal(dim1=-2, dim2=-1).log().sum(-1), torch.nan)
