"""Updates that read the input through one thin factor: `y + up · inner(down x)`."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lowdim.adapters.core.convolution import convolve_thin
from lowdim.adapters.core.update import WeightUpdate
from lowdim.linalg import add_product, wide

__all__ = ["ThinUpdate"]

#: Entries of a block of rows: what a product and its sum work on stays in the cache of one core.
_BLOCK = 2**17


class ThinUpdate(WeightUpdate):
    """`ΔW + start = scaling · up · inner · down` with `down (k, in)`, `up (out, k)` and a small linear map between them.

    A subclass defines its two factors and its inner map; products, dense equivalent, base residual and exact low-rank factors
    are implemented here. If `down` is frozen, autograd keeps `down x (..., k)`, not `x`.
    """

    def __init__(self, out_features: int, in_features: int, rank: int, scaling: float = 1.0):
        super().__init__(out_features, in_features)
        self.rank, self.scaling = rank, scaling

    def down(self) -> Tensor:
        """The factor on the input's side, `(k, in)`."""
        raise NotImplementedError(f"{type(self).__name__} must define down()")

    def up(self) -> Tensor:
        """The factor on the output's side, `(out, k)`."""
        raise NotImplementedError(f"{type(self).__name__} must define up()")

    def inner(
        self,
        hidden: Tensor,  # (..., k)
    ) -> Tensor:
        """The linear map between the factors; the identity unless overridden."""
        return hidden

    def start_up(self) -> Tensor | None:
        """The factor on the output's side of `start()`, `(out, k)`; None if the base is the weight itself."""
        return None

    def forward(self, x: Tensor) -> Tensor:
        """`scaling · up · inner(down x)`."""
        return self.expand(F.linear(x, self.down()))

    def expand(
        self,
        hidden: Tensor,  # (..., k) = down x
    ) -> Tensor:
        """The rest of `forward` after the first factor."""
        inner = self.inner(hidden)
        return F.linear(inner if self.scaling == 1.0 else inner * self.scaling, self.up())

    def add_to(self, y: Tensor, x: Tensor, *, inplace: bool = False) -> Tensor:
        """Fused: one multiply-add onto the base's output."""
        return add_product(y, self.inner(F.linear(x, self.down())), self.up(), self.scaling, inplace=inplace)

    def convolve(self, x: Tensor, conv: nn.Conv2d) -> Tensor:
        """A convolution with `k` channels, then the rest at each place."""
        return self.expand(convolve_thin(x, self.down(), conv)).movedim(-1, -3)

    def dense(self) -> Tensor:
        """`scaling · up · inner · down`, `(out, in)`."""
        return self.scaling * (self.up() @ self.inner(self.down().mT).mT)

    @torch.no_grad()
    def exact_rows(self, weight: Tensor) -> Iterator[tuple[slice, Tensor]] | None:
        """In float32, where neither `dense` nor `exact` are a subclass's own."""
        own = type(self)
        if own.dense is not ThinUpdate.dense or own.exact is not WeightUpdate.exact:
            return None
        if any(p.is_floating_point() and p.dtype.itemsize < 4 for p in self.parameters()):
            return copy.deepcopy(self).float().exact_rows(weight)
        up, rest = self.up(), self.inner(self.down().mT).mT
        if not up.dtype == rest.dtype == weight.dtype == torch.float32:
            return None
        return _sums(weight, up, rest, self.scaling)

    def rebase(self, weight: Tensor) -> Tensor | None:
        """`weight − start()`, from the factors as they are stored, so that the start is exact to rounding."""
        up = self.start_up()
        return None if up is None else wide(weight) - wide(up) @ wide(self.down())

    def start(self) -> Tensor | None:
        """`start_up · down`, in float32 or better."""
        up = self.start_up()
        return None if up is None else wide(up) @ wide(self.down())

    def start_forward(self, x: Tensor) -> Tensor:
        """`start_up (down x)`, never the matrix."""
        up = self.start_up()
        assert up is not None
        return F.linear(F.linear(x, self.down()), up.to(x.dtype))

    @torch.no_grad()
    def low_rank_delta(self) -> tuple[Tensor, Tensor]:
        """`down` and `scaling · up · inner − start_up`, in float32 or better."""
        down, up, before = wide(self.down().detach()), wide(self.up().detach()), self.start_up()
        eye = torch.eye(down.shape[0], dtype=self.down().dtype, device=down.device)
        after = self.scaling * (up @ wide(self.inner(eye)).mT)
        return down, after if before is None else after - wide(before)


@torch.no_grad()
def _sums(weight: Tensor, up: Tensor, rest: Tensor, scaling: float) -> Iterator[tuple[slice, Tensor]]:
    """`weight + scaling · up · rest` by blocks of rows, none of a few rows only: BLAS adds up those in another order."""
    rows, columns = weight.shape
    count = max(1, rows // max(16, _BLOCK // max(1, columns)))
    bounds = [rows * i // count for i in range(count + 1)]
    space = weight.new_empty(-(-rows // count), columns)
    for start, stop in itertools.pairwise(bounds):
        part = space[: stop - start]
        torch.mm(up[start:stop], rest, out=part)
        yield slice(start, stop), part.mul_(scaling).add_(weight[start:stop])
