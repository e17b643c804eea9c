"""The few nearest others of every point, exactly: found in float32, proved or searched again in float64."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

__all__ = ["nearest_others"]

_GROUP = 32  # columns that one number stands for at first
_BLOCK = 1 << 21  # scores of a block of rows: 8 MiB
_SPARE = 2  # candidates beyond those asked for, so that rounding can be told from order
_FAR = 4.0  # beyond the score of every point, all at most 1.5


def nearest_others(
    X: np.ndarray,  # (N, D) float64
    count: int,
) -> np.ndarray:
    """Rows of the `count` nearest other points of each point, `(N, count)` in no order. Nothing of size (N, N) is made.

    Trees are used in few dimensions. Else `‖x_q‖² / 2 - x_p·x_q` comes from one product in float32 for a block of p; each 32
    columns are reduced to their least score, and the columns of the best of these are looked at. Differences in float64 then
    prove that no column that was left out can be nearer, by a bound on float32's rounding; other rows are searched in float64.
    """
    from sklearn.neighbors import NearestNeighbors

    plain = torch.get_float32_matmul_precision() == "highest"  # else products may be rounded to 16 bits
    if len(X) < 4096 or X.shape[1] < 16 or count > 16 or not plain:
        return NearestNeighbors(n_neighbors=count).fit(X).kneighbors(return_distance=False)
    near, proved = _in_float32(torch.from_numpy(X), count)
    found, rest = near.numpy(), np.nonzero(~proved.numpy())[0]
    if len(rest):
        again = NearestNeighbors(n_neighbors=count + 1).fit(X).kneighbors(X[rest], return_distance=False)
        drop = again == rest[:, None]
        drop[~drop.any(axis=1), -1] = True  # more points at its own place than were asked for: it is not among them
        found[rest] = again[~drop].reshape(len(rest), count)
    return found


def _in_float32(X: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Candidates `(N, count)`, and whether they are proved to be the nearest."""
    N, D = X.shape
    centred = X - X.mean(0)
    lengths = centred.norm(dim=1)
    largest = lengths.max().clamp_min(torch.finfo(X.dtype).tiny)
    centred, lengths = centred.div_(largest), lengths / largest  # nothing overflows, and the bound below is simple
    groups = -(-N // _GROUP)
    # The last coordinate is half the squared length, so that scores come out of the product with nothing to add to them.
    right = torch.zeros(D + 1, groups * _GROUP)
    right[:D, :N], right[D, :N], right[D, N:] = centred.float().T.contiguous(), lengths.square() / 2, _FAR
    error = torch.finfo(torch.float32).eps * ((D + 6) * lengths + (D + 8) / 2)  # of a score: D + 1 products, and their sum
    keep, rows = count + _SPARE, max(16, _BLOCK // right.shape[1])
    found, proved = torch.empty(N, count, dtype=torch.int64), torch.empty(N, dtype=torch.bool)
    scores, members = torch.empty(rows, right.shape[1]), torch.arange(_GROUP) * groups
    for i in range(0, N, rows):
        block = slice(i, min(i + rows, N))
        left = right[:, block].T.neg()
        left[:, D] = 1
        S = torch.mm(left, right, out=scores[: len(left)])
        S[:, block].fill_diagonal_(_FAR)  # never its own neighbour
        first = S.view(len(S), _GROUP, groups).amin(1).topk(keep + 1, largest=False)  # group j: columns j, j + groups, ...
        columns = (first.indices[:, :keep, None] + members).flatten(1)
        second = S.gather(1, columns).topk(keep + 1, largest=False)
        near = columns.gather(1, second.indices[:, :keep]).clamp_max(N - 1)
        away = centred.index_select(0, near.flatten()).view(*near.shape, D) - centred[block, None]
        exact = (away.square().sum(2) - lengths[block, None].square()) / 2
        exact.masked_fill_(near == torch.arange(i, block.stop)[:, None], torch.inf)  # the padding stands at the last point
        last = exact.topk(count, largest=False)
        found[block] = near.gather(1, last.indices)
        left_out = torch.minimum(first.values[:, keep], second.values[:, keep])
        proved[block] = last.values[:, -1] <= left_out - error[block]
    return found, proved
