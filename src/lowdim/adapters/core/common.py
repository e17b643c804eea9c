"""Small helpers that several adapters need."""

from __future__ import annotations

import torch
from torch import Tensor

from lowdim.errors import check_int
from lowdim.linalg import compute_dtype, svd, truncated_svd

__all__ = ["CAP", "check_rank", "top_triplets"]


#: The remedy that an error names.
CAP = "lowdim.adapt(..., cap_rank=True) caps it there"


def check_rank(rank: int, out_features: int, in_features: int) -> int:
    """`rank`, if a layer of this shape has as many singular vectors; for methods with `bounded_rank`.

    Raises:
        ValueError: rank above min(out, in).
    """
    check_int("rank", rank, 1)
    limit = min(out_features, in_features)
    if rank > limit:
        raise ValueError(f"rank must be at most min(out_features, in_features) = {limit}; got {rank}; {CAP}")
    return rank


def top_triplets(
    weight: Tensor,  # (out, in)
    rank: int,
    generator: torch.Generator | None,
    *,
    power_iterations: int = 4,
) -> tuple[Tensor, Tensor, Tensor]:
    """The `rank` largest singular triplets `u (out, rank)`, `s`, `vh (rank, in)`: exact for small matrices, else by a sketch.

    `u diag(s) = W vhᵀ` holds to rounding even for a sketch: it gives the right vectors, and the weight is multiplied once
    more, so the residual `W − u diag(s) vh` is exact.
    """
    _, _, vh = truncated_svd(weight, rank, power_iterations=power_iterations, generator=generator)
    u, s, turn = svd(weight.detach().to(compute_dtype(weight.dtype)) @ vh.mT)
    return u, s, turn @ vh
