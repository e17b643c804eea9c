"""Maestro: layers whose components are ordered by importance, so that a prefix of them is a smaller layer."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lowdim.errors import check_choice, check_int
from lowdim.layers.maestro.components import OrderedComponents
from lowdim.linalg import seeded
from lowdim.modules import StructuredLinear
from lowdim.surgery import plain_weight

__all__ = ["MaestroConv2d", "MaestroLinear"]


class MaestroLinear(OrderedComponents, StructuredLinear):
    """A linear layer from ordered components; training determines how many it needs.

    Formula: `y = U[:, :r] (V[:r] x) + bias` with `U (out, d)`, `V (d, in)`, `d = min(out, in)` and `r` the current `rank`
    (at first `d`), or a smaller one for one pass. Both start from the SVD of a weight: `U √S` and `√S Vᵀ`.

    Args:
        seed, generator: source of random numbers; the generator has priority, and without either torch's default one is used.

    Attributes:
        rank: components in use.
        sampled: None, or the rank of the next passes (`MaestroSampler.sampled` sets and resets it).

    Raises:
        ValueError: a size below 1; in `forward`, a rank outside [0, current rank].

    Example:
        >>> import torch
        >>> from lowdim.layers import MaestroLinear
        >>> layer = MaestroLinear(6, 4, seed=0)
        >>> layer(torch.zeros(3, 6), rank=2).shape, layer.dense_weight().shape, layer.rank
        (torch.Size([3, 4]), torch.Size([4, 6]), 4)
        >>> with torch.no_grad():
        ...     layer.U[:, 1:] = 0
        >>> layer.shrink(1e-3)
        1

    Not to save memory in training: before it shrinks it holds up to twice the weights of a dense layer (and as much optimizer
    state), and the sampled pass costs a second forward. If the rank is known in advance, use LowRankLinear.

    Source: Horváth et al., "Maestro: Uncovering Low-Rank Structures via Trainable Decomposition", ICML 2024, arXiv
    2308.14929.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        dtype: torch.dtype | None = None,
        *,
        seed: int | None = None,
        generator: torch.Generator | None = None,
        device: Any = None,
    ):
        check_int("in_features", in_features, 1)
        check_int("out_features", out_features, 1)
        super().__init__(out_features, (in_features,), bias, device, dtype)
        self.in_features, self.out_features = in_features, out_features
        self.reset_parameters(seeded(seed, generator))

    def forward(
        self,
        x: Tensor,  # (..., in_features)
        rank: int | None = None,
    ) -> Tensor:
        """`(..., out_features)` at the given rank, else at `sampled`, else at the current rank."""
        self.check_input(x)
        u, v = self.prefix(self.active(rank))
        return F.linear(F.linear(x, v), u, self.bias)

    def dense_weight(self) -> Tensor:
        """`U[:, :rank] V[:rank]`, `(out, in)`."""
        u, v = self.prefix(self.rank)
        return u @ v

    def products(self) -> list[tuple[int, int, int]]:
        """`V`, then `U`, at the current rank."""
        r = self.rank
        return [(r * self.in_features, self.in_features, r), (r * self.out_features, r, self.out_features)]

    @classmethod
    def from_linear(cls, linear: nn.Linear) -> MaestroLinear:
        """The same function as a trained layer, from its SVD; the bias is copied.

        Raises:
            TypeError: not an nn.Linear.
            ValueError: NaN or infinity in the weight.
        """
        weight = plain_weight(linear)
        layer = cls(linear.in_features, linear.out_features, linear.bias is not None, device="meta")
        layer.initialise_from(weight, linear.bias)
        return layer.train(linear.training)

    def extra_repr(self) -> str:
        """Sizes, for `print(model)`."""
        return f"{super().extra_repr()}, rank={self.rank}"


