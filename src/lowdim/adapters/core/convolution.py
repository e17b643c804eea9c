"""Applies an update of the matrix `(out_channels, in_channels / groups · kernel)` to signals, images and volumes."""

from __future__ import annotations

from typing import cast

from torch import Tensor, nn
from torch.nn import functional as F

from lowdim.adapters.core.update import WeightUpdate

__all__ = ["Convolution", "convolve", "convolve_thin", "is_grouped"]

Convolution = nn.Conv1d | nn.Conv2d | nn.Conv3d


def convolve(
    update: WeightUpdate,
    conv: Convolution,
    x: Tensor,  # (batch, in_channels, *size) or without the batch
) -> Tensor:
    """The term that `update` adds to `conv(x)`, without the bias."""
    if conv.groups == 1:
        out = update.convolve(x, cast(nn.Conv2d, conv))
        if out is not None:
            return out
    if conv.groups > 1 or conv.padding_mode != "zeros" or isinstance(conv.padding, str):
        # Grouped kernels are small: the dense update costs less than applying it to every group's patches.
        return conv._conv_forward(x, update.dense().view(conv.weight.shape), None)
    spatial = len(conv.kernel_size)
    if set(conv.kernel_size) == {1} and not any(conv.padding):
        rows = x[(..., *(slice(None, None, step) for step in conv.stride))].movedim(-1 - spatial, -1)
        return update(rows).movedim(-1, -1 - spatial)
    return update(_patches(x, conv)).movedim(-1, -1 - spatial)


def is_grouped(layer: nn.Module) -> bool:
    """Whether the layer, or the one under its adapters, is a convolution whose channels are split into groups."""
    return getattr(getattr(layer, "plain", layer), "groups", 1) > 1


def convolve_thin(
    x: Tensor,
    down: Tensor,  # (k, in_channels · kernel)
    conv: Convolution,
) -> Tensor:
    """The first factor as a convolution with `k` channels, channels last; patches, many times the input, are never built."""
    kernel = down.view(-1, *conv.weight.shape[1:])
    return conv._conv_forward(x, kernel, None).movedim(-1 - len(conv.kernel_size), -1)


def _patches(x: Tensor, conv: Convolution) -> Tensor:
    """The input under the kernel at each place, `(batch, *out_size, in_channels · kernel)`."""
    spatial = len(conv.kernel_size)
    padding = cast("tuple[int, ...]", conv.padding)
    if any(padding):
        x = F.pad(x, [width for width in reversed(padding) for _ in range(2)])
    first = x.ndim - spatial
    for i, (size, step, gap) in enumerate(zip(conv.kernel_size, conv.stride, conv.dilation)):
        x = x.unfold(first + i, gap * (size - 1) + 1, step)[..., ::gap]
    return x.movedim(first - 1, first + spatial - 1).flatten(-1 - spatial)
