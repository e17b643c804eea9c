"""Layers with single trained entries in their weight: one product for base and update together."""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lowdim.adapters.core.convolution import Convolution
from lowdim.adapters.core.layer import AdaptedLayer
from lowdim.linalg import wide
from lowdim.surgery import CONVOLUTIONS, dense_matrix, is_conv1d, weight_matrix

__all__ = ["EntriesLayer", "apply_entries", "put_entries"]

Geometry = tuple[tuple[int, ...], Any, Any, Any, int]  # kernel, stride, padding, dilation, groups


def put_entries(
    matrix: Tensor | None,  # (out, in)
    values: Tensor,  # (nnz,)
    index: Tensor,  # (nnz,) int64, row-major places
    shape: tuple[int, int],
    dtype: torch.dtype,
) -> Tensor:
    """A copy of `matrix` (of zeros where it is None) with `values` at the places `index`, `(out, in)`, without gradient."""
    if matrix is None:
        full = torch.zeros(shape, dtype=dtype, device=values.device)
    else:
        full = matrix.detach().to(dtype=dtype, memory_format=torch.contiguous_format, copy=True)
    full.view(-1).index_copy_(0, index, values.detach().to(dtype))
    return full


def apply_entries(
    x: Tensor,
    values: Tensor,  # (nnz,)
    index: Tensor,  # (nnz,)
    shape: tuple[int, int],
    matrix: Tensor | None = None,  # (out, in)
    bias: Tensor | None = None,  # (out,)
    conv: Convolution | None = None,
) -> Tensor:
    """The layer with the weight `put_entries(...)`, differentiable in `x` and `values`.

    For the backward pass it keeps `x` alone: the weight is assembled again, and only the positions `index` of its dense
    gradient are kept.
    """
    geometry = None if conv is None else (conv.weight.shape[1:], conv.stride, conv.padding, conv.dilation, conv.groups)
    kind = x.device.type
    if not torch.is_autocast_enabled(kind):
        dtype = x.dtype if matrix is None else matrix.dtype
        return cast(Tensor, _Entries.apply(x, values, matrix, bias, index, shape, geometry, dtype))
    dtype = torch.get_autocast_dtype(kind)
    with torch.autocast(kind, enabled=False):
        bias = None if bias is None else bias.to(dtype)
        return cast(Tensor, _Entries.apply(x.to(dtype), values, matrix, bias, index, shape, geometry, dtype))


class _Entries(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        values: Tensor,
        matrix: Tensor | None,
        bias: Tensor | None,
        index: Tensor,
        shape: tuple[int, int],
        geometry: Geometry | None,
        dtype: torch.dtype,
    ) -> Tensor:
        ctx.save_for_backward(x, values, matrix, index)
        ctx.shape, ctx.geometry, ctx.dtype = shape, geometry, dtype
        weight = put_entries(matrix, values, index, shape, dtype)
        if geometry is None:
            return F.linear(x, weight, bias)
        kernel, stride, padding, dilation, groups = geometry
        blank = [0] * len(kernel[1:])
        return torch.ops.aten.convolution(x, weight.view(-1, *kernel), bias, stride, padding, dilation, False, blank, groups)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        x, values, matrix, index = ctx.saved_tensors
        grad, (wants_x, wants_values, *_) = grads[0], ctx.needs_input_grad
        wants_values = wants_values and values.numel() > 0
        dx = dense = None
        if ctx.geometry is None:
            if wants_x:
                dx = grad @ put_entries(matrix, values, index, ctx.shape, ctx.dtype)
            if wants_values:
                dense = grad.reshape(-1, grad.shape[-1]).mT @ x.reshape(-1, x.shape[-1])
        elif wants_x or wants_values:
            kernel, stride, padding, dilation, groups = ctx.geometry
            weight = put_entries(matrix, values, index, ctx.shape, ctx.dtype).view(-1, *kernel)
            blank = [0] * len(kernel[1:])
            dx, dense, _ = torch.ops.aten.convolution_backward(
                grad, x, weight, None, stride, padding, dilation, False, blank, groups, [wants_x, wants_values, False]
            )
        if not ctx.needs_input_grad[1]:
            return dx, *[None] * 7
        found = torch.zeros_like(values) if dense is None else dense.reshape(-1).index_select(0, index).to(values.dtype)
        return dx, found, *[None] * 6


class EntriesLayer(AdaptedLayer):
    """An `AdaptedLayer` that puts its update's entries into the weight, where that is possible.

    Then a pass costs one product instead of two, and the output is exactly that of the merged layer. Over quantized weights,
    other adapters or a wrapped base layer, with dropout or another strength, it adds the update's output as other adapted
    layers do.

    The update must have `current() (nnz,)`, the values of its entries, and `index (nnz,)`, their places in the matrix.
    """

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """The base layer's output with the trained entries in its weight."""
        if args or kwargs or not self._direct(x):
            return super().forward(x, *args, **kwargs)
        update, base = cast(Any, self.update), self.base
        if not len(update.index):
            return base(x)
        conv = cast(Convolution, base) if isinstance(base, CONVOLUTIONS) else None
        shape = (self.out_features, self.in_features)
        return apply_entries(x, update.current(), update.index, shape, weight_matrix(base), self.bias, conv)

    @torch.no_grad()
    def effective_weight(self) -> Tensor:
        """`W_eff (out, in)` in float32 or better: the trained values as they are, not a sum."""
        if self.strength != 1.0 or isinstance(self.base, AdaptedLayer):
            return super().effective_weight()
        update, matrix = cast(Any, self.update), wide(dense_matrix(self.base))
        dtype = torch.promote_types(matrix.dtype, update.values.dtype)
        return put_entries(matrix, update.current(), update.index, (self.out_features, self.in_features), dtype)

    def _direct(self, x: Tensor) -> bool:
        base = self.base
        weight = base._parameters.get("weight")
        usual = type(base) is nn.Linear or type(base) in CONVOLUTIONS or is_conv1d(base)
        # Another class of the weight: quantized, or sharded.
        if not usual or type(weight) is not nn.Parameter or weight.requires_grad or "forward" in base.__dict__:
            return False
        if base._forward_hooks or base._forward_pre_hooks or base._backward_hooks or base._backward_pre_hooks:
            return False
        if self.strength != 1.0 or self.rows is not None or (self.dropout and self.training):
            return False
        if self.bias is not None and self.bias.requires_grad:
            return False
        if isinstance(base, CONVOLUTIONS):
            padded = base.padding_mode != "zeros" or isinstance(base.padding, str)
            return not padded and x.ndim == len(base.kernel_size) + 2
        return True
