"""Alternating training steps of two models, so that other load on the machine affects both."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor, nn

__all__ = ["Pairs", "four_layers", "step_pairs"]

WIDTH, ROWS = 384, 512


class Pairs(list[tuple[float, float]]):
    """Seconds of a step of the first and of the second model."""

    def ratio(self) -> float:
        """Median of first / second within a pair."""
        return statistics.median(first / second for first, second in self)

    def milliseconds(self) -> tuple[float, float]:
        """The two medians."""
        return 1e3 * statistics.median(p[0] for p in self), 1e3 * statistics.median(p[1] for p in self)


def four_layers() -> tuple[nn.Sequential, Tensor, list[str]]:
    """Four linear layers 384x384 with GELU and a head, the same numbers each time; 512 rows; the four layers' names."""
    torch.manual_seed(0)
    body = [module for _ in range(4) for module in (nn.Linear(WIDTH, WIDTH), nn.GELU())]
    return nn.Sequential(*body, nn.Linear(WIDTH, 6)), torch.randn(ROWS, WIDTH), ["0", "2", "4", "6"]


def step_pairs(first: nn.Module, second: nn.Module, x: Tensor, count: int, warm: int = 3) -> Pairs:
    """Seconds of `count` pairs of steps (forward, backward, AdamW) after `warm` pairs of warm-up."""
    with torch.enable_grad():
        a, b = _stepper(first, x), _stepper(second, x)
        return Pairs([(a(), b()) for _ in range(warm + count)][warm:])


def _stepper(model: nn.Module, x: Tensor) -> Callable[[], float]:
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4)

    def step() -> float:
        start = time.perf_counter()
        optimizer.zero_grad()
        model(x).square().mean().backward()
        optimizer.step()
        return time.perf_counter() - start

    return step
