"""The network of deep conjugate directions: two resolutions of residual convolutions."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lowdim.errors import check_int

__all__ = ["DCDNet"]


class DCDNet(nn.Module):
    """Convolutions at two resolutions that approximate the inverse of a discretised operator up to a factor.

    Formula: `h = relu(pre(first(x)))`; blocks `h ← relu(b(relu(a(h)))) + h`, `fine_blocks` times; `s = relu(post(h))`;
    `g = avgpool₂(s)` with `coarse_blocks` blocks; `u = upsample₂(g) + s` with `up_blocks` blocks; output `last(u)`, linear over
    channels. Kernels are 3 wide with zero padding; there is no normalisation and no dropout.

    Args:
        dim: 2 or 3, dimensions of the grid.
        filters: channels.
        fine_blocks, coarse_blocks, up_blocks: residual blocks at each stage; the authors' models have 1, 3, 2 for 64³ cells and
            2, 5, 3 for 128³.

    Attributes:
        grid: sides of the grid of training; None before.

    Shape: `(batch, 1, *grid)` to the same. Sides must be even.

    Raises:
        ValueError: dim not 2 or 3, an input of another shape, an odd side.

    Example:
        >>> import torch
        >>> from lowdim.solve import DCDNet
        >>> DCDNet(dim=2, filters=4)(torch.zeros(3, 1, 8, 6)).shape
        torch.Size([3, 1, 8, 6])

    Source: Kaneda et al., ICML 2023, arXiv 2205.10763.
    """

    def __init__(self, dim: int = 3, filters: int = 16, fine_blocks: int = 1, coarse_blocks: int = 3, up_blocks: int = 2):
        super().__init__()
        check_int("dim", dim, 2, 3)
        check_int("filters", filters, 1)
        for name, count in (("fine_blocks", fine_blocks), ("coarse_blocks", coarse_blocks), ("up_blocks", up_blocks)):
            check_int(name, count, 0)
        self.dim = dim
        self.grid: tuple[int, ...] | None = None
        kind = nn.Conv2d if dim == 2 else nn.Conv3d

        def conv(channels: int = filters) -> nn.Module:
            return kind(channels, filters, 3, padding=1)

        def blocks(count: int) -> nn.ModuleList:
            return nn.ModuleList(nn.ModuleList([conv(), conv()]) for _ in range(count))

        self.first, self.pre, self.fine, self.post = conv(1), conv(), blocks(fine_blocks), conv()
        self.coarse, self.up = blocks(coarse_blocks), blocks(up_blocks)
        self.last = nn.Linear(filters, 1)

    def forward(
        self,
        x: Tensor,  # (batch, 1, *grid)
    ) -> Tensor:
        """Search directions, up to a factor, for unit residuals."""
        if x.ndim != self.dim + 2 or x.shape[1] != 1:
            raise ValueError(f"x must have shape (batch, 1) and {self.dim} sides of the grid; got {tuple(x.shape)}")
        for axis, side in enumerate(x.shape[2:]):
            if side % 2 or not side:
                raise ValueError(f"sides of the grid must be even; side {axis} is {side}")
        h = _through(self.fine, torch.relu(self.pre(self.first(x))))
        skip = torch.relu(self.post(h))
        pooled = F.avg_pool2d(skip, 2) if self.dim == 2 else F.avg_pool3d(skip, 2)
        u = F.interpolate(_through(self.coarse, pooled), scale_factor=2, mode="nearest") + skip
        return self.last(_through(self.up, u).movedim(1, -1)).movedim(-1, 1)


def _through(blocks: nn.ModuleList, h: Tensor) -> Tensor:
    for block in blocks:
        a, b = block  # type: ignore[misc]
        h = torch.relu(b(torch.relu(a(h)))) + h
    return h
