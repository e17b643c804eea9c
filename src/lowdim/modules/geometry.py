"""The geometry of a convolution, kept by a module that takes its place and has another weight."""

from __future__ import annotations

from typing import Any, cast

from torch import Tensor, nn

__all__ = ["ConvGeometry"]


class ConvGeometry(nn.Module):
    """Mixin for a module in place of an nn.Conv2d: its sizes, strides and padding, and its product with any kernel.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> from lowdim.modules.geometry import ConvGeometry
        >>> conv = nn.Conv2d(2, 4, 3, padding=1)
        >>> module = ConvGeometry()
        >>> module.copy_geometry(conv)
        >>> x = torch.randn(1, 2, 5, 5)
        >>> torch.equal(module.convolve(x, conv.weight, conv.bias), conv(x))
        True
    """

    _GEOMETRY = (
        "in_channels", "out_channels", "kernel_size", "stride", "padding", "dilation", "groups", "padding_mode",
    )  # fmt: skip

    kernel_size: tuple[int, int]

    def copy_geometry(self, conv: nn.Conv2d) -> None:
        """Take over the numbers of `conv`."""
        for name in (*self._GEOMETRY, "_reversed_padding_repeated_twice"):
            setattr(self, name, getattr(conv, name))

    def convolve(self, x: Tensor, kernel: Tensor, bias: Tensor | None) -> Tensor:
        """`(batch, out_channels, height', width')`."""
        return nn.Conv2d._conv_forward(cast(Any, self), x, kernel, bias)

    def plain_conv(self, kernel: Tensor, bias: Tensor | None, *, requires_grad: bool = True) -> nn.Conv2d:
        """A plain layer with these numbers, without a random draw; the kernel is used as it is, the bias is copied."""
        how: dict[str, Any] = {name: getattr(self, name) for name in self._GEOMETRY}
        conv = nn.Conv2d(**how, bias=bias is not None, device="meta")
        conv.weight = nn.Parameter(kernel.detach(), requires_grad)
        if bias is not None:
            conv.bias = nn.Parameter(bias.detach().clone(), requires_grad)
        return conv.train(self.training)
