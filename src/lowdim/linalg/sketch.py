"""Random sketches: linear maps that shorten a tall matrix and approximately preserve its geometry."""

from __future__ import annotations

import torch
from torch import Tensor

from lowdim.errors import check_int

__all__ = ["CountSketch"]


class CountSketch:
    """A sketch with one ±1 in each column: `(S X)_i = Σ_{j: bucket_j = i} sign_j X_j`.

    Args:
        buckets: `(*batch, n)` integers in [0, rows): where each row of X goes.
        signs: `(*batch, n)` of ±1.
        rows: number of rows m of the sketch.

    Leading batch dimensions hold independent sketches of one size.

    Raises:
        ValueError: shapes that differ, a bucket outside [0, rows). TypeError: buckets that are not integers.

    Example:
        >>> import torch
        >>> from lowdim.linalg import CountSketch
        >>> sketch = CountSketch(torch.tensor([0, 1, 0]), torch.tensor([1.0, -1.0, 1.0]), 2)
        >>> sketch.shape, sketch.apply(torch.tensor([1.0, 2.0, 3.0])).tolist()
        ((2, 3), [4.0, -2.0])

    Costs one addition per number of X; needs more rows than a Gaussian sketch for the same distortion, and gives no entrywise
    guarantee.

    Source: Charikar, Chen, Farach-Colton, ICALP 2002; Clarkson, Woodruff, STOC 2013.
    """

    def __init__(
        self,
        buckets: Tensor,  # (*batch, n)
        signs: Tensor,  # (*batch, n)
        rows: int,
    ):
        check_int("rows", rows, 1)
        if buckets.is_floating_point() or buckets.dtype == torch.bool:
            raise TypeError(f"buckets must be integers; got {buckets.dtype}")
        if buckets.ndim < 1 or buckets.shape != signs.shape:
            raise ValueError(
                f"buckets and signs must have one shape (*batch, n); got {tuple(buckets.shape)} and {tuple(signs.shape)}"
            )
        if buckets.numel() and not (int(buckets.min()) >= 0 and int(buckets.max()) < rows):
            raise ValueError(f"buckets must be in [0, {rows}); got {int(buckets.min())} to {int(buckets.max())}")
        self.buckets, self.signs, self.rows = buckets, signs, rows

    @classmethod
    def draw(
        cls,
        rows: int,
        *size: int,  # (*batch, n)
        generator: torch.Generator | None = None,
        dtype: torch.dtype = torch.float64,
    ) -> CountSketch:
        """Uniform buckets and signs."""
        buckets = torch.randint(rows, size, generator=generator)
        signs = torch.randint(2, size, generator=generator).to(dtype).mul_(2).sub_(1)
        return cls(buckets, signs, rows)

    @property
    def shape(self) -> tuple[int, ...]:
        """`(*batch, rows, n)`."""
        return (*self.buckets.shape[:-1], self.rows, self.buckets.shape[-1])

    def apply(
        self,
        x: Tensor,  # (*batch, n) or (*batch, n, k)
    ) -> Tensor:
        """`S X`: `(*batch, rows)` or `(*batch, rows, k)` in the dtype of X; differentiable."""
        size = self.buckets.shape
        if x.shape[: len(size)] != size or x.ndim - len(size) > 1:
            raise ValueError(f"x must have shape {tuple(size)} or {tuple(size)} + (k,); got {tuple(x.shape)}")
        tail = x.shape[len(size) :]
        systems = size[:-1].numel()
        # One index_add over all batches: batch b's buckets start at row b * rows.
        offset = torch.arange(systems, device=x.device).view(*size[:-1], 1) * self.rows
        index = (self.buckets.to(x.device) + offset).reshape(-1)
        signs = self.signs.to(device=x.device, dtype=x.dtype)
        signed = (x * (signs[..., None] if tail else signs)).reshape(index.shape[0], *tail)
        out = x.new_zeros(systems * self.rows, *tail)
        return out.index_add(0, index, signed).reshape(*size[:-1], self.rows, *tail)

    def dense(self) -> Tensor:
        """The matrix `(*batch, rows, n)`."""
        out = self.signs.new_zeros(self.shape)
        return out.scatter_(-2, self.buckets[..., None, :], self.signs[..., None, :])
