"""Inner rule: AdamW with moments in bfloat16; the second is rounded stochastically, so that small terms still add up."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from lowdim.linalg import has_numbers, stream_on
from lowdim.optim.core.inner import AdamWRule, joined, pieces, rotated
from lowdim.optim.core.parts import Layout, Side, State

__all__ = ["AdamW16bitRule", "round_at_random"]


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


def round_at_random(x: Tensor, generator: torch.Generator | None) -> Tensor:
    """A float32 tensor of finite numbers as bfloat16, rounded stochastically without bias.

    Example:
        >>> import torch
        >>> from lowdim.optim.core.half import round_at_random
        >>> x = torch.full((10_000,), 1.0 + 2.0**-10)  # an eighth of the way to the next bfloat16
        >>> got = round_at_random(x, torch.Generator().manual_seed(0))
        >>> sorted(set(got.tolist())), round(float(got.float().mean() - 1) * 2**10)
        ([1.0, 1.0078125], 1)
    """
    bits = x.view(torch.int32)
    noise = torch.randint(0, 2**16, bits.shape, dtype=torch.int32, device=x.device, generator=generator)
    return noise.add_(bits).bitwise_and_(-(2**16)).view(torch.float32).bfloat16()
