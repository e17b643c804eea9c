"""Random sketches: linear maps that shorten a tall matrix and approximately preserve its geometry."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lowdim.errors import MissingExtraError, check_int

__all__ = ["ColumnSketch", "CountSketch", "Sketch"]


class Sketch(ABC):
    """A linear map `S (m, n)` that is known by its products."""

    @property
    @abstractmethod
    def shape(self) -> tuple[int, ...]:
        """`(m, n)`."""

    @abstractmethod
    def apply(
        self,
        x: Tensor,  # (n,) or (n, k)
    ) -> Tensor:
        """`S X` in the dtype and on the device of X; differentiable."""

    @abstractmethod
    def apply_transposed(
        self,
        y: Tensor,  # (m,) or (m, k)
    ) -> Tensor:
        """`Sᵀ Y` in the dtype and on the device of Y."""

    def as_linear_operator(self) -> Any:
        """As scipy's `LinearOperator` in float64: `S @ A`, `S.T @ y`.

        Raises:
            ValueError: a sketch with batch dimensions. MissingExtraError: scipy is not installed.
        """
        try:
            from scipy.sparse.linalg import LinearOperator
        except ImportError as error:
            raise MissingExtraError("scipy", "science", "as_linear_operator") from error
        if len(self.shape) != 2:
            raise ValueError(f"a linear operator has no batch dimensions; this sketch has the shape {self.shape}")

        def of(product: Any) -> Any:
            return lambda x: product(torch.from_numpy(np.array(x, dtype=np.float64))).numpy()

        forth, back = of(self.apply), of(self.apply_transposed)
        how: dict[str, Any] = {"matmat": forth, "rmatmat": back, "dtype": np.dtype(np.float64)}
        how |= {"matvec": lambda x: forth(x.ravel()), "rmatvec": lambda y: back(y.ravel())}
        return LinearOperator(self.shape, **how)


class ColumnSketch(Sketch):
    """A sketch that is defined by its products with columns."""

    _shape: tuple[int, int]

    @property
    def shape(self) -> tuple[int, int]:
        """`(m, n)`."""
        return self._shape

    def apply(
        self,
        x: Tensor,  # (n,) or (n, k)
    ) -> Tensor:
        """`S X` in the dtype and on the device of X; differentiable."""
        return self._over("x", x, self.shape[1], self._forth)

    def apply_transposed(
        self,
        y: Tensor,  # (m,) or (m, k)
    ) -> Tensor:
        """`Sᵀ Y` in the dtype and on the device of Y."""
        return self._over("y", y, self.shape[0], self._back)

    @abstractmethod
    def _forth(self, x: Tensor) -> Tensor: ...

    @abstractmethod
    def _back(self, y: Tensor) -> Tensor: ...

    def dense(self) -> Tensor:
        """The matrix `(m, n)` in float64."""
        return self.apply(torch.eye(self.shape[1], dtype=torch.float64, device=self._device))

    @property
    @abstractmethod
    def _device(self) -> torch.device: ...

    @staticmethod
    def _over(name: str, x: Tensor, n: int, product: Callable[[Tensor], Tensor]) -> Tensor:
        if x.ndim not in (1, 2) or len(x) != n:
            raise ValueError(f"{name} must have shape ({n},) or ({n}, k); got {tuple(x.shape)}")
        return product(x) if x.ndim == 2 else product(x[:, None])[:, 0]


class CountSketch(Sketch):
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

    def apply_transposed(
        self,
        y: Tensor,  # (*batch, rows) or (*batch, rows, k)
    ) -> Tensor:
        """`Sᵀ Y`: `(*batch, n)` or `(*batch, n, k)`."""
        batch, n = self.buckets.shape[:-1], self.buckets.shape[-1]
        size = (*batch, self.rows)
        if y.shape[: len(size)] != size or y.ndim - len(size) > 1:
            raise ValueError(f"y must have shape {tuple(size)} or {tuple(size)} + (k,); got {tuple(y.shape)}")
        columns = y if y.ndim > len(size) else y[..., None]
        index = self.buckets.to(y.device)[..., None].expand(*batch, n, columns.shape[-1])
        out = columns.gather(-2, index) * self.signs.to(y)[..., None]
        return out if y.ndim > len(size) else out[..., 0]

    def dense(self) -> Tensor:
        """The matrix `(*batch, rows, n)`."""
        out = self.signs.new_zeros(self.shape)
        return out.scatter_(-2, self.buckets[..., None, :], self.signs[..., None, :])
