"""Exact nearest neighbours of unit vectors, in blocks."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

__all__ = ["nearest", "unit"]

_SEARCH = 1 << 22  # numbers in a block of the database, and in its scores: 16 MB in float32
_LEAST = 8  # a block has at least this many times as many rows as it must yield


def unit(x: Tensor, size: int, dtype: torch.dtype) -> Tensor:
    """Cut, widen, scale to length 1; zero stays zero."""
    return F.normalize(x[..., :size].to(dtype), dim=-1)


def nearest(q: Tensor, d: Tensor, size: int, count: int, dtype: torch.dtype) -> Tensor:
    """Indices `(Q, count)` of the exact L2 neighbours at `size`, nearest first, one database block after another."""
    query = unit(q, size, dtype)
    rows = min(len(d), max(1, _SEARCH // size, _LEAST * count))
    step = max(1, _SEARCH // rows)
    best, index = query.new_empty(len(q), 0), torch.empty(len(q), 0, dtype=torch.int64, device=q.device)
    for start in range(0, len(d), rows):
        block = unit(d[start : start + rows], size, dtype)
        if not bool(torch.isfinite(block).all()):
            raise ValueError("database has NaN or infinite entries")
        # |q - d|² without |q|², which is the same for all rows of the database.
        half = block.square().sum(-1) / 2
        found, where = [], []
        for part in query.split(step):
            score = torch.addmm(half, part, block.T, alpha=-1)
            value, position = score.topk(min(count, len(block)), dim=1, largest=False)
            found.append(value)
            where.append(position + start)
        value, position = torch.cat(found), torch.cat(where)
        value, position = torch.cat([best, value], 1), torch.cat([index, position], 1)
        best, order = value.topk(min(count, value.shape[1]), dim=1, largest=False)
        index = position.gather(1, order)
    if not bool(torch.isfinite(best).all()):
        raise ValueError("queries has NaN or infinite entries")
    # topk leaves ties in any order: by row first, then by distance, so that equal distances come in row order.
    by_row = index.argsort(dim=1)
    index, best = index.gather(1, by_row), best.gather(1, by_row)
    return index.gather(1, best.argsort(dim=1, stable=True))
