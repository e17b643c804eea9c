"""The two halves of an image's pixels, and what stands in for the other half."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from lowdim.errors import check_choice, check_int

__all__ = ["FILLS", "Spread", "checkerboard", "fill_masked"]

FILLS = ("neighbour", "zero", "maxpool")
VARIANTS = ("paper", "official")
_FOUR = ((0, 1), (2, 1), (1, 0), (1, 2))  # row and column of a cell's neighbours, from the cell up and left of it


def checkerboard(height: int, width: int, *, variant: str = "paper") -> tuple[Tensor, Tensor]:
    """Two masks that take every other pixel: `left` where `i + j` is even, `right` where it is odd.

    Args:
        variant: `"official"`: the authors' partition, with the first pixel pair of each row flipped against the rest. The
            certificate holds for any partition.

    Returns:
        `left, right (height, width)` bool.

    Raises:
        ValueError: sides below 1, an unknown variant.

    Example:
        >>> from lowdim.represent import checkerboard
        >>> checkerboard(2, 3)[0].int().tolist()
        [[1, 0, 1], [0, 1, 0]]

    Source: Xia, Yu, Jiang, Ding, ICLR 2024, arXiv 2404.09586.
    """
    check_int("height", height, 1)
    check_int("width", width, 1)
    check_choice("variant", variant, VARIANTS)
    i, j = torch.arange(height)[:, None], torch.arange(width)[None]
    left = (i + j) % 2 == 0
    if variant == "official":
        left = left ^ (j >= 2)
    return left, ~left


def fill_masked(
    x: Tensor,  # (B, C, H, W)
    mask: Tensor,  # (H, W) bool
    *,
    fill: str = "neighbour",
) -> Tensor:
    """Images of which a branch knows only the pixels of its mask.

    Args:
        fill: `"neighbour"`: dropped pixels get the mean of their kept 4-neighbours; `"zero"`: 0; `"maxpool"`: 0, and kept
            pixels get the maximum of their 2x2 block added, as in the authors' program for CIFAR.

    Returns:
        `(B, C, H, W)`; dropped pixels of `x` have no effect.

    Raises:
        ValueError: shapes that do not fit, an unknown fill. TypeError: a mask that is not bool.

    Example:
        >>> import torch
        >>> from lowdim.represent import checkerboard, fill_masked
        >>> fill_masked(torch.tensor([[[[2.0, 9.0, 4.0]]]]), checkerboard(1, 3)[0]).flatten().tolist()
        [2.0, 3.0, 4.0]

    Source: Xia, Yu, Jiang, Ding, ICLR 2024, arXiv 2404.09586.
    """
    if x.ndim != 4 or not x.is_floating_point():
        raise ValueError(f"x must be (B, C, H, W) of floating point numbers; got {tuple(x.shape)}, {x.dtype}")
    check_mask("mask", mask, x.shape[2], x.shape[3])
    check_choice("fill", fill, FILLS)
    keep = mask.to(x)
    kept = x * keep
    if fill == "neighbour":
        sums, count = (_four_neighbours(F.pad(each, (1, 1, 1, 1))) for each in (kept, keep))
        return sums.mul_((1 - keep) / count.clamp_min(1)).add_(kept)  # a pixel without kept neighbours stays 0
    return _with_peaks(kept, keep) if fill == "maxpool" else kept


class Spread:
    """`fill_masked` for many samples of which only the kept pixels exist: the same numbers, and no pass over a whole image.

    Args:
        mask: (H, W) bool.
    """

    def __init__(self, mask: Tensor, fill: str, device: torch.device, dtype: torch.dtype):
        check_choice("fill", fill, FILLS)
        flat = mask.reshape(-1)
        self.kept = flat.nonzero()[:, 0].to(device)  # pixels in the order of their numbers
        self._mask = mask.to(device, dtype)
        self._fill = fill
        number = torch.where(flat, flat.cumsum(0) - 1, -1).view(mask.shape)
        sources = number.view(-1, 1)
        if fill == "neighbour":  # summed in the order of `_four_neighbours`
            around = F.pad(number, (1, 1, 1, 1), value=-1)
            four = [_inner(around, row, column).reshape(-1) for row, column in _FOUR]
            sources = torch.cat([sources, torch.where(flat, -1, torch.stack(four)).T], 1)
        found = sources >= 0
        counts = found.sum(1)
        self._rows, self._ends = sources[found].to(device), F.pad(counts.cumsum(0), (1, 0)).to(device)
        self._share = counts.clamp_min(1).to(device, dtype).reciprocal()[:, None]

    def __call__(
        self,
        noisy: Tensor,  # (C, kept, S)
        out: Tensor,  # (S, C, H, W)
    ) -> None:
        """Write the filled images: each pixel is a sum of rows, as an embedding bag takes it."""
        for channel, rows in enumerate(noisy):  # one at a time stays in a core's cache
            whole = F.embedding_bag(self._rows, rows, self._ends, mode="sum", include_last_offset=True)
            if self._fill == "neighbour":
                whole.mul_(self._share)
            images = whole.view(*self._mask.shape, -1).movedim(-1, 0)
            out[:, channel] = _with_peaks(images[:, None], self._mask)[:, 0] if self._fill == "maxpool" else images


def _with_peaks(kept: Tensor, keep: Tensor) -> Tensor:
    """Kept pixels with the maximum of their 2 x 2 block added."""
    peaks = F.max_pool2d(kept, 2, ceil_mode=True).repeat_interleave(2, -2).repeat_interleave(2, -1)
    return torch.addcmul(kept, peaks[..., : kept.shape[-2], : kept.shape[-1]], keep)


def _four_neighbours(padded: Tensor) -> Tensor:
    """Sum over the four neighbours of each cell but those at the border."""
    up, down, left, right = (_inner(padded, row, column) for row, column in _FOUR)
    return (up + down).add_(left).add_(right)


def _inner(padded: Tensor, row: int, column: int) -> Tensor:
    """A view without the border, moved by up to one cell."""
    height, width = padded.shape[-2] - 2, padded.shape[-1] - 2
    return padded[..., row : row + height, column : column + width]


def check_mask(name: str, mask: Tensor, height: int, width: int) -> None:
    """Raise unless it is a bool mask of that size."""
    if mask.dtype != torch.bool:
        raise TypeError(f"{name} must be bool; got {mask.dtype}")
    if mask.ndim != 2 or tuple(mask.shape) != (height, width):
        raise ValueError(f"{name} must have shape {(height, width)}, the image's; got {tuple(mask.shape)}")
