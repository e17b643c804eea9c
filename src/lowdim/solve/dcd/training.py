"""The loss of deep conjugate directions, and a network trained with it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lowdim.errors import check_float, check_int
from lowdim.linalg import as_operator, derive_seed, stream
from lowdim.solve.core.reading import stored_entries
from lowdim.solve.dcd.applied import Cells
from lowdim.solve.dcd.network import DCDNet
from lowdim.solve.dcd.ritz import dataset

__all__ = ["dcd_loss", "train_dcd"]


class _SymmetricProduct(torch.autograd.Function):
    """`A Y` for a symmetric A, whose gradient is `A G`: works for every sparse format."""

    @staticmethod
    def forward(ctx: Any, Y: Tensor, multiply: Callable[[Tensor], Tensor]) -> Tensor:
        ctx.multiply = multiply
        return multiply(Y)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return _SymmetricProduct.apply(grads[0], ctx.multiply), None  # type: ignore[return-value]


def dcd_loss(
    A: Any,  # (n, n)
    r: Tensor,  # (batch, n)
    y: Tensor,  # (batch, n)
) -> Tensor:
    """What is left of unit right-hand sides after one exact line search along the network's outputs, mean over the batch.

    Formula: `mean_i ‖r_i - c_i A y_i‖²`, `c_i = y_iᵀr_i / y_iᵀA y_i`. It does not depend on the scale of `y` and needs no
    solutions.

    Args:
        A: symmetric positive definite: a dense or sparse tensor (COO, CSR), or anything else that solve_dcd takes.
        r: right-hand sides of unit norm.
        y: outputs of the network for them.

    Returns:
        A scalar in the dtype of `y`, differentiable in `y`.

    Raises:
        ValueError: shapes that do not fit.

    Example:
        >>> import torch
        >>> from lowdim.solve import dcd_loss
        >>> A, r = torch.diag(torch.tensor([1.0, 4.0])), torch.tensor([[0.6, 0.8]])
        >>> round(float(dcd_loss(A, r, 7 * r / torch.tensor([1.0, 4.0]))), 6)  # the solution, up to a factor
        0.0

    Source: Kaneda et al., ICML 2023, arXiv 2205.10763, equation 7.
    """
    if y.ndim != 2 or r.shape != y.shape:
        raise ValueError(f"r and y must have one shape (batch, n); got {tuple(r.shape)} and {tuple(y.shape)}")
    return _loss(_multiplier(A, y), r, y)


def _loss(multiply: Callable[[Tensor], Tensor], r: Tensor, y: Tensor) -> Tensor:
    image: Tensor = _SymmetricProduct.apply(y.T, multiply).T  # type: ignore[union-attr]
    curvature = (y * image).sum(1)
    scale = (y * r).sum(1) / torch.where(curvature == 0, 1.0, curvature)  # an output of zeros leaves r as it is
    return (r - scale[:, None] * image).square().sum(1).mean()


def _multiplier(A: Any, like: Tensor) -> Callable[[Tensor], Tensor]:
    """`Y (n, batch) -> A Y` in the dtype and on the device of `like`, whose rows have n entries."""
    n = like.shape[1]
    if not isinstance(A, Tensor) and hasattr(A, "tocoo"):
        rows, columns, values, shape = stored_entries(A, "training")
        at = torch.stack([torch.as_tensor(rows, dtype=torch.int64), torch.as_tensor(columns, dtype=torch.int64)])
        A = torch.sparse_coo_tensor(at, torch.as_tensor(values), shape, check_invariants=False).coalesce()
    if not isinstance(A, Tensor):
        return as_operator(A, n).matvec
    if tuple(A.shape) != (n, n):
        raise ValueError(f"A must have shape ({n}, {n}) for vectors of {n} entries; got {tuple(A.shape)}")
    matrix = A.detach().to(device=like.device, dtype=like.dtype)
    return lambda Y: matrix @ Y


def train_dcd(
    A: Any,  # (n, n)
    grid: Sequence[int],
    *,
    net: nn.Module | None = None,
    num_ritz: int,
    num_samples: int,
    steps: int,
    batch_size: int = 10,
    lr: float = 1e-4,
    decay: float = 1.0,
    mask: Any = None,  # (*grid) bool
    seed: int = 0,
    callback: Callable[[int, float], Any] | None = None,
) -> nn.Module:
    """Train a network for `A`, and for like systems of other sizes, on `ritz_dataset` with `dcd_loss` and Adam.

    Args:
        A: symmetric positive definite, as in solve_dcd. A sparse tensor or scipy array trains fastest.
        grid: sides of the grid of the unknowns, even.
        net: trained in place, in its dtype and on its device; None: a new `DCDNet(dim=len(grid))`. The paper's 64³ model took
            `num_ritz=10000`, 20,000 samples.
        num_ritz, num_samples: of the data.
        steps: of Adam.
        batch_size, lr: of Adam. The rate falls linearly to `decay · lr` at the end.
        decay: 1 keeps the rate.
        mask: cells of the domain, as in as_model.
        seed: for data, order and the new network.
        callback: called with the step (from 1) and its loss.

    Returns:
        The network, in evaluation mode, with `net.grid = grid`. Save its `state_dict()`.

    Raises:
        ValueError: a grid that does not hold A's unknowns, an odd side, options out of range.

    Example:
        >>> import torch
        >>> from lowdim.solve import DCDNet, train_dcd
        >>> chain = 2 * torch.eye(16) - torch.diag(torch.ones(15), 1) - torch.diag(torch.ones(15), -1)
        >>> net = train_dcd(chain, (4, 4), net=DCDNet(2, filters=2), num_ritz=8, num_samples=20, steps=2)
        >>> net.grid
        (4, 4)

    Source: Kaneda et al., ICML 2023, arXiv 2205.10763.
    """
    check_int("steps", steps, 1)
    check_int("batch_size", batch_size, 1)
    check_float("lr", lr, 0.0, low_open=True)
    check_float("decay", decay, 0.0, 1.0)
    cells = Cells(grid, mask)
    size = int(A.shape[0])
    if size not in (cells.n, cells.cells):
        raise ValueError(f"grid {cells.grid} has {cells.n} unknowns, A has {size} rows")
    if net is None:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(derive_seed(seed, "network"))
            net = DCDNet(dim=len(cells.grid))
    like = next(net.parameters())
    samples = dataset(A, num_ritz, num_samples, seed=seed).to(like)
    multiply = _multiplier(A, samples)
    optimizer = torch.optim.Adam(net.parameters(), lr=lr)
    generator = stream(seed, "order")
    order = torch.empty(0, dtype=torch.int64)
    net.train()
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = lr * (1.0 - (1.0 - decay) * step / steps)
        while len(order) < batch_size:
            order = torch.cat([order, torch.randperm(len(samples), generator=generator)])
        r, order = samples[order[:batch_size].to(samples.device)], order[batch_size:]
        with torch.enable_grad():
            loss = _loss(multiply, r, cells.gather(net(cells.spread(r)), size))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if callback is not None:
            callback(step + 1, float(loss.detach()))
    net.grid = cells.grid  # type: ignore[assignment]
    return net.eval()
