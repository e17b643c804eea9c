"""Block-wise 8-bit storage of tensors whose entries span many orders of magnitude (optimizer moments)."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

from lowdim.errors import check_int

__all__ = ["dequantize_blockwise", "dynamic_codebook", "quantize_blockwise"]

_DECADES = 7
_HALF = 2**15


def dynamic_codebook(signed: bool) -> Tensor:
    """The 256 ascending values of a byte: seven decades, each divided into twice as many cells as the one below.

    Formula: `0`, `1`, and for `i = 0 … 6` the midpoints of `N` equal cells of `[0.1, 1]` times `10^(i-6)`; signed: `N = 2^i`,
    each with both signs (there is +1 but no -1); unsigned: `N = 2^(i+1)`.

    Returns:
        `(256,)` float32.

    Example:
        >>> from lowdim.linalg import dynamic_codebook
        >>> code = dynamic_codebook(signed=False)
        >>> len(code), float(code[0]), float(code[-1])
        (256, 0.0, 1.0)

    Source: Dettmers, "8-Bit Approximations for Parallelism in Deep Learning", ICLR 2016; "8-bit Optimizers via Block-wise
    Quantization", ICLR 2022.
    """
    return torch.tensor(_values(signed), dtype=torch.float32)


@lru_cache(maxsize=2)
def _values(signed: bool) -> tuple[float, ...]:  # numbers, not a tensor: a forecast would leave a fake one in the cache
    values = [np.float32(0), np.float32(1)]
    for i in range(_DECADES):
        cells = 2 ** (i if signed else i + 1)
        count, step = np.arange(cells + 1), np.float64((np.float32(1) - np.float32(0.1)) / np.float32(cells))
        up, down = np.float64(np.float32(0.1)) + step * count, 1 - step * (cells - count)
        edges = np.where(count < (cells + 1) // 2, up, down).astype(np.float32)  # rounded as torch.linspace rounds
        middles = (edges[:-1] + edges[1:]) / np.float32(2) * np.float32(10.0 ** (i - _DECADES + 1))
        values += [*middles, *(-middles if signed else ())]
    return tuple(sorted(float(v) for v in values))


def quantize_blockwise(
    x: Tensor,  # (...)
    code: Tensor,  # (256,) ascending
    block: int = 256,
) -> tuple[Tensor, Tensor]:
    """The nearest code of each entry, after dividing every `block` consecutive entries by their largest magnitude.

    Formula: `q_i = argmin_j |x_i / a_b - code_j|`, `a_b = max_{i in block b} |x_i|`; a tie gives the lower code.

    Args:
        x: floating, any shape; blocks run over the flattened tensor, the last may be short.
        code: from `dynamic_codebook`, or any ascending table of at most 256 values.

    Returns:
        `q` uint8 of x's shape, and `absmax (ceil(numel / block),)` float32. An all-zero block has absmax 0.

    Raises:
        ValueError: block < 1, code not a vector of 2 to 256 values.
        TypeError: x is not floating.

    Example:
        >>> import torch, lowdim.linalg as la
        >>> code = la.dynamic_codebook(signed=True)
        >>> q, absmax = la.quantize_blockwise(torch.tensor([0.0, 2.0, -1.0]), code)
        >>> la.dequantize_blockwise(q, absmax, code).tolist()[:2], absmax.tolist()
        ([0.0, 2.0], [2.0])

    Not for weights that the forward pass needs exactly: use an affine code with a group-wise zero point.

    Source: Dettmers et al., ICLR 2022.
    """
    check_int("block", block, 1)
    if code.ndim != 1 or not 2 <= len(code) <= 256:
        raise ValueError(f"code must be a vector of 2 to 256 ascending values; got shape {tuple(code.shape)}")
    if not x.is_floating_point():
        raise TypeError(f"x must be a floating tensor; got {x.dtype}")
    nearest = _search(code.to(x.device))
    flat = x.detach().reshape(-1).to(torch.float32)
    q = torch.empty(flat.shape, dtype=torch.uint8, device=x.device)
    whole = flat.numel() // block * block
    parts = [part for part in (slice(0, whole), slice(whole, None)) if flat[part].numel()]
    scales = []
    for part in parts:  # full blocks as one matrix, then the short rest: no padded copy
        rows = flat[part].view(-1, block if part.start == 0 and whole else flat.numel() - whole)
        absmax = torch.maximum(rows.amax(1), -rows.amin(1))  # without a tensor of magnitudes
        unit = rows / torch.where(absmax > 0, absmax, 1.0)[:, None]
        q[part] = nearest(unit.view(-1))  # the conversion to bytes happens in the copy
        scales.append(absmax)
    absmax = scales[0] if len(scales) == 1 else torch.cat(scales) if scales else flat.new_zeros(0)
    return q.view(x.shape), absmax


def dequantize_blockwise(
    q: Tensor,  # (...) uint8
    absmax: Tensor,  # (blocks,)
    code: Tensor,  # (256,)
    block: int = 256,
) -> Tensor:
    """The float32 tensor that `quantize_blockwise` stored: `code[q] * absmax` of its block.

    Raises:
        ValueError: block < 1, or `absmax` does not have one entry per block.

    Source: Dettmers et al., ICLR 2022.
    """
    check_int("block", block, 1)
    total = q.numel()
    if absmax.numel() != -(-total // block):
        raise ValueError(
            f"absmax must have {-(-total // block)} entries for {total} codes in blocks of {block}; got {absmax.numel()}"
        )
    flat = torch.index_select(code.to(absmax.dtype), 0, q.reshape(-1).to(torch.int32))
    whole = total // block * block
    flat[:whole].view(-1, block).mul_(absmax[: whole // block, None])
    if whole < total:
        flat[whole:].mul_(absmax[-1])
    return flat.view(q.shape)


def _search(code: Tensor) -> Callable[[Tensor], Tensor]:
    """A function from numbers in [-1, 1] to the int32 index of the nearest code."""
    if code.device.type == "cpu" and type(code) is Tensor:
        return _cpu_search(code.detach().to(torch.float32).numpy().tobytes())
    middles = _middles(code)  # a GPU's binary search is fast; a forecast has no numbers for a table
    return lambda unit: torch.bucketize(unit, middles, out_int32=True)


def _middles(code: Tensor) -> Tensor:
    """Where the nearest code changes."""
    wide = code.to(torch.float64)
    return ((wide[:-1] + wide[1:]) / 2).to(torch.float32)


@lru_cache(maxsize=8)
def _cpu_search(code: bytes) -> Callable[[Tensor], Tensor]:
    """One lookup by the upper 16 bits of the number and one comparison; a binary search is thirty times slower.

    Correct if no two midpoints share their upper 16 bits with the numbers between them; else the binary search is used.
    """
    middles = _middles(torch.frombuffer(bytearray(code), dtype=torch.float32))
    upper = torch.arange(-_HALF, _HALF, dtype=torch.int32).bitwise_left_shift(16)
    ends = torch.stack([upper, upper | 0xFFFF]).view(torch.float32)  # of each cell of numbers that share these bits
    ends = torch.where(ends.isnan(), torch.where(upper < 0, -2.0, 2.0), ends).clamp(-2.0, 2.0)  # never looked up
    below = torch.bucketize(ends.amin(0), middles, out_int32=True)
    if int((torch.bucketize(ends.amax(0), middles, out_int32=True) - below).max()) > 1:
        return lambda unit: torch.bucketize(unit, middles, out_int32=True)
    bounds = torch.cat([middles, middles.new_full((1,), float("inf"))])

    def look_up(unit: Tensor) -> Tensor:
        cell = unit.view(torch.int32).bitwise_right_shift(16).add_(_HALF)
        base = torch.index_select(below, 0, cell)
        return base.add_(unit > torch.index_select(bounds, 0, base))

    return look_up
