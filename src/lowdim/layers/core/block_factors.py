"""The linear layer of two block-diagonal factors, which Monarch and BlockShuffle fill in differently."""

from __future__ import annotations

import math
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lowdim.errors import check_int
from lowdim.linalg import monarch_dense, monarch_multiply, monarch_project
from lowdim.modules import StructuredLinear
from lowdim.surgery import plain_weight

__all__ = ["BlockFactors"]


class BlockFactors(StructuredLinear):
    """`y = monarch_multiply(x, blkdiag1, blkdiag2) + bias` (`lowdim.linalg`), between sides that are zero-padded where needed.

    With `p = ⌈in / nblocks⌉` and `o = ⌈out / nblocks⌉` the factors are `blkdiag1 (nblocks, min(p, o), p)` and
    `blkdiag2 (nblocks, o, min(p, o))`. They are not initialised here, the bias is 0.
    """

    def __init__(
        self, in_features: int, out_features: int, bias: bool, nblocks: int, *, device: Any, dtype: torch.dtype | None
    ):
        super().__init__()
        check_int("in_features", in_features, 1)
        check_int("out_features", out_features, 1)
        check_int("nblocks", nblocks, 1)
        self.in_features, self.out_features, self.nblocks = in_features, out_features, nblocks
        p, o = math.ceil(in_features / nblocks), math.ceil(out_features / nblocks)
        self.blkdiag1 = nn.Parameter(torch.empty(nblocks, min(p, o), p, device=device, dtype=dtype))
        self.blkdiag2 = nn.Parameter(torch.empty(nblocks, o, min(p, o), device=device, dtype=dtype))
        self.bias = nn.Parameter(torch.zeros(out_features, device=device, dtype=dtype)) if bias else None

    def forward(
        self,
        x: Tensor,  # (..., in_features)
    ) -> Tensor:
        """`(..., out_features)`; two batched products."""
        self.check_input(x)
        padding = self.blkdiag1.shape[0] * self.blkdiag1.shape[2] - self.in_features
        whole = self.bias is not None and self.blkdiag2.shape[:2].numel() == self.out_features
        bias = self.bias if whole else None
        y = monarch_multiply(F.pad(x, (0, padding)) if padding else x, self.blkdiag1, self.blkdiag2, bias)
        if y.shape[-1] > self.out_features:
            y = y[..., : self.out_features]
        return y.contiguous() if self.bias is None or whole else y + self.bias.to(y.dtype)

    def dense_weight(self) -> Tensor:
        """The exact dense equivalent `(out, in)`."""
        return monarch_dense(self.blkdiag1, self.blkdiag2)[: self.out_features, : self.in_features]

    def products(self) -> list[tuple[int, int, int]]:
        """First factor, second factor, with their padding."""
        (k, q, p), (l, s, r) = self.blkdiag1.shape, self.blkdiag2.shape
        return [(k * q * p, k * p, k * q), (l * s * r, l * r, l * s)]

    @classmethod
    def nearest(cls, linear: nn.Linear, nblocks: int) -> Self:
        """What `from_linear` returns: the projection of the zero-padded weight (`lowdim.linalg.monarch_project`)."""
        weight = plain_weight(linear)
        sizes = linear.in_features, linear.out_features, linear.bias is not None
        layer = cls(*sizes, nblocks=nblocks, device="meta", dtype=weight.dtype)
        (k, q, p), (l, s, r) = layer.blkdiag1.shape, layer.blkdiag2.shape
        padded = F.pad(weight, (0, k * p - linear.in_features, 0, l * s - linear.out_features))
        w1, w2 = monarch_project(padded, (k, q, p), (l, s, r))
        layer.blkdiag1, layer.blkdiag2 = nn.Parameter(w1), nn.Parameter(w2)
        return layer.with_rest_of(linear)

    def extra_repr(self) -> str:
        """Sizes, for `print(model)`."""
        return f"{super().extra_repr()}, nblocks={self.nblocks}"
