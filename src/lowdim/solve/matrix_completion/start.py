"""The start of matrix completion: the leading singular vectors of the observed entries, or a given factor."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from lowdim.errors import check_float
from lowdim.linalg import canonical_signs, stream, truncated_svd
from lowdim.solve.core.reading import as_given, as_tensor
from lowdim.solve.matrix_completion.grouped import Entries, read_entries

__all__ = ["spectral_init", "starting_factor"]

_DENSE = 1 << 22  # numbers up to which the start's SVD may be dense
_SMALL = 512
_POWER = 6  # power iterations of the sparse start


def spectral_init(
    rows: Any,  # (nnz,) integers
    cols: Any,  # (nnz,) integers
    values: Any,  # (nnz,) floats
    shape: tuple[int, int],
    rank: int,
    *,
    clip: float = 2.0,
    incoherence: float | None = None,
    p: float | None = None,
    seed: int = 0,
) -> Any:
    """The spectral start: top left singular vectors of the observed entries filled with zeros.

    Formula: `U0` = top k left singular vectors of `P_Ω(M) / p`; with `incoherence = mu`, rows of `U0` with norm above
    `clip · mu √(k / m)` are set to 0 and the columns are orthonormalised again.

    Args:
        rows, cols, values, shape, rank: as in complete_matrix.
        clip, incoherence: maximum norm of a row; None removes no row.
        p: sampling rate, in (0, 1]; None means `nnz / (m n)`. It scales the singular values only: the result does not change.
        seed: for the randomised SVD of large matrices (never dense).

    Returns:
        `(m, k)` float64 with orthonormal columns, numpy or torch as `values`.

    Raises:
        ValueError: as complete_matrix; fewer than k rows are left.

    Example:
        >>> import numpy as np
        >>> from lowdim.solve import spectral_init
        >>> spectral_init([0, 2], [0, 0], [3.0, 4.0], (3, 2), 1).round(6).ravel().tolist()[::2]
        [0.6, 0.8]

    Use it as a start only: with few entries it is far from the singular vectors of M.

    Source: Jain, Netrapalli, Sanghavi, STOC 2013; Gu et al., ICLR 2024, arXiv 2302.11068.
    """
    entries = read_entries(rows, cols, values, shape, rank)
    if p is not None:
        check_float("p", p, 0.0, 1.0, low_open=True)
    return as_given(_spectral(entries, rank, clip, incoherence, seed), values)


def starting_factor(entries: Entries, rank: int, incoherence: float | None, init: Any, seed: int) -> Tensor:
    """The left factor `(m, k)` from which the rounds start: `init`, or the spectral start; orthonormal."""
    if init is None:
        return _spectral(entries, rank, 2.0, incoherence, seed)
    start = as_tensor(init).to(device="cpu", dtype=torch.float64)
    if start.shape != (entries.shape[0], rank):
        raise ValueError(f"init must have shape ({entries.shape[0]}, {rank}); got {tuple(start.shape)}")
    if not bool(torch.isfinite(start).all()):
        raise ValueError("init has NaN or infinite entries")
    return torch.linalg.qr(start).Q


def _spectral(entries: Entries, rank: int, clip: float, incoherence: float | None, seed: int) -> Tensor:
    check_float("clip", clip, 0.0, low_open=True)
    m, n = entries.shape
    if min(m, n) <= _SMALL and m * n <= _DENSE:
        dense = torch.zeros(m, n, dtype=torch.float64)
        dense[entries.rows, entries.cols] = entries.values
        u = truncated_svd(dense, rank, method="exact")[0]
    else:
        u = _sparse_vectors(entries, rank, stream(seed, "start"))
    if incoherence is None:
        return u
    check_float("incoherence", incoherence, 0.0, low_open=True)
    limit = clip * incoherence * math.sqrt(rank / m)
    keep = u.norm(dim=1) <= limit
    if int(keep.sum()) < rank:
        raise ValueError(
            f"incoherence={incoherence!r} removes all but {int(keep.sum())} of {m} rows of the start; use a larger value"
        )
    return torch.linalg.qr(torch.where(keep[:, None], u, 0.0)).Q


def _sparse_vectors(entries: Entries, rank: int, generator: torch.Generator) -> Tensor:
    """Top left singular vectors by subspace iteration with sparse products only."""
    matrix, turned = entries.sparse(), entries.T.sparse()
    width = min(rank + 8, *entries.shape)
    q = torch.randn(entries.shape[1], width, dtype=torch.float64, generator=generator)
    q = torch.linalg.qr(matrix @ q).Q
    for _ in range(_POWER):
        q = torch.linalg.qr(turned @ q).Q
        q = torch.linalg.qr(matrix @ q).Q
    rotation = torch.linalg.svd(turned @ q, full_matrices=False).Vh.T  # of (Qᵀ A)ᵀ = W diag(s) Zᵀ
    return canonical_signs(q @ rotation[:, :rank])[0]
