"""Loading a compressed model's tensors into a freshly built dense one."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, cast

from torch import Tensor, nn

from lowdim.errors import CheckpointError
from lowdim.modules import Rebuildable, layer_class
from lowdim.modules.rebuildable import known_classes
from lowdim.surgery import describe, holder, is_matrix_layer, shallow_copy, swap_layers, tied_parameters

__all__ = ["load_compressed", "load_low_rank"]


def load_compressed(
    model: nn.Module,
    tensors: Mapping[str, Tensor],
    layers: Mapping[str, Mapping[str, Any]] | None = None,
) -> nn.Module:
    """Load the state of a compressed model into a freshly built dense one, in place.

    For models outside transformers; for transformers models `lowdim.pretrained` writes checkpoints that do not need this call.
    Layers are replaced as `layers` describes. Without `layers`, lowdim's classes are recognised where their tensors alone
    identify them: `NAME.A` and `NAME.B` make a LowRankLinear. The dtype of a new layer is the file's. A tensor that is tied
    to one in the file may be missing.

    Args:
        tensors: the compressed model's state dict.
        layers: the result of `lowdim.modules.describe_layers` for the compressed model.

    Returns:
        The model.

    Raises:
        CheckpointError: tensors or descriptions do not fit the model, which is then unchanged.

    Example:
        >>> from torch import nn
        >>> from lowdim.compress import LowRankLinear, load_compressed
        >>> small = nn.Sequential(LowRankLinear(6, 4, rank=2), nn.ReLU())
        >>> type(load_compressed(nn.Sequential(nn.Linear(6, 4), nn.ReLU()), small.state_dict())[0]).__name__
        'LowRankLinear'
    """
    described = _recognised(model, tensors) if layers is None else {name: dict(about) for name, about in layers.items()}
    old = {name: _module(model, name) for name in described}
    own: dict[str, dict[str, Tensor]] = {name: {} for name in old}
    for key, value in tensors.items():
        name = holder(key, own)
        if name is not None:
            own[name][key.removeprefix(f"{name}.")] = value
    made = {name: _filled(name, layer, described[name], own[name]) for name, layer in old.items()}
    _check_rest(model, tensors, old)
    swap_layers(model, old, lambda name, _: made[name])
    rest = {name: value for name, value in tensors.items() if name.rpartition(".")[0] not in made}
    model.load_state_dict(rest, strict=False)
    return model


def load_low_rank(model: nn.Module, tensors: Mapping[str, Tensor]) -> nn.Module:
    """`load_compressed` under its earlier name, for models whose layers are low-rank."""
    return load_compressed(model, tensors)


def _recognised(model: nn.Module, tensors: Mapping[str, Tensor]) -> dict[str, dict[str, Any]]:
    """The descriptions that the tensors imply for the linear and convolution layers of the model."""
    own: dict[str, dict[str, Tensor]] = {}
    for key, value in tensors.items():
        name, _, leaf = key.rpartition(".")
        own.setdefault(name, {})[leaf] = value
    found: dict[str, dict[str, Any]] = {}
    for name, layer in model.named_modules(remove_duplicate=False):
        if name not in own or not is_matrix_layer(layer):
            continue
        for kind in known_classes():
            about = kind.recognise(layer, own[name])
            if about is not None:
                found[name] = {"class": kind.__name__, **about}
                break
    return found


def _module(model: nn.Module, name: str) -> nn.Module:
    try:
        return model.get_submodule(name)
    except AttributeError:
        raise CheckpointError(f"layers describes {name!r}, which {type(model).__name__} does not have") from None


def _filled(name: str, layer: nn.Module, description: Mapping[str, Any], own: Mapping[str, Tensor]) -> nn.Module:
    """The module that replaces the layer, with its own tensors; the layer is unchanged."""
    details = {key: value for key, value in description.items() if key != "class"}
    try:
        new: Any = layer_class(description["class"]).blank(_without_numbers(layer), **details)
        new.load_state_dict({key: value.detach().clone() for key, value in own.items()}, strict=True, assign=True)
    except (KeyError, TypeError, ValueError, RuntimeError) as error:
        sizes = ", ".join(f"{key} {tuple(value.shape)}" for key, value in own.items())
        reason = " ".join(str(error).split())
        raise CheckpointError(
            f"layer {name} is a {describe(layer)}, and its tensors in the file do not fit: {sizes or 'none'} ({reason})"
        ) from error
    cast(Rebuildable, new).after_loading()
    device = cast(Tensor, layer.weight).device
    return (new if device.type == "meta" else new.to(device)).train(layer.training)


def _without_numbers(layer: nn.Module) -> nn.Module:
    """A copy of a layer on the meta device."""
    copy = shallow_copy(layer)
    for key, parameter in copy._parameters.items():
        if parameter is not None:
            copy._parameters[key] = nn.Parameter(parameter.detach().to("meta"), parameter.requires_grad)
    return copy


def _check_rest(model: nn.Module, tensors: Mapping[str, Tensor], layers: Mapping[str, nn.Module]) -> None:
    own = {name: value for name, value in model.state_dict().items() if name.rpartition(".")[0] not in layers}
    rest = {name: value for name, value in tensors.items() if name.rpartition(".")[0] not in layers}
    ties = {name: group for group in tied_parameters(model) for name in group}
    missing = {name for name in own.keys() - rest.keys() if not any(other in rest for other in ties.get(name, []))}
    misshapen = {name for name in own.keys() & rest.keys() if own[name].shape != rest[name].shape}
    wrong = sorted(missing | misshapen | (rest.keys() - own.keys()))
    if wrong:
        raise CheckpointError(
            f"the tensors do not fit {type(model).__name__}: {', '.join(wrong[:5])}"
            f"{' ...' if len(wrong) > 5 else ''} missing, unexpected or of the wrong shape"
        )
