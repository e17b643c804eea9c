"""Fastfood: a random matrix of any height in O(L) memory, applied in O(L log L) through Hadamard transforms."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lowdim.errors import check_int

__all__ = ["FastfoodDraws", "fastfood", "fastfood_draws", "fastfood_size", "fastfood_transpose", "hadamard_transform"]

_RADIX = 6  # bits that one product with a dense Hadamard matrix transforms: 64 x 64 fits a core's first cache


@dataclass(frozen=True)
class FastfoodDraws:
    """The random numbers of one Fastfood projection of length `L`, a power of two.

    Attributes:
        signs: `B (L,)`, entries ±1 of any dtype (int8 is the smallest).
        permutation: `Π (L,)` of 0..L−1, int64 or int32.
        gaussian: `G (L,)`.

    Raises:
        ValueError: the three differ in length, or it is not a power of two.
    """

    signs: Tensor
    permutation: Tensor
    gaussian: Tensor

    def __post_init__(self) -> None:
        sizes = {tuple(t.shape) for t in (self.signs, self.permutation, self.gaussian)}
        length = self.gaussian.numel()
        if len(sizes) != 1 or self.gaussian.ndim != 1 or length < 1 or length & (length - 1):
            raise ValueError(
                f"signs, permutation and gaussian must be vectors of one length, a power of two; got {sorted(map(list, sizes))}"
            )
        if self.permutation.dtype not in (torch.int64, torch.int32):
            raise ValueError(f"permutation must be int64 or int32; got {self.permutation.dtype}")

    def __len__(self) -> int:
        return len(self.gaussian)

    @functools.cached_property
    def energy(self) -> float:
        """`ΣG²`, summed in double precision."""
        double = torch.float32 if self.gaussian.device.type == "mps" else torch.float64
        return float(torch.linalg.vector_norm(self.gaussian, dtype=double)) ** 2


def fastfood_size(
    out_dim: int,
) -> int:
    """`L = 2^⌈log₂ D⌉`, the length of the draws for a projection to `D` numbers.

    Example:
        >>> from lowdim.linalg import fastfood_size
        >>> [fastfood_size(d) for d in (1, 5, 8)]
        [1, 8, 8]
    """
    check_int("out_dim", out_dim, 1)
    return 1 << (out_dim - 1).bit_length()


def fastfood_draws(out_dim: int, generator: torch.Generator | None = None, dtype: torch.dtype = torch.float32) -> FastfoodDraws:
    """Draw signs, then the permutation, then the Gaussian numbers of a projection to `out_dim` numbers.

    They are on the generator's device (the CPU without one). Signs are int8.

    Example:
        >>> import torch
        >>> from lowdim.linalg import fastfood_draws
        >>> len(fastfood_draws(5, torch.Generator().manual_seed(0)))
        8
    """
    length = fastfood_size(out_dim)
    where: dict[str, Any] = {"generator": generator, "device": "cpu" if generator is None else generator.device}
    signs = torch.randint(0, 2, (length,), dtype=torch.int8, **where).mul_(2).sub_(1)
    permutation = torch.randperm(length, **where)
    return FastfoodDraws(signs, permutation, torch.randn(length, dtype=dtype, **where))


def fastfood(
    theta: Tensor,  # (d,), d ≤ L
    out_dim: int,
    draws: FastfoodDraws,
) -> Tensor:
    """`P θ`, `(out_dim,)`, for a random `P (out_dim, d)` with nearly orthogonal columns of unit length; differentiable.

    Formula: `P θ = (H (G ⊙ (H (B ⊙ pad θ))[Π]))[:D] / √(D ΣG²)`, `H (L, L)` the Hadamard matrix in natural order. The columns
    of the untruncated matrix have norm exactly `√(L/D)`; after keeping `D` rows the expected norm is 1.

    Computed in float32 or better; autograd keeps nothing of length `L` or `D`. `θ` has few numbers, so the first transform
    repeats with period `2^⌈log₂ d⌉`, and only one transform of length `L` is computed.

    Raises:
        ValueError: `θ` is longer than `L`, or the draws are for another size.

    Example:
        >>> import torch
        >>> from lowdim.linalg import fastfood, fastfood_draws
        >>> draws = fastfood_draws(3000, torch.Generator().manual_seed(0))
        >>> step = torch.zeros(5).index_fill(0, torch.tensor([2]), 0.1)
        >>> round(float(fastfood(step, 3000, draws).norm()), 2)
        0.1

    Source: Le, Sarlós, Smola, "Fastfood: Approximating Kernel Expansions in Loglinear Time", arXiv 1408.3060; as a projection
    of parameters Li et al., arXiv 1804.08838.
    """
    _check(draws, out_dim, theta, "theta")
    return fastfood_op(theta, draws.signs, draws.permutation, draws.gaussian, out_dim, draws.energy)


def fastfood_transpose(
    grad: Tensor,  # (out_dim,)
    in_dim: int,
    draws: FastfoodDraws,
) -> Tensor:
    """`Pᵀ g`, `(in_dim,)`: the exact transpose of `fastfood`, differentiable.

    Raises:
        ValueError: `in_dim` is larger than the draws are long, or they are for another size.

    Example:
        >>> import torch
        >>> from lowdim.linalg import fastfood, fastfood_draws, fastfood_transpose
        >>> draws = fastfood_draws(9, torch.Generator().manual_seed(0), torch.float64)
        >>> theta, g = torch.ones(4, dtype=torch.float64), torch.arange(9.0, dtype=torch.float64)
        >>> bool(torch.isclose(fastfood(theta, 9, draws) @ g, theta @ fastfood_transpose(g, 4, draws)))
        True
    """
    check_int("in_dim", in_dim, 1, len(draws))
    _check(draws, len(grad), grad, "grad")
    return _transpose(grad, draws.signs, draws.permutation, draws.gaussian, in_dim, draws.energy)


def hadamard_transform(
    x: Tensor,  # (..., L)
) -> Tensor:
    """`H x` over the last axis, unnormalized: `H_ab = (−1)^popcount(a & b)`, so `H H = L`; differentiable.

    Computed as products with small dense Hadamard matrices, which is several times faster than additions and
    subtractions by halves. Computed in float32 or better.

    Raises:
        ValueError: the last axis is not a power of two long.

    Example:
        >>> import torch
        >>> from lowdim.linalg import hadamard_transform
        >>> hadamard_transform(torch.tensor([1.0, 2.0, 0.0, 0.0]))
        tensor([ 3., -1.,  3., -1.])
    """
    length = x.shape[-1] if x.ndim else 0
    if length < 1 or length & (length - 1):
        raise ValueError(f"the last axis of x must have a power of two entries; got shape {tuple(x.shape)}")
    return _hadamard(x)


def _check(draws: FastfoodDraws, out_dim: int, vector: Tensor, name: str) -> None:
    if vector.ndim != 1 or not vector.is_floating_point():
        raise ValueError(f"{name} must be a vector of floating point numbers; got shape {tuple(vector.shape)}, {vector.dtype}")
    if not 1 <= len(vector) <= len(draws):
        raise ValueError(f"{name} must have between 1 and {len(draws)} entries, the length of the draws; got {len(vector)}")
    if fastfood_size(out_dim) != len(draws):
        raise ValueError(f"the draws for {out_dim} numbers must have length {fastfood_size(out_dim)}; got {len(draws)}")


@torch.library.custom_op("lowdim::hadamard", mutates_args=())
def _hadamard(x: Tensor) -> Tensor:
    return _walsh(x.to(_wide(x), copy=True, memory_format=torch.contiguous_format)).to(x.dtype)


@torch.library.custom_op("lowdim::fastfood", mutates_args=())
def fastfood_op(theta: Tensor, signs: Tensor, permutation: Tensor, gaussian: Tensor, out_dim: int, energy: float) -> Tensor:
    """`fastfood` without its checks, for draws that are held as separate tensors."""
    count = len(theta)
    small = fastfood_size(count)
    start = theta.new_zeros(small, dtype=_wide(theta))
    start[:count] = theta * signs[:count]
    period = _walsh(start).mul_((out_dim * energy) ** -0.5)
    # (H pad)[i] depends on i mod `small` alone, since all bits of the other rows meet zeros
    mixed = start.new_empty(len(gaussian))
    for part in _parts(gaussian):
        torch.index_select(period, 0, permutation[part] & (small - 1), out=mixed[part]).mul_(gaussian[part])
    mixed = _walsh(mixed)
    return mixed[:out_dim].to(theta.dtype, copy=True)  # a copy: the rest of the long vector is not held


@torch.library.custom_op("lowdim::fastfood_transpose", mutates_args=())
def _transpose(grad: Tensor, signs: Tensor, permutation: Tensor, gaussian: Tensor, in_dim: int, energy: float) -> Tensor:
    count, small = len(grad), fastfood_size(in_dim)
    mixed = grad.new_zeros(len(gaussian), dtype=_wide(grad))
    mixed[:count] = grad
    mixed = _walsh(mixed)
    # double: thousands of terms in each sum, in an order that a GPU does not promise
    sums = mixed.new_zeros(small, dtype=torch.float32 if grad.device.type == "mps" else torch.float64)
    for part in _parts(gaussian):
        sums.index_add_(0, permutation[part] & (small - 1), mixed[part].mul_(gaussian[part]).to(sums.dtype))
    period = _walsh(sums.mul_((count * energy) ** -0.5))
    return (period[:in_dim] * signs[:in_dim]).to(grad.dtype)


def _wide(tensor: Tensor) -> torch.dtype:
    return torch.promote_types(tensor.dtype, torch.float32)


def hadamard_flops(length: int) -> int:
    """Floating-point operations of one transform of this length, as implemented here."""
    return sum(2 * length << step for step in _steps(length))


def _steps(length: int) -> list[int]:
    """The number of index bits that each product transforms."""
    bits = length.bit_length() - 1
    passes = -(-bits // _RADIX)
    return [bits // passes + (i < bits % passes) for i in range(passes)]


def _parts(gaussian: Tensor) -> list[slice]:
    """Slices of the long vectors that are processed at once: on a CPU what a core's cache holds; elsewhere few launches."""
    size = 1 << (16 if gaussian.device.type == "cpu" else 24)
    return [slice(start, start + size) for start in range(0, len(gaussian), size)]


