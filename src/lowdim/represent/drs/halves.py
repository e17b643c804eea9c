"""The two halves of an image's pixels, and what stands in for the other half."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from lowdim.errors import check_choice, check_int

__all__ = ["FILLS", "Filler", "checkerboard", "fill_masked"]

FILLS = ("neighbour", "zero", "maxpool")
VARIANTS = ("paper", "official")


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


class Filler:
    """What a branch sees of kept pixels: a deterministic map of them, which cannot hurt the certificate.

    Args:
        samples_last: images are laid out `(C, H, W, B)` and not `(B, C, H, W)`: neighbours are then sums of whole rows.
    """

    def __init__(
        self,
        mask: Tensor,  # (H, W) bool
        fill: str,
        device: torch.device,
        dtype: torch.dtype,
        *,
        samples_last: bool = False,
    ):
        check_choice("fill", fill, FILLS)
        self.fill, self.keep, self.samples_last = fill, mask.to(device=device, dtype=dtype), samples_last
        self.padding = int(fill == "neighbour")  # cells of zeros around the images that are given
        if fill == "neighbour":
            count = _neighbours(F.pad(self.keep, (1, 1, 1, 1)), -2)
            share = (1 - self.keep) / count.clamp_min(1)  # a pixel without kept neighbours stays 0
            self.share = share[..., None] if samples_last else share

    def __call__(
        self,
        kept: Tensor,  # (B, C, H + 2 padding, W + 2 padding), zero where nothing is kept
    ) -> Tensor:
        """The filled images `(B, C, H, W)`: a new tensor, or `kept` itself for the fill with zeros."""
        if self.fill == "neighbour":
            axis = -3 if self.samples_last else -2
            return _neighbours(kept, axis).mul_(self.share).add_(_inner(kept, axis, 1, 1))
        if self.fill == "maxpool":
            images = kept.movedim(-1, 0) if self.samples_last else kept
            peaks = F.max_pool2d(images, 2, ceil_mode=True).repeat_interleave(2, -2).repeat_interleave(2, -1)
            filled = torch.addcmul(images, peaks[..., : images.shape[-2], : images.shape[-1]], self.keep)
            return filled.movedim(0, -1) if self.samples_last else filled
        return kept


def _neighbours(padded: Tensor, axis: int) -> Tensor:
    """Sum over the four neighbours of each cell but those at the border; rows of the images run along `axis`."""
    out = _inner(padded, axis, 0, 1) + _inner(padded, axis, 2, 1)
    return out.add_(_inner(padded, axis, 1, 0)).add_(_inner(padded, axis, 1, 2))


def _inner(padded: Tensor, axis: int, row: int, column: int) -> Tensor:
    """A view without the border, moved by up to one cell."""
    height, width = padded.shape[axis] - 2, padded.shape[axis + 1] - 2
    return padded.narrow(axis, row, height).narrow(axis + 1, column, width)


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
    filler = Filler(mask, fill, x.device, x.dtype)
    return filler(F.pad(x * filler.keep, [filler.padding] * 4))


def check_mask(name: str, mask: Tensor, height: int, width: int) -> None:
    """Raise unless it is a bool mask of that size."""
    if mask.dtype != torch.bool:
        raise TypeError(f"{name} must be bool; got {mask.dtype}")
    if mask.ndim != 2 or tuple(mask.shape) != (height, width):
        raise ValueError(f"{name} must have shape {(height, width)}, the image's; got {tuple(mask.shape)}")
