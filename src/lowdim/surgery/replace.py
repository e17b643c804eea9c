"""Put other layers in place of a model's layers; weights that were tied stay tied."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from lowdim.errors import NoMatchingModuleError
from lowdim.surgery.placement import carry_hook
from lowdim.surgery.wrappers import is_compiled, submodule, unwrap

__all__ = [
    "freeze",
    "freeze_except",
    "model_device",
    "parent_and_child",
    "replace_layer",
    "replace_layers",
    "swap_layers",
    "tied_parameters",
    "unchanged_on_error",
    "without_tied",
]


def parent_and_child(model: nn.Module, name: str) -> tuple[nn.Module, str]:
    """The parent module of `name`, and its attribute name there."""
    path, _, child = name.rpartition(".")
    return model.get_submodule(path), child


def replace_layer(model: nn.Module, name: str, new: nn.Module) -> None:
    """Put `new` where `name` is. A module with several names is replaced under each of them."""
    replace_layers(model, {name: new})


def replace_layers(model: nn.Module, layers: Mapping[str, nn.Module]) -> None:
    """`replace_layer` for many layers, in one walk over the model.

    A layer that was compiled by itself is replaced together with its wrapper, which would go on calling it.
    """
    _replace(model, {submodule(model, name): new for name, new in layers.items()})


def _replace(model: nn.Module, swaps: Mapping[nn.Module, nn.Module]) -> None:
    for parent in list(model.modules()):
        for name, child in parent._modules.items():
            if child is None:
                continue
            new = swaps.get(unwrap(child) if is_compiled(child) else child)
            if new is not None and parent is not new:
                parent._modules[name] = new


def swap_layers(model: nn.Module, layers: Mapping[str, nn.Module], make: Callable[[str, Any], nn.Module]) -> None:
    """Replace each layer by `make(name, layer)`, in place; layers that share their weight still share it afterwards.

    All new layers are made before any is swapped: after an error the model is unchanged.

    Raises:
        ValueError, TypeError: raised by `make`, with the layer's name in front.
    """
    made: dict[str, nn.Module] = {}
    for name, layer in layers.items():
        try:
            made[name] = make(name, layer)
        except (ValueError, TypeError) as error:
            kind = TypeError if isinstance(error, TypeError) else ValueError
            raise kind(f"layer {name}: {error}") from error
    first: dict[frozenset[int], str] = {}
    for name, layer in layers.items():
        key = frozenset(id(p) for path, p in layer.named_parameters() if path != "bias")
        twin = first.setdefault(key, name)
        if twin != name and key:
            same_bias = getattr(layer, "bias", None) is getattr(layers[twin], "bias", None)
            _share(made[twin], made[name], bias=same_bias)
    for name, new in made.items():
        carry_hook(layers[name], new)
    _replace(model, {layers[name]: new for name, new in made.items()})


def without_tied(
    model: nn.Module, layers: Mapping[str, nn.Module], *, named: bool, within: bool = False
) -> tuple[dict[str, nn.Module], dict[str, list[str]]]:
    """Separate the layers whose weight is also a parameter of another module, such as a head tied to an embedding.

    Args:
        layers: as `find_layers` gives them.
        named: whether the user asked for these layers by name; then skipping one gives a warning.
        within: count ties among `layers` too; without it they may share a weight with each other.

    Returns:
        The free layers, and for each tied one the full names of the other parameters that share its weight.

    Raises:
        NoMatchingModuleError: no layer is free.
    """
    owners: dict[int, list[tuple[nn.Module, str]]] = {}
    for path, module in model.named_modules():
        for name, parameter in module._parameters.items():
            owners.setdefault(id(parameter), []).append((module, f"{path}.{name}"))
    mine = set() if within else set(layers.values())
    tied: dict[str, list[str]] = {}
    for name, layer in layers.items():
        others = [
            path
            for module, path in owners.get(id(getattr(layer, "weight", None)), [])
            if module is not layer and module not in mine
        ]
        if others:
            tied[name] = others
    text = "; ".join(f"{name} shares its weight with {', '.join(others)}" for name, others in tied.items())
    if len(tied) == len(layers):
        raise NoMatchingModuleError(f"no layer is left: {text}. Untie it first, or name other layers in target_modules")
    if tied and named:
        warnings.warn(f"left unchanged because its weight is tied: {text}", UserWarning, stacklevel=3)
    return {name: layer for name, layer in layers.items() if name not in tied}, tied


def tied_parameters(model: nn.Module) -> list[list[str]]:
    """Groups of parameter names that are one tensor."""
    names: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name)
    return [group for group in names.values() if len(group) > 1]


def _share(source: nn.Module, target: nn.Module, *, bias: bool) -> None:
    for path, parameter in source.named_parameters():
        if path != "bias" or bias:
            parent, child = parent_and_child(target, path)
            setattr(parent, child, parameter)


def freeze(model: nn.Module) -> None:
    """Switch off gradients for every parameter of the model."""
    for parameter in model.parameters():
        parameter.requires_grad_(False)


def freeze_except(model: nn.Module, trained: Iterable[nn.Parameter]) -> list[nn.Parameter]:
    """Switch off gradients for every parameter but these; returns each of them once, in their order.

    Example:
        >>> from torch import nn
        >>> from lowdim.surgery import freeze_except
        >>> model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
        >>> len(freeze_except(model, [model[1].weight, model[1].weight])), model[0].weight.requires_grad
        (1, False)
    """
    freeze(model)
    chosen = list(dict.fromkeys(trained))
    for parameter in chosen:
        parameter.requires_grad_(True)
    return chosen


@contextmanager
def unchanged_on_error(model: nn.Module) -> Iterator[None]:
    """Restores the `requires_grad` of every parameter if the block fails."""
    flags = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    try:
        yield
    except BaseException:
        for parameter, flag in flags:
            parameter.requires_grad_(flag)
        raise


def model_device(model: nn.Module) -> torch.device:
    """The device of the model's first parameter (or buffer); the CPU for a model without any."""
    for tensor in (*model.parameters(), *model.buffers()):
        return tensor.device
    return torch.device("cpu")
