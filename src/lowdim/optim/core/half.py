"""Inner rule: AdamW with moments in bfloat16; the second is rounded stochastically, so that small terms still add up."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lowdim.linalg import has_numbers, stream_on
from lowdim.optim.core import sharded
from lowdim.optim.core.inner import AdamWRule, joined, rotated
from lowdim.optim.core.parts import Layout, Side, State
from lowdim.optim.core.pieces import pieces
from lowdim.optim.core.rounding import round_at_random

__all__ = ["AdamW16bitRule", "ShardwiseRule"]


@dataclass(frozen=True)
class AdamW16bitRule(AdamWRule):
    """AdamW whose moments live in bfloat16 between steps: half of float32's bytes.

    A second moment in bfloat16 that is rounded to the nearest stops growing as soon as `(1−β₂) g²` is below half of its last
    bit. It is therefore rounded up with probability equal to the truncated fraction, which is unbiased. The update uses the
    new float32 moments. Random bits depend on the step and the moment's shape.
    """

    elementwise = False  # the random bits are drawn for the whole tensor, not per shard

    def init(self, low: Tensor, state: State) -> None:
        """Zero moments."""
        for name, (shape, dtype) in self.layout(tuple(low.shape), low.dtype).items():
            state[name] = torch.zeros(shape, dtype=dtype, device=low.device)

    def rotate(self, state: State, R: Tensor, side: Side) -> None:
        """Through float32 and back."""
        for name in ("exp_avg", "exp_avg_sq"):
            turned = rotated(state[name].float(), R, side)
            state[name] = (turned if name == "exp_avg" else turned.abs_()).bfloat16()

    def direction(self, low: Tensor, state: State, step: int, lr: float, weight: Tensor) -> tuple[Tensor, float]:
        """`(D, η)`; D is the only full-size tensor in float32."""
        return joined(low, self.walk(low, state, step)), self.step_size(step, lr)

    def walk(self, low: Tensor, state: State, step: int) -> Iterator[tuple[slice, Tensor]]:
        """Moments are read, updated and stored piece by piece."""
        grad, m, v = low.reshape(-1), state["exp_avg"].view(-1), state["exp_avg_sq"].view(-1)
        generator = stream_on(low.device, step, "moments", *low.shape) if has_numbers(low) else None
        for here in pieces(low, 1):
            first, second = m[here].float(), v[here].float()
            yield here, self.advance(grad[here].float(), first, second, step)
            m[here] = first.bfloat16()
            v[here] = round_at_random(second, generator)

    def layout(self, low_shape: tuple[int, ...], dtype: torch.dtype) -> Layout:
        """Two moments."""
        return dict.fromkeys(("exp_avg", "exp_avg_sq"), (low_shape, torch.bfloat16))


@dataclass(frozen=True)
class ShardwiseRule(AdamW16bitRule):
    """`AdamW16bitRule` for a sharded parameter: every process draws for its own shard."""

    elementwise = True

    def init(self, low: Tensor, state: State) -> None:
        """Zero moments, sharded as the gradient."""
        for name in ("exp_avg", "exp_avg_sq"):
            state[name] = torch.zeros_like(low, dtype=torch.bfloat16)

    def direction(self, low: Any, state: State, step: int, lr: float, weight: Tensor) -> tuple[Tensor, float]:
        """`(D, η)`; D is sharded as the gradient."""
        from torch.distributed.tensor import DTensor

        piece = sharded.local(low).contiguous()
        D = joined(piece, self.walk(piece, {name: sharded.local(state[name]) for name in ("exp_avg", "exp_avg_sq")}, step))
        whole = DTensor.from_local(D, low.device_mesh, low.placements, run_check=False, shape=low.shape, stride=low.stride())
        return whole, self.step_size(step, lr)
