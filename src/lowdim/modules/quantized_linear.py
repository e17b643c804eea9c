"""Frozen linear layers that keep their weight in 8 or 4 bits and build it for each product."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from lowdim.errors import NoMatchingModuleError
from lowdim.linalg import without_autocast
from lowdim.modules.schemes import scheme_named
from lowdim.surgery import (
    HEAD_NAMES,
    as_conv1d,
    carry_hook,
    dense_matrix,
    find_layers,
    is_compiled,
    is_conv1d,
    is_linear,
    is_quantized,
    make_linear,
    unwrap,
    without_tied,
)

__all__ = [
    "QuantizedLinear",
    "base_layers",
    "more_when_plain",
    "quantize_base",
    "quantize_like",
    "quantized_scheme",
    "quantized_tensors",
]


class QuantizedLinear(nn.Linear):
    """A frozen linear layer `y = x Wᵀ + bias` whose weight is kept in few bits.

    `W` is built in the dtype of `x` (under autocast in its dtype) for each product and then freed, also in the backward pass:
    `grad_x = g W`. Nothing of the weight's size is kept between the two, and `x` is not kept. The weight has no gradient.

    Args:
        tensors: what stands for the weight, as `Scheme.store` gives it.
        bias: `(out,)` or None; the same parameter, not a copy.
        compute_dtype: of the weight that was quantized, and of plain layers made from this one.

    Attributes:
        scheme: `"int8"`, `"int4"` or `"nf4"`.
        weight: the codes, an integer parameter without a gradient. `dense_weight()` is the matrix.
        transposed: whether it replaced transformers' Conv1D.

    Example:
        >>> import torch
        >>> from lowdim.modules import QuantizedLinear
        >>> layer = QuantizedLinear.blank(torch.nn.Linear(64, 32), "int4")
        >>> layer.weight.dtype, tuple(layer.weight.shape), tuple(layer.dense_weight().shape)
        (torch.uint8, (32, 32), (32, 64))

    Not for weights that are trained: `lowdim.optim.QGaLore` trains weights of 8 bits.

    Source: Dettmers et al., "QLoRA", NeurIPS 2023, arXiv 2305.14314.
    """

    def __init__(
        self,
        scheme: str,
        shape: tuple[int, int],  # (out_features, in_features)
        tensors: dict[str, Tensor],
        bias: nn.Parameter | None = None,
        *,
        compute_dtype: torch.dtype = torch.float32,
        transposed: bool = False,
    ):
        nn.Module.__init__(self)
        self.scheme, self.compute_dtype, self.transposed = scheme, compute_dtype, transposed
        self.out_features, self.in_features = shape
        self.weight = nn.Parameter(tensors["weight"], requires_grad=False)
        for name, tensor in tensors.items():
            if name != "weight":
                self.register_buffer(name, tensor)
        self.register_parameter("bias", bias)

    @classmethod
    @torch.no_grad()
    def from_linear(cls, layer: nn.Module, scheme: str) -> QuantizedLinear:
        """The layer (nn.Linear or Conv1D) with its weight quantized from float32; its bias is shared.

        Raises:
            UnknownNameError: no such scheme.
            MissingExtraError: the package that quantizes is not installed.
            ValueError: NaN or infinity in the weight.
        """
        matrix, tensors = quantized_tensors(layer, scheme)
        return cls._like(layer, scheme, (matrix.shape[0], matrix.shape[1]), tensors, matrix.dtype)

    @classmethod
    @torch.no_grad()
    def blank(cls, layer: nn.Module, scheme: str) -> QuantizedLinear:
        """`from_linear` without numbers: for forecasts."""
        matrix = dense_matrix(layer)
        shape = matrix.shape[0], matrix.shape[1]
        layout = scheme_named(scheme).layout(*shape)
        tensors = {n: torch.zeros(size, dtype=dtype, device=matrix.device) for n, (size, dtype) in layout.items()}
        return cls._like(layer, scheme, shape, tensors, matrix.dtype)

    @classmethod
    def _like(
        cls, layer: nn.Module, scheme: str, shape: tuple[int, int], tensors: dict[str, Tensor], dtype: torch.dtype
    ) -> QuantizedLinear:
        bias = cast("nn.Parameter | None", layer._parameters.get("bias"))
        new = cls(scheme, shape, tensors, bias, compute_dtype=dtype, transposed=is_conv1d(layer))
        return new.train(layer.training)

    def forward(
        self,
        input: Tensor,  # (..., in_features)
    ) -> Tensor:
        """`(..., out_features)`."""
        place, dtype = input.device.type, input.dtype
        if torch.amp.is_autocast_available(place) and torch.is_autocast_enabled(place) and dtype != torch.float64:
            dtype = torch.get_autocast_dtype(place)
        bias = None if self.bias is None else self.bias.to(dtype)
        return cast(Tensor, _Product.apply(input.to(dtype), bias, self))

    def dense_weight(self, dtype: torch.dtype | None = None) -> Tensor:
        """The matrix `(out, in)`; in `compute_dtype` if none is given."""
        stored = {"weight": self.weight.detach(), **{name: cast(Tensor, buffer) for name, buffer in self._buffers.items()}}
        return scheme_named(self.scheme).values(stored, (self.out_features, self.in_features), dtype or self.compute_dtype)

    @torch.no_grad()
    def to_linear(self) -> nn.Linear:
        """A plain layer with the same function, in `compute_dtype`."""
        weight = self.dense_weight().contiguous()
        return make_linear(weight, self.bias, requires_grad=False).train(self.training)

    def to_plain(self) -> nn.Module:
        """`to_linear`, or a Conv1D where it replaced one."""
        linear = self.to_linear()
        return as_conv1d(linear) if self.transposed else linear

    def dense_bytes(self) -> int:
        """The size of the weight of `to_linear()`."""
        return self.out_features * self.in_features * self.compute_dtype.itemsize

    def extra_repr(self) -> str:
        """Sizes and the scheme, for `print(model)`."""
        sizes = f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}"
        return f"{sizes}, scheme={self.scheme}"


class _Product(torch.autograd.Function):
    """`x Wᵀ + bias`; the weight is built again in the backward pass."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, bias: Tensor | None, layer: QuantizedLinear) -> Tensor:
        ctx.layer = layer
        return F.linear(x, layer.dense_weight(x.dtype), bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (g,) = grads
        by_x, by_bias, _ = ctx.needs_input_grad
        place = g.device.type
        with without_autocast(place):
            grad_x = g @ ctx.layer.dense_weight(g.dtype) if by_x else None
            grad_bias = g.reshape(-1, g.shape[-1]).sum(0) if by_bias else None
        return grad_x, grad_bias, None


def quantized_tensors(layer: nn.Module, scheme: str) -> tuple[Tensor, dict[str, Tensor]]:
    """The layer's matrix `(out, in)`, and the tensors that stand for it, quantized from float32.

    Raises:
        UnknownNameError: no such scheme.
        MissingExtraError: the package that quantizes is not installed.
        ValueError: NaN or infinity in the weight.
    """
    matrix = dense_matrix(layer).detach()
    if not bool(torch.isfinite(matrix).all()):
        raise ValueError(f"the weight has NaN or infinite entries, which cannot be quantized to {scheme}")
    return matrix, scheme_named(scheme).store(matrix.to(torch.float32).contiguous())


@torch.no_grad()
def quantize_like(bare: nn.Module, model: nn.Module) -> nn.Module:
    """Quantize those layers of a dense copy, in place, that are quantized in `model` (under its adapters, if it has any)."""
    trained = dict(model.named_modules())
    for parent_name, parent in list(bare.named_modules()):
        for child, layer in parent._modules.items():
            own = trained.get(f"{parent_name}.{child}" if parent_name else child)
            plain = getattr(own, "plain", own)
            if layer is not None and isinstance(plain, QuantizedLinear) and not isinstance(layer, QuantizedLinear):
                parent._modules[child] = QuantizedLinear.from_linear(layer, plain.scheme)
    return bare


def more_when_plain(model: nn.Module) -> int:
    """The bytes that the model's weights have more once `to_plain` has been called for each quantized layer."""
    layers = [module for module in model.modules() if isinstance(module, QuantizedLinear)]
    kept = sum(t.nbytes for layer in layers for t in (layer.weight, *layer._buffers.values()) if t is not None)
    return sum(layer.dense_bytes() for layer in layers) - kept


def quantized_scheme(model: nn.Module) -> str | None:
    """The scheme of a model whose base `quantize_base` has quantized; None for any other."""
    return next((module.scheme for module in model.modules() if isinstance(module, QuantizedLinear)), None)


def base_layers(model: nn.Module, keep: Iterable[str] = ()) -> dict[str, nn.Module]:
    """The layers that `quantize_base` replaces, by name: all linear ones outside of the prediction head.

    Args:
        keep: modules that stay dense, with all that is in them.

    Raises:
        ValueError: a layer is quantized already, or there is nothing to quantize.
    """
    kept = (*keep, *(name for name, _ in model.named_children() if name in HEAD_NAMES))
    found = find_layers(model, accept=is_linear)
    already = next((name for name, layer in found.items() if is_quantized(layer)), None)
    if already is not None:
        raise ValueError(f"the model is quantized already (layer {already}); leave quantize out")
    free, _ = without_tied(model, found, named=False, within=True)
    layers = {n: layer for n, layer in free.items() if not any(n == k or n.startswith(f"{k}.") for k in kept)}
    if not layers:
        raise NoMatchingModuleError(f"{type(model).__name__} has no linear layer to quantize outside of {', '.join(kept)}")
    return layers


def quantize_base(model: nn.Module, scheme: str, *, keep: Iterable[str] = (), initialise: bool = True) -> nn.Module:
    """Replace the model's linear layers by `QuantizedLinear`, one after the other, in place.

    The prediction head, layers whose weight is tied to another module's, and those in `keep` stay dense; so do embeddings,
    convolutions and norms.

    Args:
        scheme: `"int8"`, `"int4"` or `"nf4"`.
        keep: names of modules that stay dense, such as a new head.
        initialise: False sets no numbers, for forecasts.

    Returns:
        The model.

    Raises:
        UnknownNameError: no such scheme.
        MissingExtraError: the package that quantizes is not installed.
        ValueError: the model is quantized already, or has nothing to quantize; NaN or infinity in a weight, with its name (the
            layers before it are quantized then).

    Example:
        >>> from torch import nn
        >>> from lowdim.modules import quantize_base
        >>> type(quantize_base(nn.Sequential(nn.Linear(64, 8), nn.ReLU()), "int8")[0]).__name__
        'QuantizedLinear'
    """
    scheme_named(scheme)
    make = QuantizedLinear.from_linear if initialise else QuantizedLinear.blank
    layers = base_layers(model, keep)
    places: dict[nn.Module, list[tuple[nn.Module, str]]] = {}
    for parent in model.modules():
        for child, module in parent._modules.items():
            if module is not None:
                places.setdefault(unwrap(module) if is_compiled(module) else module, []).append((parent, child))
    for name in list(layers):
        layer = layers.pop(name)  # no reference to it is left once it is replaced
        try:
            new = make(layer, scheme)
        except ValueError as error:
            raise ValueError(f"layer {name}: {error}") from error
        carry_hook(layer, new)
        for parent, child in places.pop(layer):
            parent._modules[child] = new
        del layer
    return model
