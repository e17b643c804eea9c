"""How files describe the module that replaces a layer, and how the module is rebuilt from the description."""

from __future__ import annotations

import functools
import importlib
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from typing import Any, ClassVar, Self, cast

from torch import Tensor, nn

from lowdim.errors import CheckpointError, nearest
from lowdim.surgery import holder, swap_layers

__all__ = ["Rebuildable", "describe_layers", "known_classes", "layer_class", "owner_name", "place_blanks", "remove_added"]

#: Class name in files -> the module that it is imported from.
_HOMES = {
    "BlockDense": "lowdim.layers",
    "BlockShuffle": "lowdim.layers",
    "HouseholderProjector": "lowdim.layers",
    "InterpolativeLinear": "lowdim.modules",
    "LR2VQConv2d": "lowdim.compress",
    "LR2VQLinear": "lowdim.compress",
    "LowRankLinear": "lowdim.modules",
    "MatryoshkaProjection": "lowdim.compress",
    "MixerBlock": "lowdim.layers.core.mixer_block",
    "NMConv2d": "lowdim.compress",
    "NMLinear": "lowdim.compress",
    "PackedLinear": "lowdim.modules",
    "PSTLinear": "lowdim.compress",
    "PrunedLinear": "lowdim.modules",
    "StructuredMLP": "lowdim.layers.structured_ffn.mlp",
    "WINALinear": "lowdim.compress",
    "WeLoreLinear": "lowdim.compress",
}

_DEFINED: dict[str, type[Rebuildable]] = {}


class Rebuildable(ABC):
    """Mixin for a module that replaces a layer and can be rebuilt from a file.

    A file holds the tensors of its state dict and, as JSON, its class name and `description()`. A reader builds the dense
    model, replaces each such layer by `blank(layer, **description)`, fills in the tensors and calls `after_loading()`.
    Subclasses outside lowdim are found by their name once their module has been imported.

    Attributes:
        added: the module is added to a layer, under a name of its own, and replaces none: `blank` gets the layer that it is
            added to, the file also loads without lowdim (as the dense model), and `dequantize` takes the module away.
        same_when_dense: its plain equivalent gives the same outputs; False for one that leaves out inputs.

    Example:
        >>> from torch import nn
        >>> from lowdim.modules import LowRankLinear
        >>> layer = LowRankLinear(6, 4, rank=2)
        >>> layer.description()
        {'rank': 2, 'bias': True}
        >>> LowRankLinear.blank(nn.Linear(6, 4), **layer.description()).A.device.type
        'meta'
    """

    added: ClassVar[bool] = False
    same_when_dense: ClassVar[bool] = True

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

    @classmethod  # noqa: B027
    def enter(cls, model: nn.Module) -> None:
        """Called once the tensors of a model with modules of this class are loaded, for what concerns the model as a whole."""

    @classmethod  # noqa: B027
    def leave(cls, model: nn.Module) -> None:
        """Undo `enter`, once the modules of this class have been taken away."""


def layer_class(name: str) -> type[Rebuildable]:
    """The class that files call `name`.

    Raises:
        CheckpointError: lowdim has no such class, and no imported module has defined one.
    """
    if name in _HOMES:
        return _own_class(name)
    if name in _DEFINED:
        return _DEFINED[name]
    close = ", ".join(nearest(name, [*_HOMES, *_DEFINED]))
    raise CheckpointError(
        f"the file names a layer class {name!r}, which this version of lowdim does not have (nearest: {close}); "
        "update lowdim, or import the module that defines it first"
    )


@functools.cache
def _own_class(name: str) -> type[Rebuildable]:
    return getattr(importlib.import_module(_HOMES[name]), name)


def known_classes() -> Iterator[type[Rebuildable]]:
    """Lowdim's own classes, in the order in which they try to recognise tensors."""
    return (layer_class(name) for name in _HOMES)


def describe_layers(model: nn.Module) -> dict[str, dict[str, Any]]:
    """`{module name: {"class": its class, ...description}}` of each rebuildable module, in model order.

    A module inside another one that replaces a layer is made with it, and is not listed.

    Example:
        >>> from torch import nn
        >>> from lowdim.modules import LowRankLinear, describe_layers
        >>> describe_layers(nn.Sequential(nn.Linear(4, 6), LowRankLinear(6, 4, rank=2)))
        {'1': {'class': 'LowRankLinear', 'rank': 2, 'bias': True}}
    """
    found: dict[str, dict[str, Any]] = {}
    whole: set[str] = set()  # what replaces a layer with all that is inside
    for name, module in model.named_modules():
        if isinstance(module, Rebuildable) and holder(name, whole) is None:
            found[name] = {"class": type(module).__name__, **module.description()}
            whole |= set() if module.added else {name}
    return found


def place_blanks(model: nn.Module, layers: Mapping[str, Mapping[str, Any]]) -> None:
    """Replace the model's modules by those that `layers` describes, in place; their tensors are loaded later.

    Raises:
        CheckpointError: a name that is not a module of the model, an unknown class, a description that does not fit the layer.
            The model is then unchanged.
    """
    modules = dict(model.named_modules(remove_duplicate=False))
    for name, about in layers.items():
        if owner_name(name, about) not in modules:
            raise CheckpointError(
                f"the file describes a layer {name!r}, which {type(model).__name__} does not have; "
                f"nearest: {', '.join(nearest(name, modules))}"
            )
    added = {name: about for name, about in layers.items() if _class(about).added}
    try:
        made = {name: _blank(modules[owner_name(name, about)], about) for name, about in added.items()}
        replaced = {name: modules[name] for name in layers if name not in added}
        swap_layers(model, replaced, lambda name, layer: _blank(layer, layers[name]))
    except (ValueError, TypeError) as error:
        raise CheckpointError(f"the file's descriptions do not fit {type(model).__name__}: {error}") from error
    for name, module in made.items():
        owner, _, leaf = name.rpartition(".")
        model.get_submodule(owner).add_module(leaf, module)


def owner_name(name: str, description: Mapping[str, Any]) -> str:
    """The name of the module that the description is about: `name` itself, or the layer to which it adds a module."""
    return name.rpartition(".")[0] if _class(description).added else name


def _class(description: Mapping[str, Any]) -> type[Rebuildable]:
    if "class" not in description:
        raise CheckpointError(f"a description in the file lacks 'class'; got {dict(description)!r}")
    return layer_class(description["class"])


def remove_added(model: nn.Module) -> None:
    """Take away every rebuildable module that replaces no layer, in place; the model is then as before they were added."""
    found = {name: module for name, module in model.named_modules() if isinstance(module, Rebuildable) and module.added}
    for name in found:
        owner, _, leaf = name.rpartition(".")
        delattr(model.get_submodule(owner), leaf)
    for kind in {type(module) for module in found.values()}:
        kind.leave(model)


def _blank(layer: nn.Module, description: Mapping[str, Any]) -> nn.Module:
    try:
        made = layer_class(description["class"]).blank(layer, **{k: v for k, v in description.items() if k != "class"})
    except KeyError as error:
        raise ValueError(f"its description lacks {error}; got {dict(description)!r}") from None
    return cast(nn.Module, made)
