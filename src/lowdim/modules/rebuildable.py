"""How files describe the module that replaces a layer, and how the module is rebuilt from the description."""

from __future__ import annotations

import importlib
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from typing import Any, Self, cast

from torch import Tensor, nn

from lowdim.errors import CheckpointError, nearest
from lowdim.surgery import swap_layers

__all__ = ["Rebuildable", "describe_layers", "known_classes", "layer_class", "place_blanks"]

#: Class name in files -> the module that it is imported from.
_HOMES = {
    "InterpolativeLinear": "lowdim.modules",
    "LowRankLinear": "lowdim.modules",
    "WeLoreLinear": "lowdim.compress",
}

_DEFINED: dict[str, type[Rebuildable]] = {}


class Rebuildable(ABC):
    """Mixin for a module that replaces a layer and can be rebuilt from a file.

    A file holds the tensors of its state dict and, as JSON, its class name and `description()`. A reader builds the dense
    model, replaces each such layer by `blank(layer, **description)`, fills in the tensors and calls `after_loading()`.
    Subclasses outside lowdim are found by their name once their module has been imported.

    Example:
        >>> from torch import nn
        >>> from lowdim.modules import LowRankLinear
        >>> layer = LowRankLinear(6, 4, rank=2)
        >>> layer.description()
        {'rank': 2, 'bias': True}
        >>> LowRankLinear.blank(nn.Linear(6, 4), **layer.description()).A.device.type
        'meta'
    """

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        _DEFINED[cls.__name__] = cls

    @abstractmethod
    def description(self) -> dict[str, Any]:
        """What `blank` needs besides the layer: JSON values only."""

    @classmethod
    @abstractmethod
    def blank(cls, layer: nn.Module, **description: Any) -> Self:
        """A module without numbers that replaces `layer`; on the meta device where `layer` is."""

    @classmethod
    def recognise(cls, layer: nn.Module, tensors: Mapping[str, Tensor]) -> dict[str, Any] | None:
        """The description that the tensors under the name of `layer` imply, or None; for files without descriptions."""
        return None

    def after_loading(self) -> None:  # noqa: B027 (most classes have nothing to do)
        """Called once the tensors are loaded: unpack codes, recompute what depends on them."""


def layer_class(name: str) -> type[Rebuildable]:
    """The class that files call `name`.

    Raises:
        CheckpointError: lowdim has no such class, and no imported module has defined one.
    """
    if name in _HOMES:
        return getattr(importlib.import_module(_HOMES[name]), name)
    if name in _DEFINED:
        return _DEFINED[name]
    close = ", ".join(nearest(name, [*_HOMES, *_DEFINED]))
    raise CheckpointError(
        f"the file names a layer class {name!r}, which this version of lowdim does not have (nearest: {close}); "
        "update lowdim, or import the module that defines it first"
    )


def known_classes() -> Iterator[type[Rebuildable]]:
    """Lowdim's own classes, in the order in which they try to recognise tensors."""
    return (layer_class(name) for name in _HOMES)


def describe_layers(model: nn.Module) -> dict[str, dict[str, Any]]:
    """`{module name: {"class": its class, ...description}}` of each rebuildable module, in model order.

    Example:
        >>> from torch import nn
        >>> from lowdim.modules import LowRankLinear, describe_layers
        >>> describe_layers(nn.Sequential(nn.Linear(4, 6), LowRankLinear(6, 4, rank=2)))
        {'1': {'class': 'LowRankLinear', 'rank': 2, 'bias': True}}
    """
    return {
        name: {"class": type(module).__name__, **module.description()}
        for name, module in model.named_modules()
        if isinstance(module, Rebuildable)
    }


def place_blanks(model: nn.Module, layers: Mapping[str, Mapping[str, Any]]) -> None:
    """Replace the model's modules by those that `layers` describes, in place; their tensors are loaded later.

    Raises:
        CheckpointError: a name that is not a module of the model, an unknown class, a description that does not fit the layer.
            The model is then unchanged.
    """
    modules = dict(model.named_modules(remove_duplicate=False))
    for name in layers:
        if name not in modules:
            raise CheckpointError(
                f"the file describes a layer {name!r}, which {type(model).__name__} does not have; "
                f"nearest: {', '.join(nearest(name, modules))}"
            )
    try:
        swap_layers(model, {name: modules[name] for name in layers}, lambda name, layer: _blank(layer, layers[name]))
    except (ValueError, TypeError) as error:
        raise CheckpointError(f"the file's descriptions do not fit {type(model).__name__}: {error}") from error


def _blank(layer: nn.Module, description: Mapping[str, Any]) -> nn.Module:
    try:
        made = layer_class(description["class"]).blank(layer, **{k: v for k, v in description.items() if k != "class"})
    except KeyError as error:
        raise ValueError(f"its description lacks {error}; got {dict(description)!r}") from None
    return cast(nn.Module, made)
