"""Group-wise affine storage of weights in few bits: a scale and a zero point per group of consecutive entries."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from lowdim.errors import check_int
from lowdim.linalg.leading import has_numbers
from lowdim.linalg.pieces import slices
from lowdim.linalg.svd import compute_dtype

__all__ = ["dequantize_affine", "dequantize_nibbles", "pack_nibbles", "quantize_affine", "store_affine", "unpack_nibbles"]

#: Entries processed at a time: temporaries fit a processor's cache, and are small compared with a large weight on a GPU.
_CHUNK = {"cpu": 2**17}
_OTHER_CHUNK = 2**24
_SMALLEST_RANGE = 1e-5


def quantize_affine(
    w: Tensor,  # (...)
    *,
    group_size: int = 256,
    bits: int = 8,
    uniform: Tensor | None = None,  # (...) as w
) -> tuple[Tensor, Tensor, Tensor]:
    """Codes of `bits` bits, with a scale and a zero point for each `group_size` consecutive entries.

    Formula: per group `lo = min(min(w), 0)`, `hi = max(max(w), 0)`, `scale = max(hi − lo, 1e-5) / (2^bits − 1)`,
    `zero = clip(−round(lo / scale))`, `code = clip(round(w / scale) + zero)`, both clipped to `[0, 2^bits − 1]`; round is half
    to even, or with `uniform` up where `uniform < fraction(w / scale)` and else down.

    Args:
        w: floating, any shape; groups run over the flattened tensor.
        bits: 1 to 8.
        uniform: numbers in [0, 1), for stochastic rounding: the expected stored value is then `w`.

    Returns:
        `codes` uint8 of w's shape, `scales (numel / group_size, 1)` and `zeros` of the same shape, in w's dtype. Half-precision
        scales are rounded up, so that no entry is out of range.

    Raises:
        ValueError: group_size does not divide the number of entries, bits outside 1 to 8, NaN or infinity in w, `uniform` of
            another shape.
        TypeError: w is not floating.

    Example:
        >>> import torch, lowdim.linalg as la
        >>> codes, scales, zeros = la.quantize_affine(torch.tensor([-1.0, 0.0, 0.5, 2.0]), group_size=4, bits=2)
        >>> codes.tolist(), la.dequantize_affine(codes, scales, zeros, group_size=4).tolist()
        ([0, 1, 1, 3], [-1.0, 0.0, 0.0, 2.0])

    Not for tensors whose entries span many orders of magnitude, such as optimizer moments: use `quantize_blockwise`.

    Source: Zhang et al., "Q-GaLore", arXiv 2407.08296; the range always holds 0 (the authors' code destroys the others).
    """
    if not w.is_floating_point():
        raise TypeError(f"w must be a floating tensor; got {w.dtype}")
    check_int("bits", bits, 1, 8)
    groups = _groups("w", w.numel(), group_size)
    if uniform is not None and uniform.shape != w.shape:
        raise ValueError(f"uniform must have the shape of w, {tuple(w.shape)}; got {tuple(uniform.shape)}")
    codes = torch.empty(w.shape, dtype=torch.uint8, device=w.device)
    scales, zeros = (torch.empty(groups, 1, dtype=w.dtype, device=w.device) for _ in range(2))
    store_affine(w, codes, scales, zeros, group_size=group_size, bits=bits, uniform=uniform)
    if has_numbers(w) and not bool(torch.isfinite(scales).all()):
        raise ValueError("w has NaN or infinite entries, which cannot be quantized")
    return codes, scales, zeros


@torch.no_grad()
def store_affine(
    w: Tensor,  # (...)
    codes: Tensor,  # (...) uint8
    scales: Tensor,  # (groups, 1)
    zeros: Tensor,  # (groups, 1)
    *,
    group_size: int = 256,
    bits: int = 8,
    uniform: Tensor | None = None,
    generator: torch.Generator | None = None,
) -> None:
    """`quantize_affine` into existing tensors, a few groups at a time: nothing of w's size is allocated.

    NaN or infinity in a group makes its scale NaN or infinite, and so every value read back from the group; no error is
    raised, to avoid waiting for the GPU.

    Args:
        generator: source of the numbers for stochastic rounding. A CPU generator seeds one on w's device if needed.
    """
    levels = float(2**bits - 1)
    work = compute_dtype(w.dtype)
    source, target = w.detach().reshape(-1, group_size), codes.view(-1, group_size)
    noise = None if uniform is None else uniform.reshape(-1, group_size)
    draw = _on(generator, w.device)
    for rows in _pieces(source, group_size, all_at_once=False):
        part = source[rows].to(work, copy=True)
        low, high = part.amin(1, keepdim=True).clamp_(max=0), part.amax(1, keepdim=True).clamp_(min=0)
        scale = _round_up(high.sub_(low).clamp_(min=_SMALLEST_RANGE).div_(levels), scales.dtype)
        zero = low.div_(scale).round_().neg_().clamp_(0, levels)
        part.div_(scale)
        if noise is not None:
            part.sub_(noise[rows].to(work)).ceil_()  # up exactly where the fraction is above the draw
        elif draw is not None:
            part.sub_(_uniform(part, draw)).ceil_()
        else:
            part.round_()
        target[rows] = part.add_(zero).clamp_(0, levels)
        scales[rows], zeros[rows] = scale, zero


@torch.no_grad()
def dequantize_affine(
    codes: Tensor,  # (...) uint8 or int8
    scales: Tensor,  # (groups, 1)
    zeros: Tensor | None,  # (groups, 1)
    *,
    group_size: int = 256,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """The tensor that `quantize_affine` stored, `(codes − zero) scale`.

    Args:
        zeros: None means 0 everywhere (codes with a sign).
        dtype: of the result; the scales' by default.

    Returns:
        A tensor of the codes' shape.

    Raises:
        ValueError: group_size does not divide the number of codes; scales or zeros do not have one entry per group.

    Example:
        >>> import torch, lowdim.linalg as la
        >>> codes, scale, zero = torch.tensor([0, 3], dtype=torch.uint8), torch.tensor([[0.5]]), torch.tensor([[1.0]])
        >>> la.dequantize_affine(codes, scale, zero, group_size=2)
        tensor([-0.5000,  1.0000])

    Source: Zhang et al., "Q-GaLore", arXiv 2407.08296.
    """
    groups = _groups("codes", codes.numel(), group_size)
    scales, zeros = _by_group(scales, zeros, groups, group_size)
    out = torch.empty(codes.shape, dtype=dtype or scales.dtype, device=codes.device)
    source, target = codes.reshape(-1, group_size), out.view(-1, group_size)
    for rows in _pieces(target, group_size, all_at_once=True):
        part = target[rows]
        part.copy_(source[rows])  # integers up to 255 and their differences are exact in every floating dtype
        _scale(part, scales[rows], None if zeros is None else zeros[rows])
    return out


@torch.no_grad()
def dequantize_nibbles(
    packed: Tensor,  # (numel / 2) uint8
    scales: Tensor,  # (groups, 1)
    zeros: Tensor,  # (groups, 1)
    *,
    group_size: int,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """`dequantize_affine` of the codes that `pack_nibbles` packed, without all of them at once: `(2 · len(packed),)`.

    Raises:
        ValueError: group_size is odd or does not divide the number of codes; scales or zeros do not have one entry per group.

    Example:
        >>> import torch, lowdim.linalg as la
        >>> packed = la.pack_nibbles(torch.tensor([1, 2, 15, 0], dtype=torch.uint8))
        >>> la.dequantize_nibbles(packed, torch.tensor([[0.5]]), torch.tensor([[1.0]]), group_size=4).tolist()
        [0.0, 0.5, 7.0, -0.5]
    """
    groups = _groups("codes", 2 * packed.numel(), group_size)
    if group_size % 2:
        raise ValueError(f"group_size must be even, as two codes share a byte; got {group_size}")
    scales, known = _by_group(scales, zeros, groups, group_size)
    assert known is not None
    out = torch.empty(2 * packed.numel(), dtype=dtype or scales.dtype, device=packed.device)
    source, target = packed.reshape(groups, group_size // 2), out.view(groups, group_size // 2, 2)
    for rows in _pieces(out.view(groups, group_size), group_size, all_at_once=False):
        part, codes = target[rows], source[rows]
        part[..., 0].copy_(codes & 15)
        part[..., 1].copy_(codes >> 4)
        _scale(out.view(groups, group_size)[rows], scales[rows], known[rows])
    return out


def _by_group(scales: Tensor, zeros: Tensor | None, groups: int, group_size: int) -> tuple[Tensor, Tensor | None]:
    """Scales and zeros as columns, `(groups, 1)`."""
    for name, tensor in (("scales", scales), ("zeros", zeros)):
        if tensor is not None and tensor.numel() != groups:
            raise ValueError(f"{name} must have {groups} entries, one per group of {group_size}; got {tensor.numel()}")
    return scales.reshape(-1, 1), None if zeros is None else zeros.reshape(-1, 1)


def _scale(part: Tensor, scales: Tensor, zeros: Tensor | None) -> None:
    """`(part − zero) scale`, in place."""
    if zeros is not None:
        part.sub_(zeros)
    part.mul_(scales)


def pack_nibbles(codes: Tensor) -> Tensor:
    """Codes below 16 in row-major order, two per byte, the first in the lower half: `(⌈numel / 2⌉,)` uint8.

    Example:
        >>> import torch, lowdim.linalg as la
        >>> la.pack_nibbles(torch.tensor([1, 2, 15], dtype=torch.uint8)).tolist()
        [33, 15]
    """
    flat = codes.reshape(-1)
    packed = flat[0::2].clone()
    packed[: flat.numel() // 2] |= flat[1::2] << 4
    return packed


def unpack_nibbles(packed: Tensor, count: int) -> Tensor:
    """The first `count` codes that `pack_nibbles` packed, `(count,)` uint8.

    Raises:
        ValueError: `packed` is not the size of `count` codes.

    Example:
        >>> import torch, lowdim.linalg as la
        >>> la.unpack_nibbles(torch.tensor([33, 15], dtype=torch.uint8), 3).tolist()
        [1, 2, 15]
    """
    if packed.dtype != torch.uint8 or packed.numel() != -(-count // 2):
        raise ValueError(f"packed must hold {-(-count // 2)} uint8 for {count} codes; got {packed.numel()} {packed.dtype}")
    return torch.stack([packed & 15, packed >> 4], -1).view(-1)[:count]


def _groups(name: str, total: int, group_size: int) -> int:
    check_int("group_size", group_size, 1)
    if total % group_size:
        raise ValueError(f"group_size must divide the number of entries of {name}, {total}; got group_size={group_size}")
    return total // group_size


def _pieces(rows: Tensor, group_size: int, *, all_at_once: bool) -> Iterator[slice]:
    """Runs of groups. In a forecast one run covers everything where work is in place."""
    count = max(1, _CHUNK.get(rows.device.type, _OTHER_CHUNK) // group_size)
    if all_at_once and not has_numbers(rows):
        return iter([slice(None)])
    return slices(len(rows), count, rows)


def _round_up(scale: Tensor, dtype: torch.dtype) -> Tensor:
    """The scale as it will be stored, in the dtype of the computation."""
    if dtype.itemsize >= scale.dtype.itemsize:
        return scale
    stored = scale.to(dtype)
    up = (stored.view(torch.int16) + 1).view(dtype)  # the next number above a positive one
    return torch.where(stored.to(scale.dtype) < scale, up, stored).to(scale.dtype)


def _on(generator: torch.Generator | None, device: torch.device) -> torch.Generator | None:
    if generator is None or device.type in (generator.device.type, "meta"):
        return generator
    seed = torch.randint(2**62, (), generator=generator, device=generator.device)
    return torch.Generator(device).manual_seed(int(seed))


def _uniform(like: Tensor, generator: torch.Generator) -> Tensor:
    """Uniform draws in (0, 1). On a CPU the middles of 2^16 cells, four from each random word: faster than `torch.rand`."""
    if like.device.type != "cpu" or not has_numbers(like):
        return torch.rand(like.shape, dtype=like.dtype, device=like.device, generator=generator)
    words = torch.empty(-(-like.numel() // 4), dtype=torch.int64).random_(-(2**63), None, generator=generator)
    cells = words.view(torch.int16)[: like.numel()].view(like.shape)
    return cells.to(like.dtype).mul_(2.0**-16).add_(0.5 + 2.0**-17)
