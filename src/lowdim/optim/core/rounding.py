"""16-bit weights: updates are added in float32, and rounded stochastically or kept in a float32 master copy.

A bfloat16 number has 8 bits. Rounded to the nearest, an update below 1/512 of a weight is lost, in every step.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from lowdim.linalg import has_numbers
from lowdim.optim.core import sharded
from lowdim.optim.core.pieces import pieces

__all__ = ["MASTER", "is_half", "master", "round_at_random", "write_rounded"]

#: Key of a master copy in a parameter's state.
MASTER = "master"
#: Bits of a float32 mantissa that the dtype lacks, and the binary exponent of its smallest normal number.
_SHORT = {torch.bfloat16: (16, -126), torch.float16: (13, -14)}


def is_half(tensor: Tensor) -> bool:
    """Whether a tensor is bfloat16 or float16."""
    return tensor.dtype in _SHORT


def round_at_random(x: Tensor, generator: torch.Generator | None, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    """A float32 tensor of finite numbers in a 16-bit dtype, rounded stochastically without bias.

    Rounds up with probability equal to the truncated fraction: numbers of the dtype stay as they are.

    Example:
        >>> import torch
        >>> from lowdim.optim.core.rounding import round_at_random
        >>> x = torch.full((10_000,), 1.0 + 2.0**-10)  # an eighth of the way to the next bfloat16
        >>> got = round_at_random(x, torch.Generator().manual_seed(0))
        >>> sorted(set(got.tolist())), round(float(got.float().mean() - 1) * 2**10)
        ([1.0, 1.0078125], 1)
    """
    short, least = _SHORT[dtype]
    noise = torch.randint(0, 2**short, x.shape, dtype=torch.int32, device=x.device, generator=generator)
    near_zero = None
    if dtype == torch.float16:  # below its normal numbers, float16 has a fixed spacing
        spacing = 2.0 ** (least - 10)
        near_zero = (x / spacing + noise / 2**short).floor_().mul_(spacing)
    rounded = noise.add_(x.view(torch.int32)).bitwise_and_(-(2**short)).view(torch.float32)
    if near_zero is not None:
        rounded = torch.where(x.abs() < 2.0**least, near_zero, rounded)
    return rounded.to(dtype)


def write_rounded(p: Tensor, value: Tensor, generator: torch.Generator | None) -> None:
    """`p ← value`, a float32 tensor, rounded stochastically; to the nearest without a generator."""
    draws = generator if has_numbers(p) else None
    for target, source in _aligned(p, value):
        target.copy_(source if generator is None else round_at_random(source, draws, p.dtype))


def master(p: Tensor, state: dict[str, Any]) -> Tensor:
    """The float32 copy of a 16-bit parameter, kept in its state.

    Entries of the parameter that something else has changed since the last step (a proximal step, a loaded checkpoint) are
    copied from it again.
    """
    if MASTER not in state:
        state[MASTER] = p.to(torch.float32)
        return state[MASTER]
    for copy, now in _aligned(state[MASTER], p):
        copy.copy_(torch.where(copy.to(now.dtype) == now, copy, now.to(copy.dtype)))
    return state[MASTER]


def _aligned(first: Tensor, second: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """The same pieces of two tensors of one shape: of this process's shard, in slices where memory allows."""
    first, second = sharded.local(first), sharded.local(second)
    if not (first.is_contiguous() and second.is_contiguous()):
        yield first, second.contiguous()
        return
    for here in pieces(first, 1):
        yield first.view(-1)[here], second.view(-1)[here]
