"""A sketch whose signs are a hash of their column: four numbers a row are stored."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from lowdim.errors import check_int
from lowdim.linalg.sketch import ColumnSketch

__all__ = ["AMSSketch"]

_PRIME = (1 << 61) - 1
_BLOCK = 1 << 20  # signs that are made at once


class AMSSketch(ColumnSketch):
    """`S = Z / √m` with signs of a hash: `Z_ij = 1` where `(a j³ + b j² + c j + e) mod (2⁶¹ - 1)` is even, else -1.

    Args:
        coefficients: `(m, 4)` int64 in [0, 2⁶¹ - 1): `(a, b, c, e)` of each row, which makes its signs 4-wise independent.
        n: length of the vectors, at most 2³¹.

    Raises:
        ValueError: coefficients of another shape or outside the range. TypeError: not int64.

    Example:
        >>> import torch
        >>> from lowdim.linalg import AMSSketch
        >>> AMSSketch(torch.tensor([[0, 0, 1, 0]]), 4).dense()  # j mod p
        tensor([[ 1., -1.,  1., -1.]], dtype=torch.float64)

    Only the coefficients are stored: signs are made anew for each product, `2 m n` flops per column of X beside that.

    Source: Alon, Matias, Szegedy, STOC 1996.
    """

    def __init__(
        self,
        coefficients: Tensor,  # (m, 4)
        n: int,
    ):
        check_int("n", n, 1, 1 << 31)
        if coefficients.dtype != torch.int64:
            raise TypeError(f"coefficients must be int64; got {coefficients.dtype}")
        if coefficients.ndim != 2 or coefficients.shape[1] != 4 or not len(coefficients):
            raise ValueError(f"coefficients must have shape (m, 4); got {tuple(coefficients.shape)}")
        if not (int(coefficients.min()) >= 0 and int(coefficients.max()) < _PRIME):
            raise ValueError(
                f"coefficients must be in [0, {_PRIME}); got {int(coefficients.min())} to {int(coefficients.max())}"
            )
        self.coefficients, self.n = coefficients, n
        self._shape = len(coefficients), n

    @classmethod
    def draw(
        cls, rows: int, n: int, *, generator: torch.Generator | None = None, dtype: torch.dtype = torch.float64
    ) -> AMSSketch:
        """Uniform coefficients; `dtype` has no effect: signs take that of X."""
        check_int("rows", rows, 1)
        return cls(torch.randint(_PRIME, (rows, 4), generator=generator), n)

    def _forth(self, x: Tensor) -> Tensor:
        out = x.new_zeros(self.shape[0], x.shape[1])
        for start, stop in self._blocks():
            out = out + self._signs(start, stop).to(x) @ x[start:stop]
        return out / math.sqrt(self.shape[0])

    def _back(self, y: Tensor) -> Tensor:
        parts = [self._signs(start, stop).to(y).T @ y for start, stop in self._blocks()]
        return torch.cat(parts) / math.sqrt(self.shape[0])

    @property
    def _device(self) -> torch.device:
        return self.coefficients.device

    def _blocks(self) -> list[tuple[int, int]]:
        width = max(1, _BLOCK // len(self.coefficients))
        return [(start, min(start + width, self.n)) for start in range(0, self.n, width)]

    def _signs(self, start: int, stop: int) -> Tensor:
        """Columns `start` to `stop` of Z as int8, by Horner's rule modulo the prime."""
        j = torch.arange(start, stop, device=self.coefficients.device)
        a, b, c, e = self.coefficients.T[:, :, None]
        value = a.expand(-1, len(j))
        for constant in (b, c, e):
            value = _reduced(_times(value, j) + constant)
        return (1 - 2 * (value & 1)).to(torch.int8)


def _times(value: Tensor, j: Tensor) -> Tensor:
    """`value · j` modulo the prime, up to one multiple: value < 2⁶¹, j < 2³¹, and no product exceeds 63 bits."""
    high, low = value >> 31, value & ((1 << 31) - 1)
    top = high * j  # stands for top · 2³¹; and 2⁶¹ = 1
    return _reduced(low * j) + (top >> 30) + ((top & ((1 << 30) - 1)) << 31)


def _reduced(value: Tensor) -> Tensor:
    """Modulo the prime, for values below 2⁶³."""
    value = (value & _PRIME) + (value >> 61)
    return torch.where(value >= _PRIME, value - _PRIME, value)
