"""A weight of rank r as r of its own columns, and the coefficients of the others: the smallest exact form of a high rank."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lowdim.errors import check_int
from lowdim.modules.structured import RebuildableLinear

__all__ = ["InterpolativeLinear"]


class InterpolativeLinear(RebuildableLinear):
    """A linear layer whose weight is stored by an interpolative decomposition.

    Formula: `W = C [1, T] P`: `C (out, rank)` are the columns `chosen` of W, `T (rank, in − rank)` expresses the other columns
    by these, P sorts the inputs. `y = C (x[chosen] + T x[others]) + bias`. It holds `rank (out + in − rank)` numbers and `rank`
    indices: fewer than the `out · in` of the dense weight for every rank below the smaller side, where two plain factors need
    `rank (out + in)`.

    Args:
        rank: number of columns, in [1, min(in, out)].

    Raises:
        ValueError: sizes or rank out of range.

    Example:
        >>> import torch
        >>> from lowdim.modules import InterpolativeLinear
        >>> U, V = torch.randn(6, 5), torch.randn(5, 8)
        >>> layer = InterpolativeLinear.from_product(U, V)
        >>> sum(t.numel() for t in layer.state_dict().values()), 6 * 8
        (50, 48)
        >>> torch.allclose(layer.dense_weight(), U @ V, atol=1e-4)
        True

    Not for training from scratch, nor where speed counts at a low rank: against the two factors of `LowRankLinear` it saves
    `rank² − rank` numbers, and gathers its inputs twice.

    Source: Cheng, Gimbutas, Martinsson, Rokhlin, "On the compression of low rank matrices", SIAM J. Sci. Comput. 26 (2005).
    """

    chosen: Tensor

    def __init__(
        self, in_features: int, out_features: int, bias: bool = True, *, rank: int, device: Any = None, dtype: Any = None
    ):
        super().__init__()
        check_int("in_features", in_features, 1)
        check_int("out_features", out_features, 1)
        check_int("rank", rank, 1, min(in_features, out_features))
        self.in_features, self.out_features, self.rank = in_features, out_features, rank
        self.C = nn.Parameter(torch.zeros(out_features, rank, device=device, dtype=dtype))
        self.T = nn.Parameter(torch.zeros(rank, in_features - rank, device=device, dtype=dtype))
        self.bias = nn.Parameter(torch.zeros(out_features, device=device, dtype=dtype)) if bias else None
        self.register_buffer("chosen", torch.arange(rank, device=device, dtype=torch.int32))

    @classmethod
    @torch.no_grad()
    def from_product(
        cls,
        U: Tensor,  # (out, rank)
        V: Tensor,  # (rank, in)
        bias: Tensor | None = None,  # (out,)
    ) -> InterpolativeLinear:
        """The layer with weight `U V`, computed in float64; U and V need full rank."""
        wide = V.detach().double()
        chosen = _pivots(wide)
        others = _others(chosen, wide.shape[1])
        layer = cls(V.shape[1], U.shape[0], bias is not None, rank=len(V), device=U.device, dtype=U.dtype)
        layer.chosen.copy_(chosen)
        layer.C.copy_(U.detach().double() @ wide[:, chosen])
        layer.T.copy_(torch.linalg.solve(wide[:, chosen], wide[:, others]))
        if layer.bias is not None and bias is not None:
            layer.bias.copy_(bias.detach())
        return layer

    def forward(
        self,
        x: Tensor,  # (..., in_features)
    ) -> Tensor:
        """`(..., out_features)`; the dense weight is never built."""
        self.check_input(x)
        chosen = self.chosen.long()
        mixed = x.index_select(-1, chosen) + F.linear(x.index_select(-1, _others(chosen, self.in_features)), self.T)
        return F.linear(mixed, self.C, self.bias)

    def dense_weight(self) -> Tensor:
        """`C [1, T] P`, `(out, in)`."""
        chosen = self.chosen.long()
        order = torch.cat([chosen, _others(chosen, self.in_features)])
        return torch.cat([self.C, self.C @ self.T], 1).index_select(1, order.argsort())

    def products(self) -> list[tuple[int, int, int]]:
        """`T`, then `C`."""
        return [(self.T.numel(), self.in_features - self.rank, self.rank), (self.C.numel(), self.rank, self.out_features)]

    def description(self) -> dict[str, Any]:
        """Rank, and whether there is a bias."""
        return {"rank": self.rank, "bias": self.bias is not None}

    def extra_repr(self) -> str:
        """Sizes, for `print(model)`."""
        return f"{super().extra_repr()}, rank={self.rank}"


def _pivots(V: Tensor) -> Tensor:
    """Columns that span all others, sorted: each the one with the largest rest outside the span of those before."""
    rest, found = V.clone(), []
    for _ in range(len(V)):
        best = int(rest.square().sum(0).argmax())
        found.append(best)
        direction = rest[:, best] / torch.linalg.vector_norm(rest[:, best])
        rest -= torch.outer(direction, direction @ rest)
        rest[:, found] = 0.0
    return torch.tensor(sorted(found), device=V.device)


def _others(chosen: Tensor, count: int) -> Tensor:
    """The indices below `count` that were not chosen."""
    mask = torch.ones(count, dtype=torch.bool, device=chosen.device)
    mask[chosen] = False
    return torch.arange(count, device=chosen.device).masked_select(mask)
