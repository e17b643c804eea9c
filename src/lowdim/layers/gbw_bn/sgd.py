"""Gradient steps that stay in the cone of positive definite matrices."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from lowdim.errors import check_float
from lowdim.linalg import bw_exp, widest

__all__ = ["SPDSGD"]


class SPDSGD(torch.optim.Optimizer):
    """Gradient descent for symmetric positive definite parameters, such as `bias` and `metric` of `GBWBatchNorm`.

    Formula, with the gradient `g`: `W ← exp_W( −lr · W sym(g) W )`, `sym(g) = (g + gᵀ) / 2`, the exponential of Bures and
    Wasserstein (`lowdim.linalg.bw_exp`), so `W` stays positive definite. No momentum, no weight decay. The other parameters
    need an optimizer of their own.

    Args:
        params: square parameters, or groups of them.
        lr: learning rate, > 0.

    Raises:
        ValueError: a learning rate that is not positive; in `step` a parameter that is not a square positive definite matrix,
            or a gradient that is not finite. Then no parameter has changed.

    Example:
        >>> import torch
        >>> from lowdim.layers import SPDSGD, GBWBatchNorm
        >>> norm = GBWBatchNorm(3)
        >>> optimizer = SPDSGD([norm.bias, norm.metric], lr=1e-2)
        >>> norm(2 * torch.eye(3).expand(4, 3, 3)).square().sum().backward()
        >>> optimizer.step()
        >>> bool((torch.linalg.eigvalsh(norm.bias) < 1).all())
        True

    With `GBWBatchNorm(unconstrained=True)` use any other optimizer instead.

    Source: Wang et al., "Learning to Normalize on the SPD Manifold under Bures-Wasserstein Geometry", arXiv 2504.00660.
    """

    def __init__(self, params: Any, lr: float):
        check_float("lr", lr, 0.0, low_open=True)
        super().__init__(params, {"lr": lr})

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # type: ignore[override]
        """One step of all parameters that have a gradient; returns what `closure` does."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        given = [(W, group["lr"]) for group in self.param_groups for W in group["params"] if W.grad is not None]
        moved = [(W, _moved(W, lr)) for W, lr in given]  # all are checked before one changes
        for W, value in moved:
            W.copy_(value)
        return loss


def _moved(W: torch.Tensor, lr: float) -> torch.Tensor:
    if W.ndim != 2 or W.shape[0] != W.shape[1]:
        raise ValueError(f"SPDSGD moves square matrices; got a parameter of shape {tuple(W.shape)}")
    exact, gradient = widest(W), widest(W.grad)  # type: ignore[arg-type]
    if not bool(gradient.isfinite().all()):
        raise ValueError(f"the gradient of a parameter of shape {tuple(W.shape)} has NaN or infinite entries")
    exact, gradient = (exact + exact.mT) / 2, (gradient + gradient.mT) / 2
    least = float(torch.linalg.eigvalsh(exact)[0]) if bool(exact.isfinite().all()) else float("nan")
    if not least > 0:
        raise ValueError(
            f"SPDSGD moves positive definite matrices; a parameter of shape {tuple(W.shape)} has smallest eigenvalue "
            f"{least:.3g} (a layer with unconstrained=True needs another optimizer)"
        )
    return bw_exp(exact, -lr * exact @ gradient @ exact)
