"""A layer with one trained update; adapters that share a layer are nested wrappers."""

from __future__ import annotations

from collections import OrderedDict
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lowdim.adapters.core.convolution import convolve
from lowdim.adapters.core.update import WeightUpdate
from lowdim.errors import check_float
from lowdim.linalg import is_sharded, low_rank_norm, wide
from lowdim.surgery import (
    behaviour,
    dense_matrix,
    describe,
    is_linear_class,
    is_quantized,
    layer_dtype,
    shallow_copy,
    with_matrix,
)

__all__ = ["AdaptedLayer", "gain_of", "kind_of", "padding_of"]

#: What nn.Module keeps of the hooks that act on its input, output and gradients.
_HOOKS = (
    "_forward_hooks",
    "_forward_hooks_with_kwargs",
    "_forward_hooks_always_called",
    "_forward_pre_hooks",
    "_forward_pre_hooks_with_kwargs",
    "_backward_hooks",
    "_backward_pre_hooks",
)


#: Types of a layer's sizes and settings.
_SETTINGS = (int, float, str, tuple)


class AdaptedLayer(nn.Module):
    """A frozen layer with a trained update: `y = base(x) + update(dropout(x))`.

    Works over nn.Linear, transformers' Conv1D, nn.Conv2d (the update acts on patches; with groups, through the small dense
    kernel) and, where the update can look up columns, nn.Embedding; also over quantized linear layers and over another
    AdaptedLayer.

    An update may replace a part of the pre-trained weight, `start()`. If the base is a plain layer, that part is subtracted
    once from a copy of its weight (`rebased`); a quantized base, or one that other adapters share, is unchanged and the part
    is subtracted from the output. In both cases the layer computes `y = W₀ x + strength · (update(x) − start x)`.

    Attributes:
        base: the frozen layer; an AdaptedLayer where several adapters share one.
        update: the trained part.
        strength: factor of ΔW; 1 while training, 0 switches the adapter off.
        rows: which rows of the batch the adapter acts on, `(n,)` int64; None for all.
    """

    def __init__(self, layer: nn.Module, update: WeightUpdate, dropout: float = 0.0):
        super().__init__()
        check_float("dropout", dropout, 0.0, 1.0, high_open=True)
        shares = isinstance(layer, AdaptedLayer)
        self.gain = gain_of(layer)
        layer = self._take_hooks(layer)
        if not shares:
            for parameter in layer.parameters():
                parameter.requires_grad_(False)
        weight = layer.pristine_weight() if isinstance(layer, AdaptedLayer) else dense_matrix(layer)
        matrix = update.rebase(weight.detach())
        self.taken = matrix is not None
        self.rebased = matrix is not None and not shares and not is_quantized(layer)
        self.base = with_matrix(layer, matrix) if matrix is not None and self.rebased else layer
        self.update = update
        update.padding_idx = padding_of(layer)
        self.dropout = dropout
        self.kind = kind_of(layer)
        self.strength = 1.0
        self.rows: Tensor | None = None
        self.output_dtype: torch.dtype | None = layer.output_dtype if isinstance(layer, AdaptedLayer) else None
        if not layer.training:  # a new module trains
            self.eval()

    def _take_hooks(self, layer: nn.Module) -> nn.Module:
        """Move the layer's hooks here. The given layer keeps its own unless it is an AdaptedLayer: a copy is wrapped."""
        if not any(layer.__dict__[name] for name in _HOOKS) or any(is_sharded(p) for p in layer.parameters()):
            return layer
        taken = {name: layer.__dict__[name] for name in _HOOKS}
        bare = layer if isinstance(layer, AdaptedLayer) else shallow_copy(layer)
        bare.__dict__.update({name: OrderedDict() for name in _HOOKS})
        self.__dict__.update(taken, _is_full_backward_hook=layer._is_full_backward_hook)
        return bare

    def _give_hooks(self, layer: nn.Module) -> nn.Module:
        """`layer` with the hooks of this one as well; the dictionaries are shared, so that handles stay valid."""
        for name in _HOOKS:
            mine, other = self.__dict__[name], layer.__dict__[name]
            if mine:
                layer.__dict__[name] = OrderedDict({**other, **mine}) if other else mine
        if self._is_full_backward_hook is not None:
            layer._is_full_backward_hook = self._is_full_backward_hook
        return layer

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """The base layer's output plus the update's."""
        y = self.base(x, *args, **kwargs)
        if self.strength == 1.0 and self.rows is None and self.taken == self.rebased:
            return self._add(y, x)
        if self.rebased:  # y is (W₀ − start) x so far
            y = y + self._like(self._start(x), y)
        if self.strength == 0.0:
            return y
        if self.rows is None:
            return y + self._like(self._change(x), y)
        rows = self.rows
        return y.index_add(0, rows.to(y.device), self._like(self._change(x[rows.to(x.device)]), y))

    def _add(self, y: Tensor, x: Tensor) -> Tensor:
        if self.kind == "embedding":
            return y + self._like(self._looked_up(x), y)
        x = self._ready(self._drop(x))
        if self.kind.startswith("conv"):
            return y + self._like(convolve(self.update, cast(nn.Conv2d, self.plain), x), y)
        if self._is_placed():
            return y + self._like(self.update(x), y)
        return self.update.add_to(y, x, inplace=self._may_overwrite())

    def _change(self, x: Tensor) -> Tensor:
        """`strength · (update(x) − start x)`."""
        if self.kind == "embedding":
            return self.strength * self._looked_up(x)
        dropped = self._ready(self._drop(x))
        if self.kind.startswith("conv"):
            out = convolve(self.update, cast(nn.Conv2d, self.plain), dropped)
        else:
            out = self.update(dropped)
        out = out - self._start(x).to(out.dtype) if self.taken else out
        return out if self.strength == 1.0 else self.strength * out

    def _looked_up(self, index: Tensor) -> Tensor:
        found = self.update.columns(index.to(self._place(index)) if self._is_placed() else index)
        return found if self.gain == 1.0 else found * self.gain

    def _start(self, x: Tensor) -> Tensor:
        x = self._ready(x)
        if self.kind.startswith("conv"):
            conv, start = cast(nn.Conv2d, self.plain), self.update.start()
            assert start is not None
            return conv._conv_forward(x, start.to(x.dtype).view(conv.weight.shape), None)
        return self.update.start_forward(x)

    def delta(self) -> Tensor:
        """`W_eff − W₀` as a matrix `(out, in)`, in float32 or better; of this adapter only."""
        delta = self.update.delta()
        return delta if self.strength == 1.0 else self.strength * delta

    def delta_norm(self) -> float:
        """`‖W_eff − W₀‖_F`, from thin factors where the update has them."""
        with torch.no_grad():
            factors = self.update.low_rank_delta()
            norm = torch.linalg.matrix_norm(self.update.delta()) if factors is None else low_rank_norm(*map(wide, factors))
            return abs(self.strength) * float(norm)

    @torch.no_grad()
    def effective_weight(self) -> Tensor:
        """`W_eff (out, in)` in float32 or better, with every adapter that the layer has."""
        base = self.base.effective_weight() if isinstance(self.base, AdaptedLayer) else wide(dense_matrix(self.base))
        if self.strength == 1.0 and self.taken == self.rebased:
            return base + self.update.exact()
        start = self.update.start()
        if self.rebased and start is not None:
            base = base + wide(start)
        return base + self.delta() if self.strength else base

    @torch.no_grad()
    def original_weight(self) -> Tensor:
        """The weight before this adapter was attached, `(out, in)`, up to the rounding of a rebased weight."""
        if isinstance(self.base, AdaptedLayer):
            return self.base.effective_weight()
        base, start = dense_matrix(self.base), self.update.start()
        return (wide(base) + wide(start)).to(base.dtype) if self.rebased and start is not None else base

    def pristine_weight(self) -> Tensor:
        """`W₀ (out, in)` under all adapters of the layer, up to the rounding of a rebased weight."""
        return self.base.pristine_weight() if isinstance(self.base, AdaptedLayer) else self.original_weight()

    def merged(self, weight: Tensor | None = None) -> nn.Module:
        """A plain layer with `W_eff`, computed in float32 or better and rounded once; `weight` is `effective_weight()`."""
        exact = self.effective_weight() if weight is None else weight
        plain = with_matrix(self.plain, exact, dtype=self.output_dtype)
        layer: nn.Module = self
        while isinstance(layer, AdaptedLayer):
            plain, layer = layer._give_hooks(plain), layer.base
        return plain

    def released(self) -> nn.Module:
        """The base without this adapter, with its original weight and its hooks."""
        base = with_matrix(self.base, self.original_weight()) if self.rebased else self.base
        return self._give_hooks(base)

    @property
    def plain(self) -> nn.Module:
        """The layer under all adapters."""
        return self.base.plain if isinstance(self.base, AdaptedLayer) else self.base

    @property
    def weight(self) -> Tensor:
        """The frozen base weight in the layer's own layout; for code that reads a layer's dtype or device."""
        return cast(Tensor, self.base.weight)

    @property
    def bias(self) -> Tensor | None:
        """The base layer's bias."""
        return cast("Tensor | None", getattr(self.base, "bias", None))

    @property
    def in_features(self) -> int:
        """Columns of the weight matrix."""
        return self.update.in_features

    @property
    def out_features(self) -> int:
        """Rows of the weight matrix."""
        return self.update.out_features

    def __getattr__(self, name: str) -> Any:
        """Sizes and settings of the layer (`stride`, `num_embeddings`), which code around it may ask for."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            modules = self.__dict__.get("_modules") or {}
            value = getattr(modules.get("base"), name, None) if not name.startswith("_") else None
            if isinstance(value, _SETTINGS):
                return value
            raise

    def update_dtype(self) -> torch.dtype:
        """The dtype of the trained tensors."""
        parameter = next(self.update.parameters(), None)
        return layer_dtype(self.plain) if parameter is None else parameter.dtype

    def _drop(self, x: Tensor) -> Tensor:
        return F.dropout(x, self.dropout) if self.dropout and self.training else x

    def _is_placed(self) -> bool:
        """Whether accelerate moves inputs and outputs of the base or of the update, which may then be on several devices."""
        return "_hf_hook" in self.plain.__dict__ or "_hf_hook" in self.update.__dict__

    def _like(self, out: Tensor, y: Tensor) -> Tensor:
        return out.to(y) if self._is_placed() else out.to(y.dtype)

    def _place(self, x: Tensor) -> torch.device:
        """The device of the update's tensors; that of `x` if it has none, or accelerate has offloaded them."""
        tensor = next(self.update.parameters(), None)
        return x.device if tensor is None or tensor.is_meta else tensor.device

    def _ready(self, x: Tensor) -> Tensor:
        """The input for the update: on its device, in its dtype, scaled as the base scales its product."""
        if self.gain != 1.0:
            x = x * self.gain
        parameter = next(self.update.parameters(), None)
        if parameter is None:
            return x
        if self._is_placed():
            x = x.to(self._place(x))
        if x.dtype == parameter.dtype or torch.is_autocast_enabled(x.device.type):
            return x
        return x.to(parameter.dtype)

    def _may_overwrite(self) -> bool:
        # Only a hook or another class needs a linear layer's output; under autograd a copy is cheaper than an in-place
        # change.
        return not torch.is_grad_enabled() and type(self.base) is nn.Linear and not self.base._forward_hooks