def _walsh(x: Tensor) -> Tensor:
    """The transform by products with dense Hadamard matrices over a few bits of the index at a time, the lowest first.

    `x` is overwritten: passes alternate between it and one other tensor, as new memory costs as much as the arithmetic.
    """
    steps, done = _steps(x.shape[-1]), 0
    spare = torch.empty_like(x) if steps else x
    with torch.autocast(x.device.type, enabled=False):
        for step in steps:
            matrix, width = _matrix(step, x.dtype, x.device), 1 << step
            if done == 0:
                torch.mm(x.view(-1, width), matrix, out=spare.view(-1, width))
            else:
                blocks = (x.numel() >> (step + done), width, 1 << done)
                torch.bmm(matrix.expand(blocks[0], width, width), x.view(blocks), out=spare.view(blocks))
            x, spare = spare, x
            done += step
    return x


@functools.cache
def _matrix(bits: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    matrix = torch.ones(1, 1, dtype=dtype, device=device)
    for _ in range(bits):
        matrix = torch.cat([torch.cat([matrix, matrix], 1), torch.cat([matrix, -matrix], 1)])
    return matrix


@_hadamard.register_fake
def _(x: Tensor) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


@fastfood_op.register_fake
def _(theta: Tensor, signs: Tensor, permutation: Tensor, gaussian: Tensor, out_dim: int, energy: float) -> Tensor:
    return theta.new_empty(out_dim)


@_transpose.register_fake
def _(grad: Tensor, signs: Tensor, permutation: Tensor, gaussian: Tensor, in_dim: int, energy: float) -> Tensor:
    return grad.new_empty(in_dim)


def _remember(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    vector, ctx.signs, ctx.permutation, ctx.gaussian, _, ctx.energy = inputs  # held by their owner anyway: nothing is saved
    ctx.length = len(vector)


def _back(op: Any) -> Any:
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return op(grad, ctx.signs, ctx.permutation, ctx.gaussian, ctx.length, ctx.energy), None, None, None, None, None

    return backward


fastfood_op.register_autograd(_back(_transpose), setup_context=_remember)
_transpose.register_autograd(_back(fastfood_op), setup_context=_remember)
_hadamard.register_autograd(lambda ctx, grad: _hadamard(grad))
