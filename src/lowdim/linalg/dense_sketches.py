"""Dense random sketches: randomised Hadamard transforms and Gaussian matrices; and all sketches by name."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from lowdim.errors import check_choice, check_int
from lowdim.linalg.ams_sketch import AMSSketch
from lowdim.linalg.fastfood import hadamard_transform
from lowdim.linalg.random import stream
from lowdim.linalg.sketch import ColumnSketch, CountSketch

__all__ = ["SKETCHES", "SRHT", "GaussianSketch", "PooledGaussian", "make_sketch"]


class SRHT(ColumnSketch):
    """Rows of a Hadamard matrix with random signs: `S = H[rows, :n] diag(signs) / √m`, `H_ij = (-1)^popcount(i & j)`.

    Args:
        signs: `(n,)` of ±1.
        rows: `(m,)` distinct integers in [0, N), N the power of two >= n.
        n: length of the vectors, if it is to be checked.

    Raises:
        ValueError: rows outside [0, N) or twice, signs that are not ±1, another n. TypeError: rows that are not integers.

    Example:
        >>> import torch
        >>> from lowdim.linalg import SRHT
        >>> SRHT(torch.tensor([1.0, -1.0, 1.0]), torch.tensor([0, 1])).dense() * 2**0.5
        tensor([[ 1., -1.,  1.],
                [ 1.,  1.,  1.]], dtype=torch.float64)

    Costs `N log₂ N` additions per column of X, whatever m.

    Source: Ailon, Chazelle, STOC 2006; Tropp, Adv. Adapt. Data Anal. 2011.
    """

    def __init__(
        self,
        signs: Tensor,  # (n,)
        rows: Tensor,  # (m,)
        n: int | None = None,
    ):
        self.signs, self.length = _signs(signs), _power_of_two(len(signs))
        if n is not None and n != len(signs):
            raise ValueError(f"signs must have n={n} entries; got {len(signs)}")
        self.rows = _integers("rows", rows, self.length)
        if len(torch.unique(self.rows)) != len(self.rows):
            raise ValueError("rows must be distinct: two equal ones waste one")
        self._shape = len(self.rows), len(signs)

    @classmethod
    def draw(cls, rows: int, n: int, *, generator: torch.Generator | None = None, dtype: torch.dtype = torch.float64) -> SRHT:
        """Uniform signs, and rows without replacement."""
        check_int("n", n, 1)
        check_int("rows", rows, 1, _power_of_two(n))
        signs = _draw_signs(n, generator, dtype)
        return cls(signs, torch.randperm(_power_of_two(n), generator=generator)[:rows])

    def _forth(self, x: Tensor) -> Tensor:
        mixed = _transform(x, self.signs, self.length)[:, self.rows.to(x.device)]
        return mixed.T / math.sqrt(self.shape[0])

    def _back(self, y: Tensor) -> Tensor:
        spread = y.new_zeros(y.shape[1], self.length).index_copy(1, self.rows.to(y.device), y.T.contiguous())
        mixed = hadamard_transform(spread)[:, : self.shape[1]].T * self.signs.to(y)[:, None]
        return mixed / math.sqrt(self.shape[0])

    @property
    def _device(self) -> torch.device:
        return self.signs.device


class PooledGaussian(ColumnSketch):
    """Sums of Gaussian multiples of a randomised Hadamard transform, over blocks.

    Formula: `z = H / √N · pad(signs · x)`, `(S x)_i = Σ_{j in block i} g_j z_{π_j}`.

    Args:
        signs: `(n,)` of ±1.
        permutation: `π (N,)`. gaussians: `g (N,)`. N is a power of two, at least n.
        rows: m, which divides N: the length of a block is N / m.

    Raises:
        ValueError: lengths that do not fit, an N that is no power of two or that m does not divide, no permutation.
        TypeError: a permutation that is not of integers.

    Example:
        >>> import torch
        >>> from lowdim.linalg import PooledGaussian
        >>> sketch = PooledGaussian(torch.ones(3), torch.arange(4), torch.tensor([1.0, 2.0, 3.0, 4.0]), 2)
        >>> sketch.apply(torch.tensor([2.0, 0.0, 0.0]))  # z = (1, 1, 1, 1)
        tensor([3., 7.])

    Costs `N log₂ N` additions per column of X, with N at least 4 m when it is drawn.

    Source: the balanced Gaussian-pooled transform that repairs the proof of Song, Ye, Yin, Zhang, ICML 2023, arXiv 2302.00248.
    """

    def __init__(
        self,
        signs: Tensor,  # (n,)
        permutation: Tensor,  # (N,)
        gaussians: Tensor,  # (N,)
        rows: int,
    ):
        check_int("rows", rows, 1)
        length = len(gaussians)
        if length & (length - 1) or length < len(signs) or length % rows:
            raise ValueError(
                f"gaussians must have a power of two of entries, at least {len(signs)} and a multiple of rows={rows}; "
                f"got {length}"
            )
        self.signs, self.gaussians, self.length, self.rows = _signs(signs), gaussians, length, rows
        self.permutation = _integers("permutation", permutation, length)
        if not torch.equal(self.permutation.sort().values, torch.arange(length, device=self.permutation.device)):
            raise ValueError(f"permutation must hold each of 0 to {length - 1} once")
        self._shape = rows, len(signs)

    @classmethod
    def draw(
        cls, rows: int, n: int, *, generator: torch.Generator | None = None, dtype: torch.dtype = torch.float64
    ) -> PooledGaussian:
        """All at random, with `N = max(n, 4 rows)` rounded up to a power of two; `rows` must be one."""
        check_int("n", n, 1)
        check_int("rows", rows, 1)
        if rows & (rows - 1):
            raise ValueError(f"rows must be a power of two for this sketch; got {rows}")
        length = _power_of_two(max(n, 4 * rows))
        signs = _draw_signs(n, generator, dtype)
        permutation = torch.randperm(length, generator=generator)
        return cls(signs, permutation, torch.randn(length, generator=generator, dtype=dtype), rows)

    def _forth(self, x: Tensor) -> Tensor:
        mixed = _transform(x, self.signs, self.length)[:, self.permutation.to(x.device)]
        pooled = (mixed * self.gaussians.to(x)).view(len(mixed), self.rows, self.length // self.rows).sum(-1)
        return pooled.T / math.sqrt(self.length)

    def _back(self, y: Tensor) -> Tensor:
        repeated = y.T.repeat_interleave(self.length // self.rows, dim=1) * self.gaussians.to(y)
        spread = torch.empty_like(repeated).index_copy(1, self.permutation.to(y.device), repeated)
        mixed = hadamard_transform(spread)[:, : self.shape[1]].T * self.signs.to(y)[:, None]
        return mixed / math.sqrt(self.length)

    @property
    def _device(self) -> torch.device:
        return self.signs.device


class GaussianSketch(ColumnSketch):
    """`S = G / √m` with independent normal entries.

    Args:
        matrix: `G (m, n)`.

    Raises:
        ValueError: not a matrix.

    Example:
        >>> import torch
        >>> from lowdim.linalg import GaussianSketch
        >>> GaussianSketch(2 * torch.eye(4)).apply(torch.ones(4))
        tensor([1., 1., 1., 1.])

    Costs `2 m n` flops per column of X and the memory of G.

    Source: Indyk, Motwani, STOC 1998.
    """

    def __init__(
        self,
        matrix: Tensor,  # (m, n)
    ):
        if matrix.ndim != 2 or not matrix.is_floating_point():
            raise ValueError(f"matrix must be 2-D and of floating point numbers; got {tuple(matrix.shape)}, {matrix.dtype}")
        self.matrix = matrix
        self._shape = matrix.shape[0], matrix.shape[1]

    @classmethod
    def draw(
        cls, rows: int, n: int, *, generator: torch.Generator | None = None, dtype: torch.dtype = torch.float64
    ) -> GaussianSketch:
        """Standard normal entries."""
        check_int("n", n, 1)
        check_int("rows", rows, 1)
        return cls(torch.randn(rows, n, generator=generator, dtype=dtype))

    def _forth(self, x: Tensor) -> Tensor:
        return (self.matrix.to(x) @ x) / math.sqrt(self.shape[0])

    def _back(self, y: Tensor) -> Tensor:
        return (self.matrix.to(y).T @ y) / math.sqrt(self.shape[0])

    @property
    def _device(self) -> torch.device:
        return self.matrix.device


#: The names that `make_sketch` takes.
SKETCHES: dict[str, Any] = {
    "srht": SRHT,
    "gaussian": GaussianSketch,
    "ams": AMSSketch,
    "pooled": PooledGaussian,
    "count": CountSketch,
}


def make_sketch(kind: str, rows: int, n: int, *, seed: int = 0) -> Any:
    """A random sketch `(rows, n)` by its name.

    Args:
        kind: `"srht"`, `"gaussian"`, `"ams"`, `"pooled"` or `"count"`.
        rows: m; for `"pooled"` rounded up to a power of two.
        n: length of the vectors.
        seed: of a stream of its own: data made with the same number do not share it.

    Raises:
        ValueError: an unknown kind, `rows` or `n` out of range.

    Example:
        >>> from lowdim.linalg import make_sketch
        >>> make_sketch("pooled", 5, 20).shape
        (8, 20)
    """
    check_choice("kind", kind, SKETCHES)
    check_int("rows", rows, 1)
    check_int("seed", seed, 0)
    rows = _power_of_two(rows) if kind == "pooled" else rows
    return SKETCHES[kind].draw(rows, n, generator=stream(seed, "sketch"))


def _transform(columns: Tensor, signs: Tensor, length: int) -> Tensor:
    """`H pad(signs · x)` of each column, as rows `(k, N)`."""
    signed = (columns * signs.to(columns)[:, None]).T
    return hadamard_transform(torch.nn.functional.pad(signed, (0, length - signed.shape[1])))


def _signs(signs: Tensor) -> Tensor:
    if signs.ndim != 1 or not len(signs) or not bool((signs.abs() == 1).all()):
        raise ValueError(f"signs must be a vector of ±1; got shape {tuple(signs.shape)}")
    return signs


def _draw_signs(n: int, generator: torch.Generator | None, dtype: torch.dtype) -> Tensor:
    return torch.randint(2, (n,), generator=generator).to(dtype).mul_(2).sub_(1)


def _integers(name: str, index: Tensor, size: int) -> Tensor:
    if index.is_floating_point() or index.dtype == torch.bool:
        raise TypeError(f"{name} must be integers; got {index.dtype}")
    if index.ndim != 1 or not len(index) or int(index.min()) < 0 or int(index.max()) >= size:
        found = f"{int(index.min())} to {int(index.max())}" if index.numel() else "none"
        raise ValueError(f"{name} must be a vector of integers in [0, {size}); got shape {tuple(index.shape)}, {found}")
    return index.to(torch.int64)


def _power_of_two(n: int) -> int:
    return 1 << (n - 1).bit_length()