class MaestroConv2d(OrderedComponents):
    """A convolution from ordered components: `V` convolves to `r` channels, `U` mixes them by a 1 x 1 convolution.

    Formula: `y = U[:, :r] (V[:r] * x) + bias` with `V (d, in, k_h, k_w)`, `U (out, d)`, `d = min(out, in k_h k_w)`. Stride,
    padding and dilation are those of `V`.

    Args:
        kernel_size, stride, padding, dilation: as in nn.Conv2d, an int or a pair (padding also `"same"` or `"valid"`).
        seed, generator: source of random numbers; the generator has priority, and without either torch's default one is used.

    Raises:
        ValueError: a size below 1; in `forward`, a rank outside [0, current rank].

    Example:
        >>> import torch
        >>> from lowdim.layers import MaestroConv2d
        >>> layer = MaestroConv2d(3, 8, 3, padding=1, seed=0)
        >>> layer(torch.zeros(1, 3, 5, 5), rank=2).shape, layer.dense_weight().shape, layer.rank
        (torch.Size([1, 8, 5, 5]), torch.Size([8, 3, 3, 3]), 8)

    Not for grouped (depthwise) convolutions, whose weight is small and not of low rank.

    Source: Horváth et al., "Maestro: Uncovering Low-Rank Structures via Trainable Decomposition", ICML 2024, arXiv
    2308.14929.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | tuple[int, int],
        *,
        stride: int | tuple[int, int] = 1,
        padding: int | tuple[int, int] | str = 0,
        dilation: int | tuple[int, int] = 1,
        bias: bool = True,
        dtype: torch.dtype | None = None,
        seed: int | None = None,
        generator: torch.Generator | None = None,
        device: Any = None,
    ):
        check_int("in_channels", in_channels, 1)
        check_int("out_channels", out_channels, 1)
        kernel = _pair("kernel_size", kernel_size, 1)
        super().__init__(out_channels, (in_channels, *kernel), bias, device, dtype)
        self.in_channels, self.out_channels, self.kernel_size = in_channels, out_channels, kernel
        self.stride, self.dilation = _pair("stride", stride, 1), _pair("dilation", dilation, 1)
        if isinstance(padding, str):
            check_choice("padding", padding, ("same", "valid"))
            self.padding: tuple[int, int] | str = padding
        else:
            self.padding = _pair("padding", padding, 0)
        self.reset_parameters(seeded(seed, generator))

    def forward(
        self,
        x: Tensor,  # (batch, in_channels, height, width)
        rank: int | None = None,
    ) -> Tensor:
        """`(batch, out_channels, height', width')` at the given rank, else at `sampled`, else at the current rank."""
        r = self.active(rank)
        u, v = self.prefix(r)
        if r == 0:  # a convolution must have at least one channel; this one is zero
            u, v = torch.cat([u, u.new_zeros(self.out_channels, 1)], 1), torch.cat([v, v.new_zeros(1, *v.shape[1:])])
        return F.conv2d(F.conv2d(x, v, None, self.stride, self.padding, self.dilation), u[..., None, None], self.bias)

    def dense_weight(self) -> Tensor:
        """The kernel `(out, in, k_h, k_w)` at the current rank."""
        u, v = self.prefix(self.rank)
        return (u @ v.flatten(1)).view(self.out_channels, *self.V.shape[1:])

    @torch.no_grad()
    def to_conv(self) -> nn.Conv2d:
        """A plain nn.Conv2d with the same function, dtype and device; its kernel is computed in float32 or better."""
        wide = torch.promote_types(self.U.dtype, torch.float32)
        u, v = self.prefix(self.rank)
        with torch.autocast(u.device.type, enabled=False):
            weight = (u.to(wide) @ v.flatten(1).to(wide)).view(self.out_channels, *v.shape[1:]).to(u.dtype)
        conv = nn.Conv2d(
            self.in_channels,
            self.out_channels,
            self.kernel_size,
            self.stride,
            self.padding,
            self.dilation,
            bias=self.bias is not None,
            device="meta",
        )
        trained = any(p.requires_grad for p in self.parameters())
        conv.weight = nn.Parameter(weight, trained)
        if self.bias is not None:
            conv.bias = nn.Parameter(self.bias.detach().clone(), trained)
        return conv.train(self.training)

    @classmethod
    def from_conv(cls, conv: nn.Conv2d) -> MaestroConv2d:
        """The same function as a trained convolution, from the SVD of its kernel `(out, in · k_h · k_w)`; the bias is copied.

        Raises:
            TypeError: not an nn.Conv2d.
            ValueError: groups != 1, a padding mode other than zeros, NaN or infinity in the weight.
        """
        if not isinstance(conv, nn.Conv2d):
            raise TypeError(f"conv must be nn.Conv2d; got {type(conv).__name__}")
        if conv.groups != 1:
            raise ValueError(f"conv must have groups=1; got {conv.groups}")
        if conv.padding_mode != "zeros":
            raise ValueError(f"conv must have padding_mode='zeros'; got {conv.padding_mode!r}")
        how: dict[str, Any] = {name: getattr(conv, name) for name in ("stride", "padding", "dilation")}
        size: Any = conv.kernel_size
        layer = cls(conv.in_channels, conv.out_channels, size, bias=conv.bias is not None, device="meta", **how)
        layer.initialise_from(conv.weight, conv.bias)
        return layer.train(conv.training)

    def extra_repr(self) -> str:
        """Sizes, for `print(model)`."""
        sizes = f"{self.in_channels}, {self.out_channels}, kernel_size={self.kernel_size}, stride={self.stride}"
        return f"{sizes}, padding={self.padding}, dilation={self.dilation}, bias={self.bias is not None}, rank={self.rank}"


def _pair(name: str, value: Any, minimum: int) -> tuple[int, int]:
    pair = (value, value) if not isinstance(value, (tuple, list)) else tuple(value)
    if len(pair) != 2:
        raise ValueError(f"{name} must be an int or a pair; got {value!r}")
    for part in pair:
        check_int(name, part, minimum)
    return pair[0], pair[1]
