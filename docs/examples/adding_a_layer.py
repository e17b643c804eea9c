"""A linear layer whose weight is block-diagonal: `nblocks` small matrices, none of which sees another's inputs."""

import torch
from torch import nn

from lowdim.errors import check_int
from lowdim.linalg import draw_uniform
from lowdim.modules import StructuredLinear
from lowdim.surgery import plain_weight
from lowdim.testing.layer_case import LayerCase


class BlockDiagonal(StructuredLinear):
    """`y = diag(blocks₁, …, blocks_k) x + bias`, `blocks (nblocks, out / nblocks, in / nblocks)`.

    Args:
        nblocks: how many blocks, a divisor of both sides, >= 1.
        generator: where the start comes from.

    Source: Nesky, Stout, "Neural networks with block diagonal inner product layers", ICANN 2018.
    """

    def __init__(self, in_features, out_features, bias=True, *, nblocks, generator=None, device=None, dtype=None):
        super().__init__()
        check_int("in_features", in_features, 1)
        check_int("out_features", out_features, 1)
        check_int("nblocks", nblocks, 1)
        if in_features % nblocks or out_features % nblocks:
            raise ValueError(f"nblocks must divide both sides, {in_features} and {out_features}; got {nblocks}")
        self.in_features, self.out_features, self.nblocks = in_features, out_features, nblocks
        shape = nblocks, out_features // nblocks, in_features // nblocks
        self.blocks = nn.Parameter(torch.empty(shape, device=device, dtype=dtype))
        self.bias = nn.Parameter(torch.empty(out_features, device=device, dtype=dtype)) if bias else None
        for parameter in self.parameters():
            draw_uniform(parameter, shape[2] ** -0.5, generator)

    def forward(self, x):  # (..., in_features)
        self.check_input(x)
        rows = x.unflatten(-1, (self.nblocks, -1)).unsqueeze(-2)
        y = (rows @ self.blocks.mT).squeeze(-2).flatten(-2)
        return y if self.bias is None else y + self.bias.to(y.dtype)

    def dense_weight(self):
        return torch.block_diag(*self.blocks)

    def products(self):  # (weights, inputs, outputs) of each matrix product, from which `cost` follows
        return [(self.blocks.numel(), self.in_features, self.out_features)]

    @classmethod
    def from_linear(cls, linear, *, nblocks):
        weight = plain_weight(linear)
        if not bool(weight.isfinite().all()):
            raise ValueError("the weight has NaN or infinite entries")
        layer = cls(*weight.mT.shape, linear.bias is not None, nblocks=nblocks, device="meta", dtype=weight.dtype)
        whole = weight.unflatten(0, (nblocks, -1)).unflatten(-1, (nblocks, -1))  # (k, out / k, k, in / k)
        layer.blocks = nn.Parameter(torch.stack([whole[b, :, b] for b in range(nblocks)]))
        return layer.with_rest_of(linear)  # bias and mode


class TestBlockDiagonal(LayerCase):
    layer_class = BlockDiagonal
    how = {"nblocks": 4}  # noqa: RUF012 (typed in the base class)
    lossless = {"nblocks": 1}  # noqa: RUF012

    def dense(self, layer):
        weight = torch.zeros(self.out_features, self.in_features, dtype=layer.blocks.dtype)
        high, wide = self.out_features // 4, self.in_features // 4
        for b in range(4):
            weight[b * high : (b + 1) * high, b * wide : (b + 1) * wide] = layer.blocks[b]
        return weight


class TestBlockDiagonalTall(TestBlockDiagonal):
    in_features, out_features = 20, 12
