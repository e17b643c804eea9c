"""A random matrix that is never stored: any row can be drawn again, in any order, on any device, with the same bits."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

__all__ = ["combine_rows", "random_rows"]

# The steps of splitmix64 (Steele, Lea, Flood 2014), which turns a counter into 64 random bits; as signed numbers.
_STRIDE = 0x9E3779B97F4A7C15 - (1 << 64)
_MIX = ((30, 0xBF58476D1CE4E5B9 - (1 << 64)), (27, 0x94D049BB133111EB - (1 << 64)), (31, 1))


def random_rows(
    seed: int,
    start: int,
    stop: int,
    size: int,
    *,
    device: Any = None,
) -> Tensor:
    """Rows `start .. stop - 1` of an endless matrix with `size` columns, entries U(−1, 1) in float32.

    Each row depends on `seed`, its number and `size` alone, because the generator is a function of a counter. It works on
    integers only, so every device gives the same bits. An entry is one of 65,536 equally spaced values.

    Example:
        >>> import torch
        >>> from lowdim.linalg import random_rows
        >>> bool(torch.equal(random_rows(7, 2, 4, 5)[1], random_rows(7, 3, 4, 5)[0]))
        True
    """
    words = -(-size // 4)  # four entries from each 64 bits; a row starts at a word
    z = torch.arange(start * words + 1, stop * words + 1, dtype=torch.int64, device=device)
    z.mul_(_STRIDE).add_(seed)
    for shift, factor in _MIX:
        # `>>` copies the sign; the mask makes it the shift of an unsigned number.
        z.bitwise_xor_((z >> shift).bitwise_and_((1 << (64 - shift)) - 1))
        if factor != 1:
            z.mul_(factor)
    numbers = z.view(torch.int16).view(stop - start, 4 * words)[:, :size]
    return numbers.to(torch.float32).add_(0.5).mul_(2.0**-15)


def combine_rows(
    coefficients: Tensor,  # (count,)
    size: int,
    *,
    seed: int = 0,
    rows: Tensor | None = None,  # (count, size)
) -> Tensor:
    """`Σ_i coefficients[i] · row_i`, `(size,)`, differentiable in the coefficients.

    The rows are those of `random_rows(seed, ...)` rounded to the dtype of the coefficients, drawn in chunks here and again in
    the backward pass; no more than one chunk is ever held, and autograd keeps nothing. With `rows` they are read from there,
    with the same bits. Sums are computed in float32 or better.

    Example:
        >>> import torch
        >>> from lowdim.linalg import combine_rows, random_rows
        >>> got = combine_rows(torch.tensor([2.0, -1.0]), 5, seed=7)
        >>> bool(torch.allclose(got, torch.tensor([2.0, -1.0]) @ random_rows(7, 0, 2, 5)))
        True
    """
    return _combine(coefficients, rows, seed, size)


@torch.library.custom_op("lowdim::combine_rows", mutates_args=())
def _combine(coefficients: Tensor, rows: Tensor | None, seed: int, size: int) -> Tensor:
    wide = torch.promote_types(coefficients.dtype, torch.float32)
    factors, total = coefficients.to(wide), coefficients.new_zeros(size, dtype=wide)
    with torch.autocast(coefficients.device.type, enabled=False):
        for span, chunk in _chunks(coefficients, rows, seed, size, len(coefficients)):
            total.addmv_(chunk.mT, factors[span])
    return total.to(coefficients.dtype)


@torch.library.custom_op("lowdim::project_on_rows", mutates_args=())
def _project(vector: Tensor, rows: Tensor | None, seed: int, count: int) -> Tensor:
    """`⟨row_i, vector⟩` for each i, `(count,)`."""
    wide = torch.promote_types(vector.dtype, torch.float32)
    out, right = vector.new_empty(count, dtype=wide), vector.to(wide)
    with torch.autocast(vector.device.type, enabled=False):
        for span, chunk in _chunks(vector, rows, seed, len(vector), count):
            torch.mv(chunk, right, out=out[span])
    return out.to(vector.dtype)


def _chunks(like: Tensor, rows: Tensor | None, seed: int, size: int, count: int) -> Iterator[tuple[slice, Tensor]]:
    # On a CPU as much as a core's cache holds; elsewhere few launches.
    step = max(1, (1 << 18 if like.device.type == "cpu" else 1 << 24) // size)
    wide = torch.promote_types(like.dtype, torch.float32)
    for start in range(0, count, step):
        stop = min(start + step, count)
        chunk = random_rows(seed, start, stop, size, device=like.device) if rows is None else rows[start:stop]
        yield slice(start, stop), chunk.to(like.dtype).to(wide)


@_combine.register_fake
def _(coefficients: Tensor, rows: Tensor | None, seed: int, size: int) -> Tensor:
    return coefficients.new_empty(size)


@_project.register_fake
def _(vector: Tensor, rows: Tensor | None, seed: int, count: int) -> Tensor:
    return vector.new_empty(count)


def _remember(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    coefficients, rows, ctx.seed, _ = inputs
    ctx.count = len(coefficients)
    ctx.save_for_backward(rows)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
    (rows,) = ctx.saved_tensors
    return _project(grad, rows, ctx.seed, ctx.count), None, None, None


_combine.register_autograd(_backward, setup_context=_remember)
