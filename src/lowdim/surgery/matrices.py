"""A layer's weight as one matrix `(out_features, in_features)`, and layers with another matrix."""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor, nn

from lowdim.surgery.behaviour import Behaviour, behaviour, shallow_copy
from lowdim.surgery.kinds import CONVOLUTIONS, describe, is_conv1d, is_linear_class
from lowdim.surgery.placement import carry_hook, refuse_offloaded
from lowdim.surgery.quantized import dequantized, is_quantized, known_dtype

__all__ = [
    "as_conv1d",
    "as_linear",
    "dense_matrix",
    "float_dtype",
    "is_linear",
    "is_matrix_layer",
    "make_linear",
    "matrix_shape",
    "plain_weight",
    "weight_matrix",
    "with_matrix",
]


def is_linear(layer: nn.Module) -> bool:
    """Whether the layer computes `W x + bias`: nn.Linear or transformers' Conv1D, plain or quantized.

    A subclass with a forward method of its own counts if it computes the same (see `behaviour`). The output projection
    inside nn.MultiheadAttention does not: attention reads its weight and never calls it.
    """
    return is_linear_class(layer) and behaviour(layer) == Behaviour()


def is_matrix_layer(layer: nn.Module) -> bool:
    """Whether the layer applies one weight matrix: the layers of `is_linear`, and convolutions."""
    return is_linear(layer) or (isinstance(layer, CONVOLUTIONS) and behaviour(layer) == Behaviour())


def weight_matrix(layer: nn.Module) -> Tensor:
    """The layer's weight as a matrix `(out_features, in_features)`: a view where the layout allows.

    A convolution's matrix is `(out_channels, in_channels / groups · kernel)`, an embedding's `(dim, num)`.

    Raises:
        TypeError: the layer has no weight matrix.
        ValueError: accelerate has offloaded the weight.
    """
    weight = getattr(layer, "weight", None)
    if isinstance(weight, Tensor):
        refuse_offloaded(layer)
        if isinstance(layer, nn.Embedding) or is_conv1d(layer):
            return weight.T
        if isinstance(layer, CONVOLUTIONS):
            return weight.flatten(1)
        if weight.ndim == 2:
            return weight
    raise TypeError(f"layer must have a weight matrix (nn.Linear, Conv1D, a convolution, nn.Embedding); got {describe(layer)}")


def plain_weight(linear: nn.Linear) -> Tensor:
    """The weight of an nn.Linear, detached: what a `from_linear` starts from.

    Raises:
        TypeError: not an nn.Linear.
    """
    if not isinstance(linear, nn.Linear):
        raise TypeError(f"linear must be nn.Linear; got {type(linear).__name__}")
    return linear.weight.detach()


@torch.no_grad()
def dense_matrix(layer: nn.Module) -> Tensor:
    """The weight as a plain matrix `(out_features, in_features)`: `weight_matrix`, or a quantized weight's values in float32.

    Raises:
        TypeError: the layer has no weight matrix, or a quantized one whose values cannot be read.
        ValueError: accelerate has offloaded the weight.
    """
    if not is_quantized(layer):
        return weight_matrix(layer)
    refuse_offloaded(layer)
    return dequantized(layer)


def matrix_shape(layer: nn.Module) -> tuple[int, int]:
    """`(out_features, in_features)` of the layer's matrix."""
    if is_quantized(layer) or hasattr(layer, "pristine_weight"):  # the second: an adapted layer, whose base may be quantized
        return layer.out_features, layer.in_features  # type: ignore[return-value]
    weight = getattr(layer, "weight", None)
    if isinstance(weight, Tensor) and weight.ndim >= 2:
        sides = weight.shape[0], weight.shape[1:].numel()
        return (sides[1], sides[0]) if isinstance(layer, nn.Embedding) or is_conv1d(layer) else sides
    out_features, in_features = weight_matrix(layer).shape
    return out_features, in_features


