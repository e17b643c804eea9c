"""Turning the linear layers of a model into structured ones, and back."""

from __future__ import annotations

import inspect
from collections.abc import Iterable
from typing import Any, cast

import torch
from torch import nn

from lowdim.errors import refuse_strange
from lowdim.linalg import derive_seed
from lowdim.modules import StructuredLinear
from lowdim.surgery import (
    Patterns,
    as_linear,
    find_layers,
    float_dtype,
    holder,
    is_linear,
    swap_layers,
    without_tied,
)

__all__ = ["densify", "plain_layers", "structured_layers", "swap_linear"]


#: Arguments of structured layers that the replaced layer determines.
_OF_THE_LAYER = frozenset({"linear", "in_features", "out_features", "bias", "device", "dtype"})


def swap_linear(
    model: nn.Module,
    layer_class: type[nn.Module],
    target_modules: Patterns = None,
    *,
    exclude: Iterable[str] = (),
    fresh: bool = False,
    cap_rank: bool = False,
    **how: Any,
) -> nn.Module:
    """Replace linear layers by structured ones, in place: the start of dense-to-sparse fine-tuning.

    Args:
        layer_class: a class with `from_linear(linear, **how)`, such as Monarch or LowRankLinear.
        target_modules: see `lowdim.surgery.find_layers`; None selects every nn.Linear and Conv1D but the prediction head. A
            layer whose weight is tied to another module is left unchanged (with a warning if it was requested by name).
        exclude: skip layers whose name contains one of these.
        fresh: draw new weights, `layer_class(in, out, bias, **how)`, instead of approximating the trained ones; for training
            from scratch, and for forecasts on the meta device.
        cap_rank: give a layer whose smaller side is below `rank` that side as its rank, where it would be refused.
        how: hyperparameters of the layer; a `seed` among them seeds all layers: each derives its own seed from it and its
            name.

    Returns:
        The model. Build the optimizer afterwards: the old parameters are gone.

    Raises:
        TypeError: `layer_class` has no `from_linear`, or no hyperparameter of that name.
        ValueError: a pattern matches nothing, or a layer does not allow the hyperparameters, such as a rank above its smaller
            side without `cap_rank` (named; the model is unchanged).

    Example:
        >>> from torch import nn
        >>> from lowdim.layers import Monarch, swap_linear
        >>> type(swap_linear(nn.Sequential(nn.Linear(8, 8), nn.ReLU()), Monarch, nblocks=2)[0]).__name__
        'Monarch'
    """
    make = getattr(layer_class, "from_linear", None)
    if not callable(make):
        raise TypeError(f"layer_class must have from_linear(linear, **how); got {layer_class!r}")
    known = inspect.signature(layer_class if fresh else make).parameters
    if not any(p.kind is p.VAR_KEYWORD for p in known.values()):
        refuse_strange(layer_class.__name__, how, [name for name in known if name not in _OF_THE_LAYER])
    found = find_layers(model, target_modules, exclude=exclude, accept=is_linear)
    layers, _ = without_tied(model, found, named=target_modules not in (None, "all-linear"))

    dtype = float_dtype(model)

    def convert(name: str, layer: nn.Module) -> nn.Module:
        new = structured(name, layer)
        return new.take_place_of(layer) if isinstance(new, StructuredLinear) else new

    def structured(name: str, layer: nn.Module) -> nn.Module:
        linear = as_linear(layer, dtype=dtype)
        own: dict[str, Any] = {} if how.get("seed") is None else {"seed": derive_seed(how["seed"], "layer", name) % 2**31}
        limit = min(linear.in_features, linear.out_features)
        if "rank" in how and isinstance(how["rank"], int) and how["rank"] > limit:
            if not cap_rank:
                raise ValueError(
                    f"rank must be an int in [1, {limit}]; got {how['rank']}; swap_linear(..., cap_rank=True) caps it"
                )
            own["rank"] = limit
        if not fresh:
            return cast(nn.Module, make(linear, **{**how, **own}))
        weight = linear.weight
        shape = linear.in_features, linear.out_features, linear.bias is not None
        return layer_class(*shape, device=weight.device, dtype=weight.dtype, **{**how, **own}).train(layer.training)

    swap_layers(model, layers, convert)
    return model


def densify(model: nn.Module) -> nn.Module:
    """Replace every submodule that has `to_plain`, `to_linear` or `to_conv` by its plain equivalent, in place.

    Modules and weights that are tied stay tied. A module inside another one with such a method is replaced with it.

    Returns:
        The model, or the new layer if the model itself has one. Build a new optimizer afterwards: the old one holds
        tensors that are no longer trained. Under FSDP2 gather the parameters first.

    Example:
        >>> from torch import nn
        >>> from lowdim.layers import Monarch, densify
        >>> type(densify(nn.Sequential(Monarch(8, 8), nn.ReLU()))[0]).__name__
        'Linear'

    Source: Dao et al., "Monarch", ICML 2022, arXiv 2204.00595.
    """
    if (plain := _plain(model)) is not None:
        return plain()
    layers = structured_layers(model)
    with torch.no_grad():
        swap_layers(model, layers, lambda _, layer: _plain(layer)())
    return model


@torch.no_grad()
def plain_layers(model: nn.Module) -> dict[str, nn.Module]:
    """`{module name: plain layer}` for each submodule that `densify` would replace; the model is unchanged."""
    return {name: _plain(layer)() for name, layer in structured_layers(model).items()}


def structured_layers(model: nn.Module) -> dict[str, nn.Module]:
    """The submodules that `densify` would replace, by name; one inside another is not listed."""
    layers: dict[str, nn.Module] = {}
    for name, module in model.named_modules():
        if holder(name, layers) is None and _plain(module) is not None:
            layers[name] = module
    return layers


def _plain(module: nn.Module) -> Any:
    """The method that returns a plain layer (of the original class, linear, or a convolution), or None."""
    return next((m for name in ("to_plain", "to_linear", "to_conv") if callable(m := getattr(module, name, None))), None)
