"""Codes in as few bits as their number needs, for files."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from lowdim.linalg import pack_bits, unpack_bits

__all__ = ["code_bits", "code_dtype", "is_packed", "pack_codes", "packed_bytes", "unpack_codes"]


def code_bits(codebook_size: int) -> int:
    """`⌈log₂ k⌉`."""
    return (codebook_size - 1).bit_length()


def code_dtype(codebook_size: int) -> torch.dtype:
    """The smallest dtype of torch for codes in memory."""
    if codebook_size <= 2**8:
        return torch.uint8
    return torch.int16 if codebook_size <= 2**15 else torch.int32


def is_packed(codebook_size: int) -> bool:
    """Whether codes take fewer bits in a file than in memory."""
    return code_bits(codebook_size) < 8 * code_dtype(codebook_size).itemsize


def packed_bytes(count: int, codebook_size: int) -> int:
    """Bytes of that many packed codes."""
    return math.ceil(count * code_bits(codebook_size) / 8)


def pack_codes(codes: Tensor, codebook_size: int) -> Tensor:
    """The codes, lowest bit first, one after the other: `(⌈n bits / 8⌉,)` uint8."""
    bits = code_bits(codebook_size)
    if bits == 0:
        return torch.empty(0, dtype=torch.uint8, device=codes.device)
    places = torch.arange(bits, dtype=torch.int32, device=codes.device)
    return pack_bits((codes.reshape(-1, 1).to(torch.int32) >> places) & 1)


def unpack_codes(packed: Tensor, codebook_size: int, shape: tuple[int, int]) -> Tensor:
    """What `pack_codes` packed.

    Raises:
        ValueError: not the bytes of that many codes.
    """
    bits, dtype = code_bits(codebook_size), code_dtype(codebook_size)
    if bits == 0:
        return torch.zeros(shape, dtype=dtype, device=packed.device)
    found = unpack_bits(packed, shape[0] * shape[1] * bits).view(-1, bits).to(torch.int32)
    places = torch.arange(bits, dtype=torch.int32, device=packed.device)
    return (found << places).sum(1).to(dtype).view(shape)
