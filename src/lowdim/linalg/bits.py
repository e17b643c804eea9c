"""Bool tensors at eight entries to the byte."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

__all__ = ["pack_bits", "unpack_bits"]


def pack_bits(mask: Tensor) -> Tensor:
    """The entries of a bool tensor in row-major order, `(⌈numel / 8⌉,)` uint8; the first entry is the lowest bit.

    Example:
        >>> import torch, lowdim.linalg as la
        >>> la.pack_bits(torch.tensor([True, False, True])).tolist()
        [5]
    """
    bits = F.pad(mask.detach().reshape(-1).to(torch.uint8), (0, -mask.numel() % 8)).view(-1, 8)
    return (bits << torch.arange(8, dtype=torch.uint8, device=mask.device)).sum(1, dtype=torch.uint8)


def unpack_bits(packed: Tensor, count: int) -> Tensor:
    """The first `count` entries that `pack_bits` packed, `(count,)` bool.

    Raises:
        ValueError: `packed` is not the size of `count` bits.

    Example:
        >>> import torch, lowdim.linalg as la
        >>> la.unpack_bits(torch.tensor([5], dtype=torch.uint8), 3).tolist()
        [True, False, True]
    """
    if packed.dtype != torch.uint8 or packed.numel() != -(-count // 8):
        raise ValueError(f"packed must hold {-(-count // 8)} uint8 for {count} bits; got {packed.numel()} {packed.dtype}")
    shifts = torch.arange(8, dtype=torch.uint8, device=packed.device)
    return ((packed.reshape(-1, 1) >> shifts) & 1).reshape(-1)[:count].bool()
