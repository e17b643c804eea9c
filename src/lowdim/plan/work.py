"""The arithmetic and memory traffic of a step, and its estimated time on this machine: a simple roofline model.

Each operation takes as long as its arithmetic at the speed of a large matrix product or its traffic at the speed of a large
copy, whichever is longer, and a fixed time to be launched. The three speeds are measured once, in about 0.2 s.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import flop_registry

from lowdim.linalg.fastfood import hadamard_flops

__all__ = ["Speed", "Work", "speed"]


def _attention(query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any) -> int:
    batch, heads, rows, width = query.shape
    return 2 * batch * heads * rows * key.shape[-2] * (width + value.shape[-1])


def _fastfood(vector: Tensor, signs: Tensor, permutation: Tensor, gaussian: Tensor, *args: Any, **kwargs: Any) -> int:
    return hadamard_flops(len(gaussian))  # the other transform is that of the short vector


#: Formulas that torch's own registry lacks: the CPU's fused attention, whose backward pass has five products, the forward pass
#: two.
_MORE = {
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: lambda q, k, v, *args, **kwargs: _attention(q, k, v),
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: (
        lambda grad, q, k, v, *args, **kwargs: _attention(q, k, v) * 5 // 2
    ),
    torch.ops.lowdim.fastfood: _fastfood,
    torch.ops.lowdim.fastfood_transpose: _fastfood,
}


@dataclass(frozen=True)
class Speed:
    """The speed of this machine per second: operations of a matrix product, bytes moved, and seconds per launch."""

    flops: float
    bytes: float
    launch: float


@lru_cache
def speed(dtype: torch.dtype = torch.float32, device: str = "cpu", threads: int = 0) -> Speed:
    """Measure this machine, once per dtype, device and number of threads."""
    del threads  # part of the key only
    size = 2048 if device == "cuda" else 512
    a = torch.randn(size, size, device=device).to(dtype)
    b = torch.randn(size, size, device=device).to(dtype)
    source = torch.randn(2**22, device=device)
    target, small = torch.empty_like(source), torch.ones(8, device=device)
    return Speed(
        flops=2 * size**3 / _seconds(lambda: a @ b, device, 0.08),
        bytes=2 * source.nbytes / _seconds(lambda: target.copy_(source), device, 0.05),
        launch=_seconds(lambda: small + small, device, 0.02),
    )


def _seconds(call: Any, device: str, budget: float) -> float:
    """The best time of one call: of at least three, and of as many as the budget allows."""
    best, runs, end = float("inf"), 0, time.perf_counter() + budget
    while runs < 3 or time.perf_counter() < end:
        if device == "cuda":
            torch.cuda.synchronize()
        start = time.perf_counter()
        call()
        if device == "cuda":
            torch.cuda.synchronize()
        best, runs = min(best, time.perf_counter() - start), runs + 1
    return max(best, 1e-9)  # a coarse clock may return 0


class Work:
    """Adds up floating-point operations and roofline seconds while `on`."""

    def __init__(self, speed: Speed):
        self.speed = speed
        self.flops = 0
        self.seconds = 0.0
        self.on = False

    def now(self) -> tuple[int, float]:
        """`(flops, seconds)` so far."""
        return self.flops, self.seconds

    def repeat(self, before: tuple[int, float], times: float) -> None:
        """Count what was done since `before = work.now()` as many times more."""
        self.flops += round(times * (self.flops - before[0]))
        self.seconds += times * (self.seconds - before[1])

    def count(self, func: Any, args: Any, kwargs: Any, out: Any, tensors: list[Tensor]) -> None:
        """One operation."""
        if not self.on or func.is_view or not tensors:
            return
        packet = func._overloadpacket
        formula = flop_registry.get(packet) or _MORE.get(packet)
        flops = int(formula(*args, **kwargs, out_val=out)) if formula is not None else 0
        moved = sum(t.nbytes for t in (*args, *tensors) if isinstance(t, Tensor))
        self.flops += flops
        self.seconds += self.speed.launch + max(flops / self.speed.flops, moved / self.speed.bytes)
