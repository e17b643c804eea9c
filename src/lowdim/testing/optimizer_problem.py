"""A small regression network for testing optimizers, and comparisons of two runs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from lowdim.linalg import stream

__all__ = ["OptimizerProblem"]


class OptimizerProblem:
    """Three layers that learn a linear map of low rank, from the same numbers in each run.

    Example:
        >>> from lowdim.optim import GaLore
        >>> from lowdim.testing.optimizer_problem import OptimizerProblem
        >>> problem = OptimizerProblem()
        >>> net = problem.model()
        >>> losses = problem.run(net, GaLore(problem.groups(net), lr=0.1, rank=3), range(60))
        >>> losses[-1] < 0.5 * losses[0]
        True
    """

    def model(self, dtype: torch.dtype = torch.float32) -> nn.Sequential:
        """A tall, a square and a wide matrix."""
        draw = stream(0, "case", "model")
        net = nn.Sequential(nn.Linear(6, 16), nn.Tanh(), nn.Linear(16, 16), nn.Tanh(), nn.Linear(16, 5))
        with torch.no_grad():
            for p in net.parameters():
                p.copy_(torch.randn(p.shape, generator=draw) / p.shape[-1] ** 0.5)
        return net.to(dtype)

    def groups(self, net: nn.Module) -> list[dict[str, Any]]:
        """Matrices projected, vectors not."""
        matrices = [p for p in net.parameters() if p.ndim == 2]
        return [{"params": matrices}, {"params": [p for p in net.parameters() if p.ndim != 2], "rank": None}]

    def batch(self, index: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
        """Inputs and targets of a linear map of low rank."""
        draw = stream(0, "case", "map")
        target = torch.randn(6, 2, generator=draw) @ torch.randn(2, 5, generator=draw)
        x = torch.randn(32, 6, generator=stream(0, "case", "batch", index))
        return x.to(dtype), (x @ target / 3).to(dtype)

    def loss(self, net: nn.Module, index: int, dtype: torch.dtype = torch.float32) -> Tensor:
        """Mean squared error on one batch."""
        x, y = self.batch(index, dtype)
        return (net(x) - y).square().mean()

    def run(
        self,
        net: nn.Module,
        optimizer: torch.optim.Optimizer,
        steps: range,
        dtype: torch.dtype = torch.float32,
        each: Callable[[], None] | None = None,
    ) -> list[float]:
        """Train; the losses."""
        losses = []
        for index in steps:
            value = self.loss(net, index, dtype)
            value.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(float(value.detach()))
            if each is not None:
                each()
        return losses

    def weights(self, net: nn.Module) -> list[Tensor]:
        """Copies."""
        return [p.detach().clone() for p in net.parameters()]

    def same(self, left: list[Tensor], right: list[Tensor]) -> None:
        """Equal to the last bit."""
        for a, b in zip(left, right, strict=True):
            assert torch.equal(a, b), f"largest difference {float((a - b).abs().max()):.3g}"

    def close(self, left: list[Tensor], right: list[Tensor], tolerance: float) -> None:
        """Equal up to rounding."""
        for a, b in zip(left, right, strict=True):
            error = float((a - b).norm() / b.norm().clamp_min(1e-30))
            assert error <= tolerance, f"relative difference {error:.3g} > {tolerance:.3g}"
