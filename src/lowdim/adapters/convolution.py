"""How an update of the matrix `(out_channels, in_channels / groups · kh · kw)` acts on pictures."""

from __future__ import annotations

from typing import TYPE_CHECKING, cast

from torch import Tensor, nn
from torch.nn import functional as F

if TYPE_CHECKING:
    from lowdim.adapters.base import WeightUpdate

__all__ = ["convolve", "convolve_thin"]


def convolve(
    update: WeightUpdate,
    conv: nn.Conv2d,
    x: Tensor,  # (batch, in_channels, height, width) or without the batch
) -> Tensor:
    """What `update` adds to `conv(x)`, without the bias."""
    if not _plain(conv):
        # Grouped kernels are small: the dense update costs less than applying it to every group's patches.
        return conv._conv_forward(x, update.dense().view(conv.weight.shape), None)
    out = update.convolve(x, conv)
    if out is not None:
        return out
    if conv.kernel_size == (1, 1) and conv.padding == (0, 0):
        rows = x[..., :: conv.stride[0], :: conv.stride[1]].movedim(-3, -1)
        return update(rows).movedim(-1, -3)
    height, width = _out_size(conv, x)
    batch = x if x.ndim == 4 else x[None]
    patches = F.unfold(batch, conv.kernel_size, conv.dilation, conv.padding, conv.stride)  # type: ignore[arg-type]
    out = update(patches.transpose(1, 2)).transpose(1, 2).unflatten(2, (height, width))
    return out if x.ndim == 4 else out[0]


def convolve_thin(
    x: Tensor,
    down: Tensor,  # (k, in_channels · kh · kw)
    conv: nn.Conv2d,
) -> Tensor:
    """The first factor as a convolution with `k` channels, channels last: patches, kh·kw times the input, are never made."""
    kernel = down.view(-1, *conv.weight.shape[1:])
    hidden = F.conv2d(x, kernel, None, conv.stride, conv.padding, conv.dilation)
    return hidden.movedim(-3, -1)


def _plain(conv: nn.Conv2d) -> bool:
    return conv.groups == 1 and conv.padding_mode == "zeros" and not isinstance(conv.padding, str)


def _out_size(conv: nn.Conv2d, x: Tensor) -> tuple[int, int]:
    size = []
    for i, length in enumerate(x.shape[-2:]):
        reach = conv.dilation[i] * (conv.kernel_size[i] - 1)
        size.append((length + 2 * cast(int, conv.padding[i]) - reach - 1) // conv.stride[i] + 1)
    return size[0], size[1]
