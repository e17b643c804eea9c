"""8-bit weights in training: the parameter, the linear layer around it, and the store that an optimizer uses."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from lowdim.linalg import (
    compute_dtype,
    dequantize_affine,
    has_numbers,
    is_sharded,
    quantize_affine,
    store_affine,
    without_autocast,
)
from lowdim.optim.core.parts import DenseStore
from lowdim.surgery import (
    Patterns,
    as_linear,
    find_layers,
    float_dtype,
    is_linear,
    make_linear,
    plain_weight,
    swap_layers,
    without_tied,
)

__all__ = ["Int8Linear", "Int8Parameter", "Int8Store", "check_int8", "quantize_linears"]

_REMEDY = (
    "an 8-bit weight cannot be sharded: its gradient and its scales are kept apart from it. Exclude it: fully_shard(module, "
    "ignored_params={p for p in module.parameters() if isinstance(p, Int8Parameter)}); every process then holds it whole, and "
    "QGaLore averages its gradient"
)


class _Int8Meta(type(nn.Parameter)):
    """A forecast's fake tensor cannot be an instance of the subclass; it is marked instead, as torch marks fake parameters."""

    def __instancecheck__(cls, instance: Any) -> bool:
        return super().__instancecheck__(instance) or getattr(instance, "_is_int8", False) is True


class Int8Parameter(nn.Parameter, metaclass=_Int8Meta):
    """A weight in groups of bytes, `w = (code − zero) scale`, which `lowdim.optim.QGaLore` trains.

    An integer tensor has no autograd: `requires_grad` is False, and the layer that uses the weight stores the gradient in
    `float_grad`, where `QGaLore` reads it. Copies, pickles and `torch.save` (also with `weights_only=True`) keep all
    attributes below.

    Args:
        codes: uint8, the weight's shape.
        scales, zeros: `(numel / group_size, 1)`, floating; their dtype is the weight's when it is read.
        group_size: consecutive entries that share a scale.
        stochastic_round: how an optimizer rounds when it writes back.

    Attributes:
        float_grad: gradient in floating point, summed over backward passes, or None.
        trainable: False switches the gradient off; `requires_grad_(flag)` sets it, so that freezing a model works.
        anchor: represents the weight in autograd: a post-accumulate-grad hook on it runs when `float_grad` is ready.

    Raises:
        TypeError: codes are not uint8, scales or zeros not floating.

    Example:
        >>> import torch, lowdim.linalg as la
        >>> from lowdim.optim import Int8Parameter
        >>> p = Int8Parameter(*la.quantize_affine(torch.ones(2, 4), group_size=4), group_size=4)
        >>> p.dtype, p.requires_grad, tuple(p.scales.shape)
        (torch.uint8, False, (2, 1))

    Source: Zhang et al., "Q-GaLore", arXiv 2407.08296.
    """

    scales: Tensor
    zeros: Tensor
    group_size: int
    stochastic_round: bool
    float_grad: Tensor | None
    trainable: bool
    anchor: Tensor

    if TYPE_CHECKING:

        def __init__(
            self, codes: Tensor, scales: Tensor, zeros: Tensor, group_size: int = 256, stochastic_round: bool = True
        ): ...

    def __new__(
        cls,
        codes: Tensor,  # (...) uint8
        scales: Tensor,  # (groups, 1)
        zeros: Tensor,  # (groups, 1)
        group_size: int = 256,
        stochastic_round: bool = True,
    ) -> Int8Parameter:
        """See the class."""
        if codes.dtype != torch.uint8 or not (scales.is_floating_point() and zeros.is_floating_point()):
            raise TypeError(f"codes must be uint8, scales and zeros floating; got {codes.dtype}, {scales.dtype}, {zeros.dtype}")
        if is_sharded(codes):
            raise TypeError(_REMEDY)
        plain: Any = codes.detach()
        if type(plain) is Tensor:
            p = torch.Tensor._make_subclass(cls, plain, False)  # type: ignore[attr-defined]
        else:
            p, plain._is_param, plain._is_int8 = plain, True, True
        p.scales, p.zeros, p.group_size, p.stochastic_round = scales, zeros, group_size, stochastic_round
        p.float_grad, p.trainable = None, True
        p.anchor = torch.zeros((), device=codes.device, requires_grad=True)
        return p

    def requires_grad_(self, requires_grad: bool = True) -> Int8Parameter:
        """Set `trainable`; autograd's own flag stays False."""
        self.trainable = bool(requires_grad)
        return self

    def __deepcopy__(self, memo: dict[int, Any]) -> Int8Parameter:
        if id(self) not in memo:
            memo[id(self)] = _rebuild_int8(self.detach().clone(), *copy.deepcopy(_kept(self), memo))
        return memo[id(self)]

    def __reduce_ex__(self, protocol: Any) -> Any:
        return _rebuild_int8, (self.detach(), *_kept(self))


