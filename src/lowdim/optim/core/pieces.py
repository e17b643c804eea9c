"""Large tensors are worked through piece by piece, so that temporaries stay small."""

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor

from lowdim.linalg import slices

__all__ = ["pieces"]

#: Entries of a piece: on a CPU what a core's cache holds; elsewhere few launches.
_PIECE = {True: 2**18, False: 2**24}


def pieces(low: Tensor, block: int) -> Iterator[slice]:
    """Slices of the flattened tensor, of whole blocks except the last."""
    return slices(low.numel(), _PIECE[low.device.type == "cpu"] // block * block, low)
