"""The base classes of structured linear layers."""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from typing import Any, Self

import torch
from torch import Tensor, nn

from lowdim.errors import check_int
from lowdim.linalg import Cost, chain_cost
from lowdim.modules.rebuildable import Rebuildable
from lowdim.surgery import as_conv1d, is_conv1d, layer_dtype, make_linear, matrix_shape

__all__ = ["RebuildableLinear", "StructuredLinear", "as_conv1d"]


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
        source = self if first.dtype == wide else self._copy_in(wide)
        with torch.autocast("cpu" if first.is_meta else first.device.type, enabled=False):
            weight = source.dense_weight().to(first.dtype)
        linear = make_linear(weight, self.bias, requires_grad=any(p.requires_grad for p in self.parameters()))
        return linear.train(self.training)

    def _copy_in(self, dtype: torch.dtype) -> Self:
        """A copy in another dtype. Unlike `.to(dtype)`, it also works on the fake tensors with which `plan` rehearses."""
        made: dict[int, Any] = {id(p): nn.Parameter(p.detach().to(dtype), p.requires_grad) for p in self.parameters()}
        made |= {id(b): b.to(dtype) if b.is_floating_point() else b.clone() for b in self.buffers()}
        return copy.deepcopy(self, made)

    def take_place_of(self, layer: nn.Module) -> Self:
        """Copy the mode of the replaced layer, and remember its class for `to_plain`."""
        self.transposed = is_conv1d(layer)
        return self.train(layer.training)

    def with_rest_of(self, linear: nn.Linear) -> Self:
        """Copy the bias and the mode of a plain layer: how `from_linear` ends once the weight is in place."""
        if linear.bias is not None:
            self.bias = nn.Parameter(linear.bias.detach().clone())
        return self.train(linear.training)

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


class RebuildableLinear(StructuredLinear, Rebuildable):
    """A structured linear layer that files can describe: a constructor with sizes, bias and description rebuilds it.

    A subclass is made by `cls(in_features, out_features, bias, device=..., dtype=..., **description)`; its `description()` has
    an entry `bias`, whether there is one, and the other keywords.
    """

    @classmethod
    def blank(cls, layer: nn.Module, **description: Any) -> Self:
        """A layer on the meta device, without numbers, in the sizes and dtype of `layer`, and with a bias where it has one.

        An entry `bias` in the description says otherwise: some systems give a layer a new bias.

        Raises:
            ValueError, TypeError: a description that does not fit the layer.
        """
        out_features, in_features = matrix_shape(layer)
        own = getattr(layer, "bias", None) is not None
        sizes: tuple[Any, ...] = in_features, out_features, description.pop("bias", own)
        return cls(*sizes, device="meta", dtype=layer_dtype(layer), **description).take_place_of(layer)
