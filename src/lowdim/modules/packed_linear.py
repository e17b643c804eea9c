"""A linear layer in few bits that files describe: what a quantized checkpoint of lowdim holds."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lowdim.errors import check_int
from lowdim.linalg import Cost, chain_cost
from lowdim.modules.quantized_linear import base_layers, quantized_tensors
from lowdim.modules.schemes import scheme_named
from lowdim.modules.structured import RebuildableLinear
from lowdim.surgery import float_dtype, known_dtype, make_linear, swap_layers

__all__ = ["PackedLinear", "pack_linear"]


class PackedLinear(RebuildableLinear):
    """A linear layer `y = x Wᵀ + bias` whose weight is kept, and stored, in 8 or 4 bits.

    `W` is built in the dtype of `x` for each product. It has no gradient; the bias has. Scales are kept as the bits of float32
    numbers, so that no cast of the model changes them. Unlike `QuantizedLinear`, the frozen base under an adapter, it is a
    part of the model that is written.

    Args:
        scheme: `"int8"`, `"int4"` (torchao) or `"nf4"` (bitsandbytes).

    Example:
        >>> import torch
        >>> from lowdim.modules import PackedLinear
        >>> layer = PackedLinear(64, 32, scheme="int4")
        >>> tuple(layer.codes.shape), tuple(layer(torch.zeros(2, 64)).shape)
        ((32, 32), (2, 32))

    When not: for speed on a CPU, since the weight is built again for every product.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        *,
        scheme: str,
        device: Any = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__()
        check_int("in_features", in_features, 1)
        check_int("out_features", out_features, 1)
        self.in_features, self.out_features, self.scheme = in_features, out_features, scheme
        self.dtype = dtype or torch.get_default_dtype()
        layout = scheme_named(scheme).layout(out_features, in_features)
        for name, (shape, kind) in layout.items():
            self.register_buffer(_stored(name), torch.zeros(shape, dtype=_kept(kind), device=device))
        self.bias = nn.Parameter(torch.zeros(out_features, device=device, dtype=self.dtype)) if bias else None

    @classmethod
    @torch.no_grad()
    def from_linear(cls, layer: nn.Module, scheme: str, dtype: torch.dtype | None = None) -> PackedLinear:
        """The layer (nn.Linear or Conv1D) with its weight quantized from float32; the bias is copied.

        Args:
            dtype: of the bias and of the dense layer, if the layer does not tell it.

        Raises:
            UnknownNameError: no such scheme.
            MissingExtraError: the package that quantizes is not installed.
            ValueError: NaN or infinity in the weight.
        """
        matrix, tensors = quantized_tensors(layer, scheme)
        bias = cast("Tensor | None", layer.bias)
        out_features, in_features = matrix.shape
        how = {"scheme": scheme, "device": "meta", "dtype": known_dtype(layer) or dtype}
        new = cls(in_features, out_features, bias is not None, **how)
        for name, tensor in tensors.items():
            new._buffers[_stored(name)] = tensor.contiguous().view(_kept(tensor.dtype)).clone()
        if bias is not None:
            new.bias = nn.Parameter(bias.detach().clone())
        return new.take_place_of(layer)

    def forward(
        self,
        x: Tensor,  # (..., in_features)
    ) -> Tensor:
        """`(..., out_features)`."""
        self.check_input(x)
        return F.linear(x, self.dense_weight(x.dtype), None if self.bias is None else self.bias.to(x.dtype))

    @torch.no_grad()
    def dense_weight(self, dtype: torch.dtype | None = None) -> Tensor:
        """The matrix `(out, in)`; in the layer's dtype if none is given."""
        shape = (self.out_features, self.in_features)
        scheme = scheme_named(self.scheme)
        layout = scheme.layout(*shape)
        stored = {name: cast(Tensor, self._buffers[_stored(name)]).view(kind) for name, (_, kind) in layout.items()}
        return scheme.values(stored, shape, dtype or self.dtype)

    @torch.no_grad()
    def to_linear(self) -> nn.Linear:
        """A plain layer with the same function."""
        return make_linear(self.dense_weight().contiguous(), self.bias, requires_grad=False).train(self.training)

    def products(self) -> list[tuple[int, int, int]]:
        """The dense product, after the weight has been built."""
        return [(self.out_features * self.in_features, self.in_features, self.out_features)]

    def cost(self, tokens: int, *, itemsize: int = 4) -> Cost:
        """The cost of the product on `tokens` rows; building the weight is not counted."""
        check_int("tokens", tokens, 0)
        return chain_cost(self.products(), tokens, parameters=0 if self.bias is None else self.out_features, itemsize=itemsize)

    def description(self) -> dict[str, Any]:
        """The scheme, and whether there is a bias."""
        return {"scheme": self.scheme, "bias": self.bias is not None}

    def _apply(self, fn: Any, recurse: bool = True) -> PackedLinear:
        """Moves and casts: the dense weight has the dtype to which the model is cast."""
        super()._apply(fn, recurse)
        self.dtype = fn(torch.empty(0, dtype=self.dtype)).dtype
        return self

    def extra_repr(self) -> str:
        """Sizes and the scheme, for `print(model)`."""
        return f"{super().extra_repr()}, scheme={self.scheme}"


def pack_linear(model: nn.Module, scheme: str, *, keep: Iterable[str] = ()) -> nn.Module:
    """Replace the model's linear layers by `PackedLinear`, in place: those that `quantize_base` would replace.

    Layers that are factored, sparse or coded already are left alone; so are the head, embeddings, convolutions and norms.

    Args:
        scheme: `"int8"`, `"int4"` or `"nf4"`.
        keep: names of modules that stay dense.

    Returns:
        The model.

    Raises:
        UnknownNameError: no such scheme. MissingExtraError: the package that quantizes is not installed.
        ValueError: nothing is left to quantize; NaN or infinity in a weight, with its name (the model is then unchanged).

    Example:
        >>> from torch import nn
        >>> from lowdim.modules import pack_linear
        >>> type(pack_linear(nn.Sequential(nn.Linear(64, 8), nn.ReLU()), "int8")[0]).__name__
        'PackedLinear'
    """
    scheme_named(scheme).check()
    dtype = float_dtype(model)
    with torch.no_grad():
        swap_layers(model, base_layers(model, keep), lambda _, layer: PackedLinear.from_linear(layer, scheme, dtype))
    return model


def _stored(name: str) -> str:
    """`weight` would be read as a dense one by those who do not know the layer."""
    return "codes" if name == "weight" else name


def _kept(kind: torch.dtype) -> torch.dtype:
    """Float32 numbers are kept as their bits."""
    return torch.int32 if kind == torch.float32 else kind
