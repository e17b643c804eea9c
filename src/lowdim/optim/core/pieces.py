"""Large tensors are worked through piece by piece, so that temporaries stay small."""

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor

from lowdim.linalg import has_numbers

__all__ = ["pieces"]

#: Entries of a piece: on a CPU what a core's cache holds; elsewhere few launches.
_PIECE = {True: 2**18, False: 2**24}


def pieces(low: Tensor, block: int) -> Iterator[slice]:
    """Slices of the flattened tensor, of whole blocks except the last; in a forecast the first stands for all."""
    piece = _PIECE[low.device.type == "cpu"] // block * block
    total = low.numel() if has_numbers(low) else min(piece, low.numel())
    for start in range(0, total, piece):
        yield slice(start, min(start + piece, total))