def with_matrix(layer: nn.Module, matrix: Tensor, *, dtype: torch.dtype | None = None) -> nn.Module:
    """A layer like `layer` with another weight matrix `(out, in)`; the given layer is unchanged.

    The new weight has the old one's dtype, device, layout and `requires_grad`. Bias and hooks are shared; functions that
    were set on the instance (accelerate's hooks) act on the new layer. A quantized layer becomes a plain nn.Linear (or the
    Conv1D that it was) in the dtype that it computed in; `dtype` is for those which do not tell.

    Raises:
        TypeError: the weight is not a parameter but computed from others (weight_norm, a parametrization).
    """
    if is_quantized(layer):
        linear = _plain_linear(layer, matrix, dtype)
        plain = as_conv1d(linear) if getattr(layer, "transposed", False) else linear
        carry_hook(layer, plain)
        return plain
    old = layer._parameters.get("weight")
    if old is None:
        raise TypeError(f"the weight of {describe(layer)} is computed (weight_norm or a parametrization?); remove that first")
    if isinstance(layer, nn.Embedding) or is_conv1d(layer):
        matrix = matrix.T
    value = matrix.reshape(old.shape).to(device=old.device, dtype=old.dtype).contiguous()
    copy = shallow_copy(layer)
    copy.weight = nn.Parameter(value, requires_grad=old.requires_grad)
    return copy


def _plain_linear(layer: nn.Module, matrix: Tensor, dtype: torch.dtype | None) -> nn.Linear:
    """The nn.Linear that takes the place of a quantized layer, in the dtype that it computes in."""
    bias, dtype = cast("Tensor | None", layer.bias), known_dtype(layer) or dtype or torch.get_default_dtype()
    plain = make_linear(matrix.to(dtype), bias if bias is None else bias.to(dtype), requires_grad=False)
    return plain.train(layer.training)


def make_linear(
    weight: Tensor,  # (out_features, in_features)
    bias: Tensor | None = None,  # (out_features,)
    *,
    requires_grad: bool = True,
) -> nn.Linear:
    """A plain layer with these numbers, without a random draw; the weight is used as it is, the bias is copied."""
    out_features, in_features = weight.shape
    linear = nn.Linear(in_features, out_features, bias is not None, device="meta")
    linear.weight = nn.Parameter(weight.detach(), requires_grad)
    if bias is not None:
        linear.bias = nn.Parameter(bias.detach().clone(), requires_grad)
    return linear


def as_conv1d(linear: nn.Linear) -> nn.Module:
    """Transformers' Conv1D, whose weight is `(in, out)`, with the numbers, mode and `requires_grad` of a linear layer."""
    from transformers.pytorch_utils import Conv1D

    with torch.device("meta"):
        layer = Conv1D(linear.out_features, linear.in_features)
    layer.weight = nn.Parameter(linear.weight.detach().T.contiguous(), linear.weight.requires_grad)
    bias = linear.bias if linear.bias is not None else layer.weight.new_zeros(linear.out_features)  # a Conv1D always has one
    layer.bias = nn.Parameter(bias.detach(), layer.weight.requires_grad if linear.bias is None else bias.requires_grad)
    return layer.train(linear.training)


def as_linear(layer: nn.Module, *, dtype: torch.dtype | None = None) -> nn.Linear:
    """The layer itself if it is a plain nn.Linear; for transformers' Conv1D an nn.Linear over the same numbers.

    A quantized layer gives an nn.Linear of its values in the dtype that it computes in; `dtype` is for those which do not tell.

    Raises:
        TypeError: neither of the two, or the values of a quantized weight cannot be read.
        ValueError: accelerate has offloaded the weight.
    """
    refuse_offloaded(layer)
    if is_quantized(layer):
        linear = _plain_linear(layer, dequantized(layer), dtype)
        carry_hook(layer, linear)
        return linear.requires_grad_(True)
    if isinstance(layer, nn.Linear):
        return layer
    if not is_conv1d(layer):
        raise TypeError(f"layer must be nn.Linear or Conv1D; got {describe(layer)}")
    linear = make_linear(weight_matrix(layer), cast("Tensor | None", layer.bias))
    return linear.train(layer.training)


def float_dtype(model: nn.Module) -> torch.dtype:
    """The dtype that most of the model's numbers have, codes of quantized weights and their scales aside."""
    count: dict[torch.dtype, int] = {}
    for module in model.modules():
        if is_quantized(module):
            continue
        for parameter in module._parameters.values():
            if parameter is not None and parameter.is_floating_point() and parameter.dtype.itemsize > 1:
                count[parameter.dtype] = count.get(parameter.dtype, 0) + parameter.numel()
    return max(count, key=lambda dtype: count[dtype]) if count else torch.get_default_dtype()