def gain_of(layer: nn.Module) -> float:
    """The factor by which the layer scales the product with its weight: 1 for a plain one.

    Raises:
        TypeError: the layer does more than its class says, so an update of its weight would mean something else there.
    """
    if isinstance(layer, AdaptedLayer):
        return layer.gain
    found = behaviour(layer)
    if found.reason:
        raise TypeError(f"{describe(layer)} cannot be adapted: {found.reason}")
    return found.gain


def padding_of(layer: nn.Module) -> int | None:
    """The row of an embedding that is not trained, nor by an adapter; None if there is none."""
    plain = layer.plain if isinstance(layer, AdaptedLayer) else layer
    return plain.padding_idx if isinstance(plain, nn.Embedding) else None


def kind_of(layer: nn.Module) -> str:
    """`"linear"`, `"conv1d"`, `"conv2d"`, `"conv3d"` (convolutions), `"embedding"`, or `"other"`."""
    if isinstance(layer, AdaptedLayer):
        return layer.kind
    kinds = {nn.Conv1d: "conv1d", nn.Conv2d: "conv2d", nn.Conv3d: "conv3d", nn.Embedding: "embedding", nn.Linear: "linear"}
    found = next((kind for cls, kind in kinds.items() if isinstance(layer, cls)), None)
    return found or ("linear" if is_linear_class(layer) else "other")
