"""Monarch: a structured layer from two block-diagonal factors."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import nn

from lowdim.layers.core.block_factors import BlockFactors
from lowdim.linalg import draw_uniform

__all__ = ["Monarch"]


class Monarch(BlockFactors):
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
        super().__init__(in_features, out_features, bias, nblocks, device=device, dtype=dtype)
        self.reset_parameters(generator)

    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        """Each factor uniform in ±1/√(its last dimension), the bias in ±1/√out (not ±1/√in as in nn.Linear)."""
        for factor in (self.blkdiag1, self.blkdiag2):
            draw_uniform(factor, 1 / math.sqrt(factor.shape[-1]), generator)
        if self.bias is not None:
            draw_uniform(self.bias, 1 / math.sqrt(self.out_features), generator)

    @classmethod
    def from_linear(cls, linear: nn.Linear, *, nblocks: int = 4) -> Monarch:
        """The nearest Monarch layer to a trained one: its zero-padded weight is projected, its bias copied.

        Raises:
            TypeError: not an nn.Linear.
            ValueError: nblocks below 1, NaN or infinity in the weight.
        """
        return cls.nearest(linear, nblocks)
