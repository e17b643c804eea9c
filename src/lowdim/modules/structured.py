"""The base class of all structured linear layers."""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from typing import Self

import torch
from torch import Tensor, nn

from lowdim.errors import check_int
from lowdim.linalg import Cost, chain_cost
from lowdim.surgery import is_conv1d, make_linear

__all__ = ["StructuredLinear", "as_conv1d"]


class StructuredLinear(nn.Module, ABC):
    """A linear layer `y = W x + bias` whose weight is computed from fewer numbers than it has entries.

    A subclass sets `in_features`, `out_features` and `bias` (a parameter or None) and defines `forward`, `dense_weight` and
    `products`; the rest is built on these.
    """

    in_features: int
    out_features: int
    bias: nn.Parameter | None
    #: Whether it replaces transformers' Conv1D, which stores its weight as `(in, out)`: see `take_place_of`.
    transposed: bool = False

    @abstractmethod
    def dense_weight(self) -> Tensor:
        """The exact dense equivalent `(out, in)`, differentiable."""

    @abstractmethod
    def products(self) -> list[tuple[int, int, int]]:
        """The chain of matrix products in one use: (weights, inputs, outputs) of each."""

    @property
    def weight(self) -> Tensor:
        """`dense_weight()`, computed at every access, for code that reads the weight of any linear layer."""
        return self.dense_weight()

    @torch.no_grad()
    def to_linear(self) -> nn.Linear:
        """A plain layer with the same function, dtype and device; its weight is computed in float32 or better."""
        first = next(self.parameters())
        wide = torch.promote_types(first.dtype, torch.float32)
        source = self if first.dtype == wide else copy.deepcopy(self).to(wide)
        with torch.autocast(first.device.type, enabled=False):
            weight = source.dense_weight().to(first.dtype)
        linear = make_linear(weight, self.bias, requires_grad=any(p.requires_grad for p in self.parameters()))
        return linear.train(self.training)

    def take_place_of(self, layer: nn.Module) -> Self:
        """Copy the mode of the replaced layer, and remember its class for `to_plain`."""
        self.transposed = is_conv1d(layer)
        return self.train(layer.training)

    def to_plain(self) -> nn.Module:
        """`to_linear`, or a Conv1D where it replaced one, so that a checkpoint keeps the layout its model expects."""
        linear = self.to_linear()
        return as_conv1d(linear) if self.transposed else linear

    def cost(self, tokens: int, *, itemsize: int = 4) -> Cost:
        """The cost of one use on `tokens` rows, from shapes alone."""
        check_int("tokens", tokens, 0)
        parameters = sum(p.numel() for p in self.parameters())
        return chain_cost(self.products(), tokens, parameters=parameters, itemsize=itemsize)

    def check_input(self, x: Tensor) -> None:
        """Raise ValueError unless the last dimension of `x` has `in_features` entries."""
        if x.ndim == 0 or x.shape[-1] != self.in_features:
            raise ValueError(f"x must have {self.in_features} features in its last dimension; got shape {tuple(x.shape)}")

    def extra_repr(self) -> str:
        """Sizes, for `print(model)`."""
        return f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}"


def as_conv1d(linear: nn.Linear) -> nn.Module:
    """Transformers' Conv1D, whose weight is `(in, out)`, with the numbers, mode and `requires_grad` of a linear layer."""
    from transformers.pytorch_utils import Conv1D

    with torch.device("meta"):
        layer = Conv1D(linear.out_features, linear.in_features)
    layer.weight = nn.Parameter(linear.weight.detach().T.contiguous(), linear.weight.requires_grad)
    bias = linear.bias if linear.bias is not None else layer.weight.new_zeros(linear.out_features)  # a Conv1D always has one
    layer.bias = nn.Parameter(bias.detach(), layer.weight.requires_grad if linear.bias is None else bias.requires_grad)
    return layer.train(linear.training)