def _kept(p: Int8Parameter) -> tuple[Any, ...]:
    return p.scales, p.zeros, p.group_size, p.stochastic_round, p.float_grad, p.trainable


def _rebuild_int8(
    codes: Tensor, scales: Tensor, zeros: Tensor, group_size: int, stochastic: bool, grad: Tensor | None, trainable: bool
) -> Int8Parameter:
    p = Int8Parameter(codes, scales, zeros, group_size, stochastic)
    p.float_grad, p.trainable = grad, trainable
    return p


torch.serialization.add_safe_globals([_rebuild_int8])


class Int8Linear(nn.Module):
    """A linear layer whose weight is stored and trained in 8 bits.

    Formula: `y = x Wᵀ + bias`, `W = (codes − zeros) scales`, built in x's dtype (under autocast in its dtype) for each product
    and then freed, also in the backward pass: `grad_x = g W`, `grad_bias = Σ g`, and `gᵀ x` is added to
    `weight.float_grad`, in the wider of the scales' dtype and x's.

    Args:
        weight: `Int8Parameter (out, in)`. `from_linear` makes it.
        bias: `(out,)` or None.

    Attributes:
        scales, zeros: buffers; the same tensors as `weight.scales` and `weight.zeros`.

    Raises:
        TypeError: FSDP has sharded the weight (the message says how to exclude it); x is not floating.
        ValueError: the last dimension of x is not `in_features`.

    Example:
        >>> import torch
        >>> from lowdim.optim import Int8Linear
        >>> layer = Int8Linear.from_linear(torch.nn.Linear(64, 32), group_size=64)
        >>> layer(torch.ones(2, 64)).sum().backward()
        >>> layer.weight.dtype, tuple(layer.weight.float_grad.shape), layer.weight.grad
        (torch.uint8, (32, 64), None)

    Not for layers that are small compared with the activations: each product builds the weight again.

    Source: Zhang et al., "Q-GaLore", arXiv 2407.08296.
    """

    weight: Int8Parameter
    scales: Tensor
    zeros: Tensor

    def __init__(self, weight: Int8Parameter, bias: Tensor | None = None):
        super().__init__()
        self.out_features, self.in_features = weight.shape
        self.weight = weight
        self.bias = bias if bias is None or isinstance(bias, nn.Parameter) else nn.Parameter(bias)

    @classmethod
    def from_linear(cls, linear: nn.Linear, *, group_size: int = 256, stochastic_round: bool = True) -> Int8Linear:
        """The layer with its weight rounded to the nearest code; the bias is copied.

        Raises:
            TypeError: not an nn.Linear.
            ValueError: group_size does not divide the number of weights; NaN or infinity in them.
        """
        codes, scales, zeros = quantize_affine(plain_weight(linear), group_size=group_size)
        weight = Int8Parameter(codes, scales, zeros, group_size, stochastic_round)
        weight.trainable = linear.weight.requires_grad
        bias = None if linear.bias is None else nn.Parameter(linear.bias.detach().clone(), linear.bias.requires_grad)
        return cls(weight, bias).train(linear.training)

    def forward(
        self,
        x: Tensor,  # (..., in_features)
    ) -> Tensor:
        """`(..., out_features)`."""
        weight = self._weight()
        if x.ndim == 0 or x.shape[-1] != self.in_features:
            raise ValueError(f"x must have {self.in_features} features in its last dimension; got shape {tuple(x.shape)}")
        if not x.is_floating_point():
            raise TypeError(f"x must be a floating tensor; got {x.dtype}")
        place, dtype = x.device.type, x.dtype
        if torch.amp.is_autocast_available(place) and torch.is_autocast_enabled(place) and dtype != torch.float64:
            dtype = torch.get_autocast_dtype(place)
        bias = None if self.bias is None else self.bias.to(dtype)
        return cast(Tensor, _Product.apply(x.to(dtype), weight, bias, weight.anchor if weight.trainable else None))

    def dense_weight(self) -> Tensor:
        """The weight `(out, in)` in floating point, in the scales' dtype; no gradient flows to it."""
        return _dense(self._weight())

    @torch.no_grad()
    def to_linear(self) -> nn.Linear:
        """A plain layer with the same function."""
        return make_linear(self.dense_weight(), self.bias, requires_grad=self._weight().trainable).train(self.training)

    def extra_repr(self) -> str:
        """Sizes, for `print(model)`."""
        sizes = f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}"
        return f"{sizes}, group_size={self._weight().group_size}"

    # The buffers stay the parameter's own scales and zeros when it is moved, loaded or shared.

    def __setattr__(self, name: str, value: Any) -> None:
        super().__setattr__(name, value)
        if name == "weight" and isinstance(value, Int8Parameter):
            self._buffers["scales"], self._buffers["zeros"] = value.scales, value.zeros

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Int8Linear:
        weight, before = cast(Int8Parameter, self._parameters["weight"]), self._buffers["scales"]
        kept, scales, zeros, anchor = _kept(weight)[2:], weight.scales, weight.zeros, weight.anchor
        super()._apply(fn, recurse)
        if scales is not before:  # a layer that shares the parameter has already moved it
            self._buffers["scales"], self._buffers["zeros"] = scales, zeros
        self._tie(kept, fn)
        if (moved := self._weight()) is weight and anchor.device != moved.device:
            anchor.data = torch.zeros((), device=moved.device)  # the hooks on it stay
        return self

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *rest: Any) -> None:
        given, errors = state_dict.get(f"{prefix}weight"), rest[-1]
        if isinstance(given, Tensor) and given.is_floating_point():
            errors.append(
                f"{prefix}weight is floating; load it before the layer is quantized, or quantize it: it must be uint8"
            )
            return
        kept = _kept(self._weight())[2:]
        super()._load_from_state_dict(state_dict, prefix, *rest)
        self._tie(kept, lambda t: t)

    def _tie(self, kept: tuple[Any, ...], fn: Callable[[Tensor], Tensor]) -> None:
        found, (scales, zeros) = cast(Any, self._parameters["weight"]), (self._buffers["scales"], self._buffers["zeros"])
        assert scales is not None
        assert zeros is not None
        group_size, stochastic, grad, trainable = kept
        grad = None if grad is None else fn(grad)
        if isinstance(found, Int8Parameter):
            found.scales, found.zeros, found.float_grad = scales, zeros, grad
        else:  # torch has put a plain parameter there
            self.weight = _rebuild_int8(found.detach(), scales, zeros, group_size, stochastic, grad, trainable)

    def _weight(self) -> Int8Parameter:
        weight = self._parameters["weight"]
        if isinstance(weight, Int8Parameter):
            return weight
        assert weight is not None
        if has_numbers(weight):
            raise TypeError(f"{type(self).__name__}: {_REMEDY}")
        total = weight.numel()  # a forecast's copy of the layer
        self.weight = Int8Parameter(weight, self.scales, self.zeros, total // self.scales.numel())
        return self.weight


class _Product(torch.autograd.Function):
    """`x Wᵀ + bias`; the gradient of W goes to `float_grad`, and a zero to the anchor, whose hook then runs."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Int8Parameter, bias: Tensor | None, anchor: Tensor | None) -> Tensor:
        ctx.weight, ctx.version = weight, weight._version
        ctx.save_for_backward(*([] if anchor is None else [x]))
        return F.linear(x, _dense(weight, x.dtype), bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (g,), weight = grads, ctx.weight
        if weight._version != ctx.version:
            raise RuntimeError("an 8-bit weight was changed between the forward pass that used it and this backward pass")
        by_x, _, by_bias, by_weight = ctx.needs_input_grad
        with without_autocast(g.device.type):
            grad_x = g @ _dense(weight, g.dtype) if by_x else None
            grad_bias = g.reshape(-1, g.shape[-1]).sum(0) if by_bias else None
            if not by_weight:
                return grad_x, None, grad_bias, None
            (x,) = ctx.saved_tensors
            _add_product(weight, g.reshape(-1, g.shape[-1]), x.reshape(-1, x.shape[-1]))
        return grad_x, None, grad_bias, torch.zeros_like(weight.anchor)


def _add_product(weight: Int8Parameter, g: Tensor, x: Tensor) -> None:
    """`float_grad ← float_grad + gᵀ x`."""
    wanted, total = torch.promote_types(x.dtype, weight.scales.dtype), weight.float_grad
    if total is None:
        weight.float_grad = (g.mT @ x).to(wanted)
    elif total.dtype == x.dtype:
        total.addmm_(g.mT, x)
    else:
        total.add_(g.mT @ x)


def _dense(p: Int8Parameter, dtype: torch.dtype | None = None) -> Tensor:
    return dequantize_affine(p.detach(), p.scales, p.zeros, group_size=p.group_size, dtype=dtype)


def quantize_linears(
    model: nn.Module, target_modules: Patterns, *, group_size: int = 256, stochastic_round: bool = True
) -> nn.Module:
    """Replace every layer that the patterns match by an `Int8Linear`, in place.

    Args:
        target_modules: as in `lowdim.surgery.find_layers`; None selects every linear layer but the prediction head. A layer
            whose weight is tied to a module of another kind is left unchanged (with a warning if it was named).
        group_size, stochastic_round: as in `Int8Linear.from_linear`.

    Returns:
        The model. Build the optimizer afterwards: the old weights are gone.

    Raises:
        ValueError: a pattern matches nothing, or group_size does not divide a layer's weights (named; the model is
            unchanged).

    Example:
        >>> from torch import nn
        >>> from lowdim.optim import quantize_linears
        >>> type(quantize_linears(nn.Sequential(nn.Linear(64, 8), nn.ReLU()), ["0"], group_size=64)[0]).__name__
        'Int8Linear'

    Source: Zhang et al., "Q-GaLore", arXiv 2407.08296.
    """
    found = find_layers(model, target_modules, accept=is_linear)
    layers, _ = without_tied(model, found, named=target_modules not in (None, "all-linear"))
    how = {"group_size": group_size, "stochastic_round": stochastic_round}
    dtype = float_dtype(model)
    swap_layers(model, layers, lambda _, layer: Int8Linear.from_linear(as_linear(layer, dtype=dtype), **how))
    return model


def check_int8(p: Tensor) -> None:
    """Raise TypeError for a uint8 weight that is no longer an `Int8Parameter`."""
    if p.dtype == torch.uint8 and not isinstance(p, Int8Parameter):
        raise TypeError(f"a uint8 parameter must be an Int8Parameter, which holds its scales. Under FSDP {_REMEDY}")


@dataclass(frozen=True)
class Int8Store(DenseStore):
    """Reads an `Int8Parameter` in float32 or better and requantizes it on writing; other parameters as `DenseStore` does."""

    stochastic = True

    def check(self, p: Tensor) -> None:
        """Integer weights that have scales, and what `DenseStore` keeps."""
        if not isinstance(p, Int8Parameter):
            super().check(p)

    def dtype(self, p: Tensor) -> torch.dtype:
        """That of the scales."""
        return p.scales.dtype if isinstance(p, Int8Parameter) else p.dtype

    def rounds(self, p: Tensor) -> bool:
        """8 and 16-bit parameters."""
        return isinstance(p, Int8Parameter) or super().rounds(p)

    def grad(self, p: Tensor) -> Tensor | None:
        """`float_grad`, or `.grad`."""
        return p.float_grad if isinstance(p, Int8Parameter) else super().grad(p)

    def drop(self, p: Tensor) -> None:
        """Set it to None."""
        if isinstance(p, Int8Parameter):
            p.float_grad = None
        else:
            super().drop(p)

    def read(self, p: Tensor) -> Tensor:
        """A dense copy in floating point, or what `DenseStore` reads."""
        return _dense(p, compute_dtype(p.scales.dtype)) if isinstance(p, Int8Parameter) else super().read(p)

    def write(self, p: Tensor, value: Tensor, generator: torch.Generator | None) -> None:
        """New codes, scales and zeros; the gradient is used up."""
        if not isinstance(p, Int8Parameter):
            return super().write(p, value, generator)
        draws = generator if p.stochastic_round else None
        store_affine(value, p.detach(), p.scales, p.zeros, group_size=p.group_size, generator=draws)
        p.float_grad = None

    def watch(self, p: Tensor, call: Callable[[Tensor], None]) -> Any:
        """A hook that the layer's backward pass triggers once all uses of the weight have added their gradient."""
        if not isinstance(p, Int8Parameter):
            return super().watch(p, call)

        def ready(anchor: Tensor) -> None:
            anchor.grad = None
            call(p)

        return p.anchor.register_post_accumulate_grad_hook(ready)
