"""Two structured layers with block-diagonal factors: BlockDense and BlockShuffle."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lowdim.errors import check_choice, check_float, check_int
from lowdim.layers.core.block_factors import BlockFactors
from lowdim.linalg import compute_dtype, draw_normal, seeded, svd
from lowdim.modules import RebuildableLinear
from lowdim.surgery import plain_weight

__all__ = ["BlockDense", "BlockShuffle"]

_INITS = ("ortho", "random")


class BlockDense(RebuildableLinear):
    """A linear layer whose weight is a dense matrix times a block-diagonal one.

    Formula: `y = B blockdiag(blkdiag) x + bias`: piece `i` of `x`, `in / nblocks` long, goes through `blkdiag[i]`, and `B`
    mixes the concatenated results. `blkdiag (nblocks, rank / nblocks, in / nblocks)`, `B (out, rank)`: `rank in / nblocks +
    rank out` numbers, where a low-rank layer of equal rank has `rank in + rank out`.

    Args:
        rank: inner size, a multiple of nblocks; `rank / nblocks` is at most `min(in / nblocks, out)`.
        nblocks: blocks of the first factor; it divides `in_features`.
        init: how the factors start; the bias is 0. `"ortho"`: the polar factor `U Vᵀ` of a normal draw, for each block and for
            `B`, so that all its singular values are 1. `"random"`: the draw itself.
        std: of the draw: a number, or `"xavier"` for 1/√fan_in, the factor's last dimension.
        seed, generator: source of random numbers; the generator has priority, and without either torch's default one is used.

    Raises:
        ValueError: sizes, rank or nblocks that do not fit each other, unknown init or std.

    Example:
        >>> from lowdim.layers import BlockDense
        >>> layer = BlockDense(64, 96, rank=16, nblocks=4, seed=0)
        >>> layer.dense_weight().shape, layer.blkdiag.numel() + layer.B.numel()
        (torch.Size([96, 64]), 1792)

    Not where the input has to be mixed before it is cut: piece `i` of the input reaches the output through `rank / nblocks`
    numbers only. LowRankLinear mixes first.

    Source: Wei et al., "Building on Efficient Foundations: Effectively Training LLMs with Structured Feedforward Layers",
    NeurIPS 2024, arXiv 2406.16450.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        *,
        rank: int = 256,
        nblocks: int = 4,
        init: str = "ortho",
        std: float | str = "xavier",
        seed: int | None = None,
        generator: torch.Generator | None = None,
        device: Any = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__()
        check_int("in_features", in_features, 1)
        check_int("out_features", out_features, 1)
        _check_blocks(nblocks, in_features=in_features)
        check_int("rank", rank, 1)
        _check_blocks(nblocks, rank=rank)
        check_int("rank", rank, 1, min(in_features, nblocks * out_features))
        self.in_features, self.out_features, self.rank, self.nblocks = in_features, out_features, rank, nblocks
        shape = nblocks, rank // nblocks, in_features // nblocks
        self.blkdiag = nn.Parameter(torch.empty(shape, device=device, dtype=dtype))
        self.B = nn.Parameter(torch.empty(out_features, rank, device=device, dtype=dtype))
        self.bias = nn.Parameter(torch.zeros(out_features, device=device, dtype=dtype)) if bias else None
        _draw((self.blkdiag, self.B), init, std, seed, generator)

    def forward(
        self,
        x: Tensor,  # (..., in_features)
    ) -> Tensor:
        """`(..., out_features)`; a batched product and a plain one."""
        self.check_input(x)
        rows = x.reshape(-1, self.nblocks, self.in_features // self.nblocks).transpose(0, 1)  # (nblocks, T, in / nblocks)
        hidden = torch.bmm(rows, self.blkdiag.mT).transpose(0, 1).reshape(*x.shape[:-1], self.rank)
        return F.linear(hidden, self.B, self.bias)

    def dense_weight(self) -> Tensor:
        """`B blockdiag(blkdiag)`, `(out, in)`."""
        pieces = self.B.unflatten(1, (self.nblocks, -1)).transpose(0, 1)  # (nblocks, out, rank / nblocks)
        return torch.bmm(pieces, self.blkdiag).transpose(0, 1).flatten(1)

    def products(self) -> list[tuple[int, int, int]]:
        """`blkdiag`, then `B`."""
        return [(self.blkdiag.numel(), self.in_features, self.rank), (self.B.numel(), self.rank, self.out_features)]

    @classmethod
    def from_linear(cls, linear: nn.Linear, *, rank: int = 256, nblocks: int = 4) -> Self:
        """The nearest such layer to a trained one; the bias is copied.

        Formula: for piece `i` of the columns the SVD cut to `rank / nblocks`: `blkdiag[i] = √S Vᵀ`, and its columns of `B` are
        `U √S`. The pieces do not depend on each other, so that this is the best.

        Raises:
            TypeError: not an nn.Linear.
            ValueError: rank or nblocks that do not fit, NaN or infinity in the weight.
        """
        weight = plain_weight(linear)
        sizes = linear.in_features, linear.out_features, linear.bias is not None
        layer = cls(*sizes, rank=rank, nblocks=nblocks, device="meta", dtype=weight.dtype)
        u, s, vh = svd(weight.unflatten(1, (nblocks, -1)).transpose(0, 1))
        kept = rank // nblocks
        root = s[:, :kept].sqrt()
        layer.blkdiag = _parameter(root[:, :, None] * vh[:, :kept], weight.dtype)
        layer.B = _parameter((u[:, :, :kept] * root[:, None]).transpose(0, 1).flatten(1), weight.dtype)
        return layer.with_rest_of(linear)

    def description(self) -> dict[str, Any]:
        """Rank and blocks, and whether there is a bias."""
        return {"rank": self.rank, "nblocks": self.nblocks, "bias": self.bias is not None}

    def extra_repr(self) -> str:
        """Sizes, for `print(model)`."""
        return f"{super().extra_repr()}, rank={self.rank}, nblocks={self.nblocks}"


class BlockShuffle(BlockFactors, RebuildableLinear):
    """A linear layer whose weight is a product of two block-diagonal matrices with a permutation between them.

    Formula: `y = monarch_multiply(x, blkdiag1, blkdiag2) + bias` (`lowdim.linalg`): a Monarch matrix without padding. With
    `n = nblocks` the factors are `(n, in / n, in / n)` and `(n, out / n, in / n)` where `in < out`, else `(n, out / n, in / n)`
    and `(n, out / n, out / n)`: about `1 / n` of the dense layer's numbers each.

    Args:
        nblocks: blocks of each factor; it divides both sides.
        init: how the factors start; the bias is 0. `"ortho"`: the polar factor `U Vᵀ` of a normal draw, for each block, so that
            all its singular values are 1. `"random"`: the draw itself.
        std: of the draw: a number, or `"xavier"` for 1/√fan_in, the factor's last dimension.
        seed, generator: source of random numbers; the generator has priority, and without either torch's default one is used.

    Raises:
        ValueError: sizes that nblocks does not divide, unknown init or std.

    Example:
        >>> from lowdim.layers import BlockShuffle
        >>> layer = BlockShuffle(64, 96, nblocks=4, seed=0)
        >>> layer.dense_weight().shape, layer.blkdiag1.numel() + layer.blkdiag2.numel()
        (torch.Size([96, 64]), 2560)

    Not for sides that no small number divides: Monarch pads them.

    Source: Wei et al., "Building on Efficient Foundations: Effectively Training LLMs with Structured Feedforward Layers",
    NeurIPS 2024, arXiv 2406.16450; the product is that of Dao et al., "Monarch", ICML 2022, arXiv 2204.00595.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        *,
        nblocks: int = 2,
        init: str = "ortho",
        std: float | str = "xavier",
        seed: int | None = None,
        generator: torch.Generator | None = None,
        device: Any = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__(in_features, out_features, bias, nblocks, device=device, dtype=dtype)
        _check_blocks(nblocks, in_features=in_features, out_features=out_features)
        _draw((self.blkdiag1, self.blkdiag2), init, std, seed, generator)

    @classmethod
    def from_linear(cls, linear: nn.Linear, *, nblocks: int = 2) -> Self:
        """The nearest such layer to a trained one (`lowdim.linalg.monarch_project`); the bias is copied.

        Raises:
            TypeError: not an nn.Linear.
            ValueError: nblocks that does not divide both sides, NaN or infinity in the weight.
        """
        return cls.nearest(linear, nblocks)

    def description(self) -> dict[str, Any]:
        """Blocks, and whether there is a bias."""
        return {"nblocks": self.nblocks, "bias": self.bias is not None}


def _check_blocks(nblocks: int, **sizes: int) -> None:
    check_int("nblocks", nblocks, 1)
    for name, size in sizes.items():
        if size % nblocks:
            raise ValueError(f"nblocks must divide {name}; got nblocks={nblocks} and {name}={size}")


@torch.no_grad()
def _draw(factors: Iterable[Tensor], init: str, std: float | str, seed: int | None, generator: torch.Generator | None) -> None:
    """Fill in factors `(..., m, n)`: normal numbers, or the polar factor of each matrix of them."""
    check_choice("init", init, _INITS)
    if std != "xavier":
        check_float("std", std, 0.0, low_open=True)
    generator = seeded(seed, generator)
    for factor in factors:
        if factor.is_meta:
            continue
        drawn = torch.empty(factor.shape, dtype=compute_dtype(factor.dtype), device=factor.device)
        draw_normal(drawn, factor.shape[-1] ** -0.5 if std == "xavier" else float(std), generator)
        if init == "ortho":
            u, _, vh = svd(drawn)
            drawn = u @ vh
        factor.copy_(drawn)


def _parameter(values: Tensor, dtype: torch.dtype) -> nn.Parameter:
    return nn.Parameter(values.to(dtype).clone(memory_format=torch.contiguous_format))
