"""Fréchet cumulative covariance: how much the mean of U changes over balls of the responses."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from lowdim.errors import check_float, warn_caller
from lowdim.linalg import as_given, as_tensor, compute_dtype
from lowdim.represent.core.distances import check_distances

__all__ = ["Columns", "FCCovLoss", "covariance_loss", "covariance_matrix", "frechet_cumulative_covariance"]

_BLOCK = 1 << 18  # entries of the distances that are sorted at once

#: Columns of the distances `(n, stop - start)`, from start and stop.
Columns = Callable[[int, int], Tensor]


def frechet_cumulative_covariance(
    U: Any,  # (n, d)
    distances: Any,  # (n, n)
    *,
    return_matrix: bool = False,
) -> Any:
    """How far the responses, known by their distances, determine the mean of U; 0 if they say nothing about it.

    Formula: `Λ_ij = (1/n) Σ_k (U_k - Ū) 1[D_ki < D_ji]`, the covariance of U with the open ball around response i that has
    response j on its edge; `M = (1/n²) Σ_ij Λ_ij Λ_ijᵀ`, and the trace of M. In `O(n² log n + n² d)`: each column of D is
    sorted once, and sums over balls are cumulative sums. Nothing of size (n, n, n) is made.

    Args:
        U: numbers of each sample, numpy or torch; differentiable if torch.
        distances: between the responses; only their order in each column counts. No gradient. May stay on the CPU
            while U is on another device.
        return_matrix: M `(d, d)` and not its trace.

    Returns:
        A scalar, or M, in float32 or better, in the kind (numpy or torch) of U. Warns where all distances are 0.

    Raises:
        ValueError: fewer than 3 samples, U not 2-D or not finite, distances of another size, or that are none
            (negative, not symmetric, not 0 on the diagonal, NaN).

    Example:
        >>> import numpy as np
        >>> from lowdim.represent import frechet_cumulative_covariance
        >>> y = np.array([0.0, 0.0, 1.0, 1.0])  # two classes
        >>> U = np.array([[-1.0, 1.0], [-1.0, -1.0], [1.0, 1.0], [1.0, -1.0]])  # the first column tells them apart
        >>> frechet_cumulative_covariance(U, abs(y[:, None] - y), return_matrix=True)
        array([[0.125, 0.   ],
               [0.   , 0.   ]])

    Small samples are biased upwards, by about `d / 6n` for whitened U: compare values at equal n.

    Source: Yuan, Wang, Yu, "Fréchet Cumulative Covariance Net for Deep Nonlinear Sufficient Dimension Reduction with Random
    Objects", arXiv 2502.15374.
    """
    numbers = U if isinstance(U, Tensor) else as_tensor(U)
    D = _checked(numbers, distances)
    M = covariance_matrix(numbers, lambda start, stop: D[:, start:stop])
    answer = M if return_matrix else M.trace()
    return answer if isinstance(U, Tensor) else as_given(answer, U)


class FCCovLoss(nn.Module):
    """What FCCov-Net minimises: directions that the responses determine, of unit covariance.

    Formula: `L(U) = -FCCov + penalty ‖Cov(U) - I‖²_F`, `Cov(U) = (1/n) (U - Ū)ᵀ (U - Ū)`.

    Args:
        penalty: λ > 0. FCCov of a direction is at most a quarter of its variance, so 0.1 already bounds the scale; 1 slows
            training.

    Shapes: U `(n, d)`, distances `(n, n)`; use batches of 64 or more.

    Returns:
        A scalar in float32 or better.

    Raises:
        ValueError: as `frechet_cumulative_covariance`.

    Example:
        >>> import torch
        >>> from lowdim.represent import FCCovLoss
        >>> y = torch.tensor([0.0, 0.0, 1.0, 1.0])
        >>> FCCovLoss()(torch.tensor([[-1.0], [-1.0], [1.0], [1.0]]), (y[:, None] - y).abs())
        tensor(-0.1250)

    Source: Yuan, Wang, Yu, arXiv 2502.15374.
    """

    def __init__(self, penalty: float = 0.1):
        super().__init__()
        check_float("penalty", penalty, 0.0, low_open=True)
        self.penalty = penalty

    def forward(
        self,
        U: Tensor,  # (n, d)
        distances: Any,  # (n, n)
    ) -> Tensor:
        """The loss of a batch."""
        return covariance_loss(U, _checked(U, distances), self.penalty)

    def extra_repr(self) -> str:
        """The penalty, for `print(loss)`."""
        return f"penalty={self.penalty}"


def _checked(numbers: Tensor, distances: Any) -> Tensor:
    if numbers.ndim != 2 or len(numbers) < 3 or not numbers.shape[1]:
        raise ValueError(f"U must be (n, d) with n >= 3 samples and d >= 1 columns; got shape {tuple(numbers.shape)}")
    if not bool(torch.isfinite(numbers).all()):
        raise ValueError("U has NaN or infinite entries")
    D = check_distances(distances)
    if len(D) != len(numbers):
        raise ValueError(f"distances must be ({len(numbers)}, {len(numbers)}), for the samples of U; got {tuple(D.shape)}")
    if not bool(D.any()):
        warn_caller("all responses are the same: the Fréchet cumulative covariance is 0 whatever U is")
    return D


def covariance_loss(U: Tensor, distances: Tensor, penalty: float) -> Tensor:
    """The loss for distances that are known to be some."""
    U = U.to(compute_dtype(U.dtype))
    centred = U - U.mean(0)
    away = centred.T @ centred / len(U) - torch.eye(U.shape[1], dtype=U.dtype, device=U.device)
    return penalty * away.square().sum() - covariance_matrix(U, lambda start, stop: distances[:, start:stop]).trace()


def covariance_matrix(
    U: Tensor,  # (n, d)
    columns: Columns,
) -> Tensor:
    """M `(d, d)`, for distances that are given a few columns at a time."""
    U = U.to(compute_dtype(U.dtype))
    return _CovarianceMatrix.apply(U - U.mean(0), columns)


class _CovarianceMatrix(torch.autograd.Function):
    """`M = Uᵀ K U / n⁴` with `K_kl = Σ_ij 1[D_ki < D_ji] 1[D_li < D_ji]`; K is never made, and K U serves the gradient too."""

    @staticmethod
    def forward(ctx: Any, centred: Tensor, columns: Columns) -> Tensor:
        product = _ball_sums(centred, columns)
        ctx.save_for_backward(centred, product)
        ctx.columns = columns
        M = centred.T @ product / len(centred)
        return (M + M.T) / 2

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        centred, product = ctx.saved_tensors
        if torch.is_grad_enabled():  # a gradient of the gradient is wanted
            product = _BallSums.apply(centred, ctx.columns)
        return product @ (grad + grad.T) / len(centred), None


class _BallSums(torch.autograd.Function):
    """`K U / n³`, its own transpose."""

    @staticmethod
    def forward(ctx: Any, centred: Tensor, columns: Columns) -> Tensor:
        ctx.columns = columns
        return _ball_sums(centred, columns)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        return _BallSums.apply(grad, ctx.columns), None


def _ball_sums(centred: Tensor, columns: Columns) -> Tensor:
    """`K U / n³`, a block of balls' centres at a time."""
    n, d = centred.shape
    product = torch.zeros_like(centred)
    width = max(1, _BLOCK // n)
    for start in range(0, n, width):
        block = columns(start, min(start + width, n)).detach().to(centred.device)
        edges, order = block.T.contiguous().sort(dim=1)  # (balls' centres, n), by distance from the centre
        inside = torch.searchsorted(edges, edges)  # members of the open ball with this edge: those before the tie
        within = torch.searchsorted(edges, edges, right=True)
        flat = order.flatten()
        for t in range(d):
            ball = _sums(centred[:, t][order]).gather(1, inside) / n  # Λ_ij, j in the order of the distances
            beyond = _sums(ball)  # of the balls with j among the first: those that hold k have their edge beyond it
            held = (beyond[:, -1:] - beyond.gather(1, within)) / n
            product[:, t].index_add_(0, flat, held.flatten())
    return product / n


def _sums(values: Tensor) -> Tensor:
    """Sums of the first 0, 1, … n entries of each row."""
    return torch.nn.functional.pad(values.cumsum(1), (1, 0))
