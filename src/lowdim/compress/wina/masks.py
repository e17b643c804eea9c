"""Which inputs of a linear layer are used: the largest scores of each token, or those above a threshold."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lowdim.errors import check_float
from lowdim.linalg import wide

__all__ = ["check_sparsity", "kept", "scores_of", "wina_mask", "wina_threshold"]


def kept(in_features: int, sparsity: float) -> int:
    """How many inputs of a token are used: `int(in (1 - sparsity))`."""
    return int(in_features * (1 - sparsity))


def check_sparsity(argument: str, value: Any) -> None:
    """Raise ValueError unless it is a number in [0, 1)."""
    check_float(argument, value, 0.0, 1.0, high_open=True)


def scores_of(x: Tensor, column_norms: Tensor | None) -> Tensor:
    """`|x_j| c_j`, in float32 or better; `|x_j|` without norms."""
    size = wide(x.detach()).abs()
    return size if column_norms is None else size * column_norms.to(size.dtype)


def wina_mask(
    x: Tensor,  # (..., in)
    column_norms: Tensor | None,  # (in,)
    sparsity: float,
) -> Tensor:
    """Which inputs are used: for each token the `int(in (1 - sparsity))` with the largest scores.

    Formula: `s_j = |x_j| c_j`. Of equal scores either may be taken.

    Args:
        column_norms: `c_j = ‖W[:, j]‖₂`; None scores by `|x_j|` alone, as TEAL does.
        sparsity: share of the inputs that are left out, in [0, 1).

    Returns:
        Boolean, `(..., in)`.

    Raises:
        ValueError: a sparsity outside of [0, 1), or norms of another length.

    Example:
        >>> import torch
        >>> from lowdim.compress import wina_mask
        >>> wina_mask(torch.tensor([3.0, -2.0, 1.0, 0.5]), torch.tensor([1.0, 1.0, 4.0, 1.0]), 0.5)
        tensor([ True, False,  True, False])
    """
    check_sparsity("sparsity", sparsity)
    if column_norms is not None and column_norms.shape != x.shape[-1:]:
        raise ValueError(
            f"column_norms must have one entry for each of the {x.shape[-1]} inputs; got shape {tuple(column_norms.shape)}"
        )
    count = kept(x.shape[-1], sparsity)
    if count == x.shape[-1]:
        return torch.ones_like(x, dtype=torch.bool)
    chosen = scores_of(x, column_norms).topk(count, dim=-1, sorted=False).indices
    return torch.zeros_like(x, dtype=torch.bool).scatter_(-1, chosen, 1)  # True cannot be traced


def wina_threshold(scores: Tensor, sparsity: float) -> float:
    """The threshold below which a share `sparsity` of the scores lies.

    Formula: with the distinct values `v_0 < v_1 < ...` of the absolute scores, their counts summed up to `C_i`, and
    `q = sparsity C_last`, at the first `i` with `C_i >= q`: `v_{i-1} + (q - C_{i-1}) / (C_i - C_{i-1}) (v_i - v_{i-1})`, `v_0`
    for `i = 0`, and 0 for a sparsity of 0.

    Args:
        scores: of any shape.
        sparsity: in [0, 1).

    Raises:
        ValueError: no scores, one that is not finite, or a sparsity outside of [0, 1).

    Example:
        >>> import torch
        >>> from lowdim.compress import wina_threshold
        >>> wina_threshold(torch.tensor([1.0, -2.0, 3.0, 4.0]), 0.5)
        2.0
    """
    check_sparsity("sparsity", sparsity)
    flat = wide(scores.detach()).abs().reshape(-1)
    if not flat.numel() or not bool(torch.isfinite(flat).all()):
        raise ValueError(
            f"scores must be finite numbers; got {flat.numel()} of them, {int((~flat.isfinite()).sum())} not finite"
        )
    if sparsity == 0:
        return 0.0
    values, counts = flat.unique(sorted=True, return_counts=True)
    total = counts.cumsum(0).double()
    wanted = sparsity * float(total[-1])
    at = int(torch.searchsorted(total, torch.tensor(wanted, dtype=total.dtype, device=total.device)))
    if at == 0:
        return float(values[0])
    if at >= len(values):
        return float(values[-1])
    below, above = float(total[at - 1]), float(total[at])
    return float(values[at - 1]) + (wanted - below) / (above - below) * (float(values[at]) - float(values[at - 1]))
