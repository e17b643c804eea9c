"""A linear layer that uses a masked weight and keeps the whole one."""

from __future__ import annotations

from abc import abstractmethod
from typing import Any, Self, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lowdim.errors import check_int
from lowdim.linalg import Cost, chain_cost
from lowdim.modules.rebuildable import Rebuildable
from lowdim.modules.structured import as_conv1d
from lowdim.surgery import describe, is_conv1d, is_linear, is_quantized, make_linear, matrix_shape

__all__ = ["MaskedLinear"]


class MaskedLinear(nn.Module, Rebuildable):
    """A linear layer `y = (mask ⊙ W) x + bias` over the weight and bias of the layer that it replaces.

    `weight` and `bias` are that layer's own Parameter objects, in its own layout, so an optimizer that was built before keeps
    working. A subclass defines `mask()`, and `description()` as the keyword arguments with which its constructor rebuilds it;
    one whose weight is more than a product with the mask overrides `dense_weight`, one whose mask depends on `x` overrides
    `forward`.

    Args:
        layer: an nn.Linear or transformers' Conv1D, whose parameters are shared.

    Raises:
        TypeError: another layer, or one whose weight is computed (weight_norm, a parametrization).

    Example:
        >>> import torch
        >>> from torch import nn
        >>> from lowdim.modules import MaskedLinear
        >>> class Positive(MaskedLinear):
        ...     def mask(self):
        ...         return (self.matrix > 0).to(self.weight.dtype)
        ...     def description(self):
        ...         return {}
        >>> linear = nn.Linear(3, 2)
        >>> layer = Positive(linear)
        >>> layer.weight is linear.weight, bool((layer.dense_weight() >= 0).all())
        (True, True)
    """

    def __init__(self, layer: nn.Module):
        super().__init__()
        if not is_linear(layer):
            raise TypeError(f"layer must be nn.Linear or Conv1D; got {describe(layer)}")
        if is_quantized(layer):
            raise TypeError(f"a quantized weight cannot be masked entry by entry; got {describe(layer)}")
        if "weight" not in layer._parameters:
            raise TypeError(
                f"the weight of {describe(layer)} is computed (weight_norm or a parametrization?); remove that first"
            )
        self.transposed = is_conv1d(layer)
        self.out_features, self.in_features = matrix_shape(layer)
        self.weight = cast(nn.Parameter, layer.weight)
        self.bias = cast("nn.Parameter | None", layer.bias)
        self.train(layer.training)

    @property
    def matrix(self) -> Tensor:
        """The whole weight as `(out, in)`, a view."""
        return self.weight.T if self.transposed else self.weight

    @abstractmethod
    def mask(self) -> Tensor:
        """`(out, in)`, 0 where a weight is left out and 1 where it is used, in the weight's dtype."""

    def dense_weight(self) -> Tensor:
        """The weight that `forward` uses, `(out, in)`, differentiable: `mask ⊙ W`."""
        return self.matrix * self.mask()

    def forward(
        self,
        x: Tensor,  # (..., in_features)
    ) -> Tensor:
        """`(..., out_features)`."""
        return F.linear(x, self.dense_weight(), self.bias)

    @torch.no_grad()
    def to_linear(self) -> nn.Linear:
        """A plain layer with the weight that is used now; it shares no tensor with this one."""
        with torch.autocast(self.weight.device.type, enabled=False):
            return self._linear(self.dense_weight().to(self.weight.dtype).clone())

    def to_plain(self) -> nn.Module:
        """`to_linear`, or a Conv1D where it replaced one."""
        return self._plain(self.to_linear())

    def _linear(self, weight: Tensor) -> nn.Linear:
        """A plain layer with this weight `(out, in)`, and with bias and mode of this one."""
        linear = make_linear(weight, self.bias, requires_grad=self.weight.requires_grad)
        if self.bias is not None:
            linear.bias.requires_grad_(self.bias.requires_grad)
        return linear.train(self.training)

    def _plain(self, linear: nn.Linear) -> nn.Module:
        return as_conv1d(linear) if self.transposed else linear

    @classmethod
    def blank(cls, layer: nn.Module, **description: Any) -> Self:
        """The constructor with the description's entries as keywords."""
        return cls(layer, **description)

    def cost(self, tokens: int, *, itemsize: int = 4) -> Cost:
        """The cost of one use on `tokens` rows with a dense product, which a mask alone does not avoid."""
        check_int("tokens", tokens, 0)
        parameters = sum(p.numel() for p in self.parameters())
        product = (self.in_features * self.out_features, self.in_features, self.out_features)
        return chain_cost([product], tokens, parameters=parameters, itemsize=itemsize)

    def extra_repr(self) -> str:
        """Sizes, for `print(model)`."""
        return f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}"
