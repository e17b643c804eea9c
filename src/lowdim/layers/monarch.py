"""Monarch: a structured layer from two block-diagonal factors."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lowdim.errors import check_int
from lowdim.linalg import draw_uniform, monarch_dense, monarch_multiply, monarch_project
from lowdim.modules import StructuredLinear

__all__ = ["Monarch"]


class Monarch(StructuredLinear):
    """A linear layer whose weight is a Monarch matrix: two block-diagonal factors with a permutation between them.

    Formula: with `p = ⌈in / nblocks⌉`, `o = ⌈out / nblocks⌉`, `x` is zero-padded to `nblocks · p`, multiplied by
    `lowdim.linalg.monarch_multiply(x, blkdiag1, blkdiag2)`, cut to `out` entries, and the bias is added. The factors are
    `blkdiag1 (nblocks, min(p, o), p)` and `blkdiag2 (nblocks, o, min(p, o))`: about `1 / nblocks` of the dense
    layer's weights and multiply-adds each, and every output depends on every input.

    Args:
        nblocks: blocks per factor; more blocks, fewer weights.
        generator: source of random numbers; None uses torch's default one.

    Raises:
        ValueError: `nblocks`, `in_features` or `out_features` not an int >= 1.

    Example:
        >>> import torch
        >>> from lowdim.layers import Monarch
        >>> layer = Monarch(64, 96, nblocks=4)
        >>> layer(torch.zeros(2, 64)).shape, layer.dense_weight().shape, layer.blkdiag1.numel() + layer.blkdiag2.numel()
        (torch.Size([2, 96]), torch.Size([96, 64]), 2560)

    Each new factor is scaled like a whole layer, so the product starts smaller than a dense weight: train with a higher
    learning rate, about twice the dense one. Not for layers narrower than a few blocks, nor for a weight that is known to
    be of low rank (use LowRankLinear).

    Source: Dao et al., "Monarch: Expressive Structured Matrices for Efficient and Accurate Training", ICML 2022,
    arXiv 2204.00595.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        *,
        nblocks: int = 4,
        generator: torch.Generator | None = None,
        device: Any = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__()
        check_int("in_features", in_features, 1)
        check_int("out_features", out_features, 1)
        check_int("nblocks", nblocks, 1)
        self.in_features, self.out_features, self.nblocks = in_features, out_features, nblocks
        shape1, shape2 = _shapes(in_features, out_features, nblocks)
        self.blkdiag1 = nn.Parameter(torch.empty(shape1, device=device, dtype=dtype))
        self.blkdiag2 = nn.Parameter(torch.empty(shape2, device=device, dtype=dtype))
        self.bias = nn.Parameter(torch.empty(out_features, device=device, dtype=dtype)) if bias else None
        self.reset_parameters(generator)

    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        """Each factor uniform in ±1/√(its last dimension), the bias in ±1/√out (not ±1/√in as in nn.Linear)."""
        for factor in (self.blkdiag1, self.blkdiag2):
            draw_uniform(factor, 1 / math.sqrt(factor.shape[-1]), generator)
        if self.bias is not None:
            draw_uniform(self.bias, 1 / math.sqrt(self.out_features), generator)

    def forward(
        self,
        x: Tensor,  # (..., in_features)
    ) -> Tensor:
        """`(..., out_features)`; two batched products."""
        self.check_input(x)
        padding = self.blkdiag1.shape[0] * self.blkdiag1.shape[2] - self.in_features
        y = monarch_multiply(F.pad(x, (0, padding)) if padding else x, self.blkdiag1, self.blkdiag2)
        if y.shape[-1] > self.out_features:
            y = y[..., : self.out_features]
        return y.contiguous() if self.bias is None else y + self.bias.to(y.dtype)

    def dense_weight(self) -> Tensor:
        """The exact dense equivalent `(out, in)`."""
        return monarch_dense(self.blkdiag1, self.blkdiag2)[: self.out_features, : self.in_features]

    def products(self) -> list[tuple[int, int, int]]:
        """First factor, second factor, with their padding."""
        (k, q, p), (l, s, r) = self.blkdiag1.shape, self.blkdiag2.shape
        return [(k * q * p, k * p, k * q), (l * s * r, l * r, l * s)]

    @classmethod
    def from_linear(cls, linear: nn.Linear, *, nblocks: int = 4) -> Monarch:
        """The nearest Monarch layer to a trained one: its zero-padded weight is projected, its bias copied.

        Raises:
            TypeError: not an nn.Linear.
            ValueError: nblocks below 1, NaN or infinity in the weight.
        """
        if not isinstance(linear, nn.Linear):
            raise TypeError(f"linear must be nn.Linear; got {type(linear).__name__}")
        weight = linear.weight.detach()
        layer = cls(
            linear.in_features,
            linear.out_features,
            linear.bias is not None,
            nblocks=nblocks,
            device="meta",
            dtype=weight.dtype,
        )
        shape1, shape2 = _shapes(linear.in_features, linear.out_features, nblocks)
        rows, columns = shape2[0] * shape2[1], shape1[0] * shape1[2]
        padded = F.pad(weight, (0, columns - linear.in_features, 0, rows - linear.out_features))
        w1, w2 = monarch_project(padded, shape1, shape2)
        layer.blkdiag1, layer.blkdiag2 = nn.Parameter(w1), nn.Parameter(w2)
        if linear.bias is not None:
            layer.bias = nn.Parameter(linear.bias.detach().clone())
        return layer.train(linear.training)

    def extra_repr(self) -> str:
        """Sizes, for `print(model)`."""
        return f"{super().extra_repr()}, nblocks={self.nblocks}"


def _shapes(in_features: int, out_features: int, nblocks: int) -> tuple[tuple[int, int, int], tuple[int, int, int]]:
    p, o = math.ceil(in_features / nblocks), math.ceil(out_features / nblocks)
    middle = min(p, o)
    return (nblocks, middle, p), (nblocks, o, middle)
