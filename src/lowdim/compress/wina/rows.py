"""The sum of the rows that one token uses, on a CPU: the largest scores, and the rows of a transposed weight under them."""

from __future__ import annotations

import contextlib
import functools
import mmap

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

__all__ = ["above", "largest", "sum_of_rows", "transposed"]

_BAG = 32  # rows that are summed at a time
_STREAMS = 8  # places of the weight that are read in turn
_PAGE = 2**21  # bytes


def largest(
    scores: NDArray[np.floating],  # (in,)
    count: int,
) -> NDArray[np.int64]:
    """Where the `count` largest scores are, in order of the inputs. Of equal scores either may be taken; NaN is the largest.

    numpy partitions with vector instructions, where `topk` compares number by number.
    """
    if count:
        found = above(scores, np.partition(scores, -count)[-count], equal=True)
        if len(found) == count:
            return found
    return torch.from_numpy(scores).topk(count, sorted=False).indices.numpy()  # equal scores at the border, or NaN


def above(scores: NDArray[np.floating], bound: float | np.floating, *, equal: bool = False) -> NDArray[np.int64]:
    """Where scores are above the bound, or equal to it."""
    return ((scores >= bound) if equal else (scores > bound)).nonzero()[0]


def transposed(
    matrix: Tensor,  # (out, in)
) -> Tensor:
    """A copy of `matrixᵀ`, `(in, out)`, contiguous and, on Linux, in pages of 2 MiB.

    Rows that are far from each other are in different pages. With pages of 4 KiB, of which a row fills a few, the processor
    spends a tenth of the time on finding them.
    """
    if matrix.nbytes < _PAGE or not hasattr(mmap, "MADV_HUGEPAGE"):
        return matrix.mT.contiguous()
    place = mmap.mmap(-1, matrix.nbytes + _PAGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    with contextlib.suppress(OSError):  # a system without them
        place.madvise(mmap.MADV_HUGEPAGE)
    space = torch.frombuffer(place, dtype=torch.uint8)
    space = space[-space.data_ptr() % _PAGE :][: matrix.nbytes]  # where a page begins
    return space.view(matrix.dtype).view(matrix.shape[1], matrix.shape[0]).copy_(matrix.mT)


def sum_of_rows(
    rows: Tensor,  # (in, out)
    token: NDArray[np.floating],  # (in,)
    chosen: NDArray[np.int64],  # (k,)
) -> Tensor:
    """`Σ_j token_j rows[j]` over the chosen j, `(1, out)`, without a copy of the rows."""
    if not len(chosen):
        return rows.new_zeros(1, rows.shape[1])
    order = _apart(chosen)
    # What F.embedding_bag calls, without its checks:
    bags = torch.embedding_bag(
        rows, torch.from_numpy(order), _starts(len(order), _BAG), False, 0, False, torch.from_numpy(token[order])
    )
    return bags[0].sum(0, keepdim=True)


def _apart(chosen: NDArray[np.int64]) -> NDArray[np.int64]:
    """In an order in which neighbours are apart: of near rows, the processor also fetches those between them."""
    even = len(chosen) // _STREAMS * _STREAMS
    order = chosen[:even].reshape(_STREAMS, -1).T.reshape(-1)
    return order if even == len(chosen) else np.concatenate([order, chosen[even:]])


@functools.lru_cache(maxsize=64)
def _starts(count: int, bag: int) -> Tensor:
    """Where bags begin: one long bag is slower than many short ones."""
    return torch.arange(0, count, bag, device="cpu")
