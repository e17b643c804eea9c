"""Polynomial features whose inner products are the Taylor polynomial of the exponential."""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

from lowdim.errors import check_int

__all__ = ["exp_features"]

#: Features of one row beyond which the matrix of them is refused.
_MOST = 200_000


def exp_features(
    z: Tensor,  # (n, h)
    degree: int,
) -> Tensor:
    """Features `φ` with `φ(z) · φ(w) = Σ_{k <= degree} (z · w)^k / k!`, the Taylor polynomial of `exp(z · w)`.

    Formula: `z^a / √(a!)` for every multi-index `|a| <= degree`, with `z^a = Π z_i^{a_i}` and `a! = Π a_i!`.

    Args:
        z: `(n, h)`.
        degree: of the polynomial, >= 1. Even ones keep it positive for every score.

    Returns:
        `(n, C(h + degree, degree))` in the dtype of `z`.

    Raises:
        ValueError: `z` is not 2-D, a degree below 1, more than 200,000 features.

    Example:
        >>> import torch
        >>> from lowdim.linalg import exp_features
        >>> z, w = torch.tensor([[0.5, 0.2]]), torch.tensor([[0.3, -0.4]])
        >>> round(float(exp_features(z, 4) @ exp_features(w, 4).T), 4), round(float((z @ w.T).exp()), 4)
        (1.0725, 1.0725)

    Source: Alman and Song, "Fast Attention Requires Bounded Entries", arXiv 2302.13214.
    """
    if z.ndim != 2 or not z.is_floating_point():
        raise ValueError(f"z must be (n, h) floating-point numbers; got shape {tuple(z.shape)}, {z.dtype}")
    check_int("degree", degree, 1)
    width = z.shape[1]
    count = math.comb(width + degree, degree)
    if count > _MOST:
        raise ValueError(
            f"degree {degree} over {width} columns gives {count:,} features, more than {_MOST:,}; use a lower degree, "
            "or project the columns first"
        )
    level, levels = z.new_ones(len(z), 1), [z.new_ones(len(z), 1)]
    last, run = np.zeros(1, dtype=np.int64), np.zeros(1, dtype=np.int64)  # of each multi-index: its last entry, and how often
    for _ in range(degree):
        # A multi-index has one child for each entry that is not before its last: so every one is made once.
        parents = np.repeat(np.arange(len(last)), width - last)
        entry = np.arange(len(parents)) - np.repeat(np.cumsum(width - last) - (width - last), width - last) + last[parents]
        run = np.where(entry == last[parents], run[parents] + 1, 1)
        last = entry
        scale = torch.as_tensor(1 / np.sqrt(run)).to(z)
        level = level[:, torch.as_tensor(parents)] * z[:, torch.as_tensor(entry)] * scale
        levels.append(level)
    return torch.cat(levels, dim=1)
