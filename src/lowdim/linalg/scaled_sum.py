"""A sum of large tensors with trained coefficients; autograd neither keeps nor copies the tensors."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

__all__ = ["scaled_sum"]


def scaled_sum(
    coefficients: Tensor,  # (n,), or (n, K) with `classes`
    tensors: Sequence[Tensor],  # n of one shape
    classes: Tensor | None = None,  # of that shape, entries in [0, K)
) -> Tensor:
    """`Σ_i c_i T_i`, or entry by entry `Σ_i c_{i, m[a]} T_i[a]` with classes `m`; differentiable in the coefficients.

    The tensors may be on another device than the coefficients (a CPU, a mapped file): they are moved one at a time. The sum
    is computed in float32, or float64 where the coefficients are, and returned in that dtype on the coefficients' device.

    Raises:
        ValueError: no tensor, other shapes, or a count that differs from that of the coefficients.

    Example:
        >>> import torch
        >>> from lowdim.linalg import scaled_sum
        >>> scaled_sum(torch.tensor([1.0, -2.0]), [torch.ones(2), torch.tensor([1.0, 3.0])])
        tensor([-1., -5.])
        >>> scaled_sum(torch.tensor([[1.0, -2.0]]), [torch.tensor([5.0, 7.0])], torch.tensor([1, 0]))
        tensor([-10.,   7.])
    """
    shapes = {tuple(t.shape) for t in tensors} | ({tuple(classes.shape)} if classes is not None else set())
    if len(shapes) != 1 or len(coefficients) != len(tensors) or coefficients.ndim != (1 if classes is None else 2):
        raise ValueError(
            f"{len(tensors)} tensors of one shape need as many coefficients; got shapes {sorted(map(list, shapes))} and "
            f"coefficients {list(coefficients.shape)}{'' if classes is None else ' with classes'}"
        )
    return _sum(coefficients, list(tensors), classes)


@torch.library.custom_op("lowdim::scaled_sum", mutates_args=())
def _sum(coefficients: Tensor, tensors: Sequence[Tensor], classes: Tensor | None) -> Tensor:
    wide = torch.promote_types(coefficients.dtype, torch.float32)
    factors = coefficients.to(wide)
    total = factors.new_zeros(tensors[0].shape)
    index = None if classes is None else classes.to(total.device, torch.int32).flatten()
    for factor, tensor in zip(factors, tensors):
        moved = tensor.to(total.device)
        each = factor if index is None else factor.index_select(0, index).view(total.shape)
        total.addcmul_(moved.to(wide), each)
    return total


@torch.library.custom_op("lowdim::scaled_sum_backward", mutates_args=())
def _products(grad: Tensor, tensors: Sequence[Tensor], classes: Tensor | None, count: int) -> Tensor:
    """`⟨grad, T_i⟩`, `(n,)`; with classes by class, `(n, count)`."""
    index = None if classes is None else classes.to(grad.device, torch.int64).flatten()
    out = grad.new_zeros(len(tensors) if index is None else (len(tensors), count))
    for row, tensor in zip(out, tensors):
        product = tensor.to(grad.device).to(grad.dtype) * grad
        if index is None:
            torch.sum(product, dim=list(range(product.ndim)), out=row) if product.ndim else row.copy_(product)
        else:
            row.index_add_(0, index, product.flatten())
    return out


@_sum.register_fake
def _(coefficients: Tensor, tensors: Sequence[Tensor], classes: Tensor | None) -> Tensor:
    return coefficients.new_empty(tensors[0].shape, dtype=torch.promote_types(coefficients.dtype, torch.float32))


@_products.register_fake
def _(grad: Tensor, tensors: Sequence[Tensor], classes: Tensor | None, count: int) -> Tensor:
    return grad.new_empty(len(tensors) if classes is None else (len(tensors), count))


def _remember(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    coefficients, ctx.tensors, ctx.classes = inputs  # held by their owner anyway: nothing is saved
    ctx.count, ctx.dtype = coefficients.shape[-1], coefficients.dtype


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor, list[None], None]:
    return _products(grad, ctx.tensors, ctx.classes, ctx.count).to(ctx.dtype), [None] * len(ctx.tensors), None


_sum.register_autograd(_backward, setup_context=_remember)
