"""Matrices of distances, and the check that they are what they claim."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lowdim.linalg import as_tensor

__all__ = ["check_distances"]

_BLOCK = 1 << 22  # entries looked at at once


def check_distances(
    distances: Any,  # (N, N)
    name: str = "distances",
) -> Tensor:
    """The matrix in float32 or better, on its device, without gradient.

    Args:
        name: of the argument, for the errors.

    Raises:
        ValueError: not square, an entry that is NaN, infinite or negative, a diagonal that is not zero, or `D_ij` and `D_ji`
            that differ by more than 1e-6 of the largest entry; the message names the worst entry.
    """
    D = as_tensor(distances)
    if D.ndim != 2 or D.shape[0] != D.shape[1] or not len(D):
        raise ValueError(f"{name} must be a square matrix; got shape {tuple(D.shape)}")
    if D.dtype not in (torch.float32, torch.float64):
        D = D.float() if D.is_floating_point() else D.double()
    rows = max(1, _BLOCK // len(D))
    starts = range(0, len(D), rows)
    for i in starts:
        _refuse_worst((~torch.isfinite(D[i : i + rows])).float(), D, i, f"{name} must be finite")
        _refuse_worst(-D[i : i + rows], D, i, f"{name} must not be negative")
    worst = int(D.diagonal().argmax())
    if D[worst, worst] > 0:
        raise ValueError(f"{name} must be 0 on the diagonal; entry ({worst}, {worst}) is {D[worst, worst]:.6g}")
    slack = 1e-6 * D.max()
    for i in starts:
        _refuse_worst((D[i : i + rows] - D[:, i : i + rows].T).abs() - slack, D, i, f"{name} must be symmetric")
    return D


def _refuse_worst(badness: Tensor, D: Tensor, first: int, what: str) -> None:
    """Raise for the worst entry of a block of rows that begins at row `first`, if its badness is above 0."""
    worst = int(badness.argmax())
    row, column = divmod(worst, badness.shape[1])
    if badness[row, column] > 0:
        i, j = first + row, column
        raise ValueError(f"{what}; entry ({i}, {j}) is {D[i, j]:.6g} and ({j}, {i}) is {D[j, i]:.6g}")
