"""A network on grids as a function of vectors: for the solver, and for scipy's flexible ones."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from lowdim.errors import MissingExtraError, check_int
from lowdim.solve.core.reading import as_given, as_tensor
from lowdim.surgery import evaluating

__all__ = ["Cells", "as_model", "as_preconditioner"]


class Cells:
    """Where the unknowns of a system lie on a grid.

    Args:
        grid: sides.
        mask: `(*grid)` bool: the cells that are part of the domain; None for all.

    Attributes:
        n: unknowns of the system: cells of the domain.
    """

    def __init__(self, grid: Sequence[int], mask: Any = None):
        self.grid = tuple(grid)
        for axis, side in enumerate(self.grid):
            check_int(f"side {axis} of grid", side, 1)
        self.cells = math.prod(self.grid)
        self.inside: Tensor | None = None
        if mask is not None:
            mask = as_tensor(mask)
            if mask.dtype != torch.bool or tuple(mask.shape) != self.grid:
                raise ValueError(f"mask must be bool with the grid's shape {self.grid}; got {mask.dtype}, {tuple(mask.shape)}")
            if not bool(mask.any()):
                raise ValueError("mask must have at least one True cell")
            self.inside = mask.reshape(-1).nonzero()[:, 0].cpu()
        self.n = self.cells if self.inside is None else len(self.inside)

    def spread(
        self,
        x: Tensor,  # (batch, n) or (batch, cells)
    ) -> Tensor:
        """`(batch, 1, *grid)`, zero outside the domain."""
        if x.shape[1] not in (self.n, self.cells):
            either = f"{self.n}" if self.n == self.cells else f"{self.n} (cells of the mask) or {self.cells} (of the grid)"
            raise ValueError(f"a vector must have {either} entries; got {x.shape[1]}")
        if self.inside is not None:
            inside = self.inside.to(x.device)
            values = x if x.shape[1] == self.n else x[:, inside]
            x = x.new_zeros(len(x), self.cells).index_copy(1, inside, values)
        return x.reshape(len(x), 1, *self.grid)

    def gather(
        self,
        y: Tensor,  # (batch, 1, *grid)
        length: int,
    ) -> Tensor:
        """`(batch, n)`; or `(batch, cells)` for that length, zero outside the domain."""
        flat = y.reshape(len(y), -1)
        if self.inside is None:
            return flat
        inside = self.inside.to(flat.device)
        values = flat[:, inside]
        return values if length == self.n else flat.new_zeros(flat.shape).index_copy(1, inside, values)


class _Model:
    """See `as_model`."""

    def __init__(self, net: nn.Module, cells: Cells, dtype: torch.dtype, device: torch.device | str | None):
        self.net, self.cells, self.dtype = net, cells, dtype
        if device is not None:
            net.to(device)
        first = next(net.parameters(), None)
        if first is not None and first.dtype != dtype:
            raise ValueError(f"dtype must be that of the network's parameters, {first.dtype}; got {dtype}")
        self.device = torch.device(device or "cpu") if first is None else first.device

    def __call__(self, vector: Any) -> Any:
        given = as_tensor(vector)
        if given.ndim != 1:
            raise ValueError(f"a vector must be 1-D; got shape {tuple(given.shape)}")
        with evaluating(self.net):
            out = self.net(self.cells.spread(given[None].to(device=self.device, dtype=self.dtype)))
        if out.shape != (1, 1, *self.cells.grid):
            raise ValueError(f"the network must keep the shape (batch, 1, {self.cells.grid}); got {tuple(out.shape)}")
        flat = self.cells.gather(out, len(given))[0].to(device=given.device, dtype=torch.float64)
        return as_given(flat, vector)


def as_model(
    net: nn.Module,
    grid: Sequence[int],
    *,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str | None = None,
    mask: Any = None,  # (*grid) bool
) -> _Model:
    """A network `(batch, 1, *grid)` to the same, as a function of vectors for `solve_dcd` and `dcd`.

    Args:
        net: the network; runs in evaluation mode, without gradients, and is put back into its former mode.
        grid: sides of the grid; entries of a vector are its cells in row-major order.
        dtype: of the network's parameters, in which it runs; what goes in is rounded, what comes out is float64.
        device: where it runs; the network is moved there. None: where it is.
        mask: cells of the domain. Vectors then have an entry for each True cell, or for each cell of the grid; what comes out
            is 0 outside the domain.

    Returns:
        A callable: numpy (n,) to numpy (n,), torch to torch.

    Raises:
        ValueError: another dtype than the parameters have, a mask of another shape, a vector of another length (when called).

    Example:
        >>> import numpy as np
        >>> from lowdim.solve import DCDNet, as_model
        >>> as_model(DCDNet(dim=2, filters=2), (4, 4))(np.ones(16)).shape
        (16,)

    Source: Kaneda et al., ICML 2023, arXiv 2205.10763.
    """
    return _Model(net, Cells(grid, mask), dtype, device)


def as_preconditioner(net: nn.Module, grid: Sequence[int], **options: Any) -> Any:
    """A network as a preconditioner of scipy's flexible solver `gcrotmk`: `r -> ‖r‖ f(r / ‖r‖)`.

    Args:
        net, grid, options: as in as_model.

    Returns:
        scipy's `LinearOperator` (n, n), float64.

    Raises:
        ValueError: as as_model. MissingExtraError: scipy is not installed.

    Example:
        >>> import numpy as np
        >>> from scipy.sparse.linalg import gcrotmk
        >>> from lowdim.solve import DCDNet, as_preconditioner
        >>> A = np.diag(np.arange(1.0, 17.0))
        >>> x, info = gcrotmk(A, np.ones(16), M=as_preconditioner(DCDNet(dim=2, filters=2), (4, 4)))
        >>> info, bool(np.allclose(A @ x, 1, atol=1e-4))
        (0, True)

    **Not for** `cg`, `minres`, `gmres`: they need one fixed linear M, and the network is not linear. Use `dcd`.

    Source: Kaneda et al., ICML 2023, arXiv 2205.10763.
    """
    try:
        from scipy.sparse.linalg import LinearOperator
    except ImportError as error:
        raise MissingExtraError("scipy", "science", "as_preconditioner") from error
    model = as_model(net, grid, **options)

    def product(r: np.ndarray) -> np.ndarray:
        r = np.asarray(r, dtype=np.float64).reshape(-1)
        norm = float(np.linalg.norm(r))
        return norm * model(r / norm) if norm else np.zeros_like(r)

    how: dict[str, Any] = {"matvec": product, "dtype": np.dtype(np.float64)}
    return LinearOperator((model.cells.n, model.cells.n), **how)
