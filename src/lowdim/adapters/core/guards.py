"""Checks and context managers for attaching and loading: names in errors, ties, digests, fused code paths."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from lowdim.errors import CheckpointError, NoMatchingModuleError, nearest
from lowdim.linalg import gather, is_sharded
from lowdim.surgery import (
    dense_matrix,
    describe,
    named_layers,
    refuse_offloaded,
    refuse_other_adapters,
    tied_parameters,
    unwrap,
)

__all__ = [
    "FusedPaths",
    "error_context",
    "plain_model",
    "pristine_matrix",
    "refuse_missing",
    "saved_modules",
    "tied_layers",
    "whole_parameters",
]


@contextmanager
def error_context(who: str, name: str, layer: nn.Module):
    """Adds method, layer name and shape to an error raised inside, keeping its type."""
    try:
        yield
    except CheckpointError as error:
        raise CheckpointError(f"layer {name}: {error}") from error
    except (ValueError, TypeError) as error:
        kind = TypeError if isinstance(error, TypeError) else ValueError
        raise kind(f"{who} on layer {name} ({describe(layer)}): {error}") from error


def plain_model(model: nn.Module) -> nn.Module:
    """The model inside what it is wrapped in.

    Raises:
        ValueError: it is wrapped for several processes, which would not see parameters that are added now; or it carries
            another library's adapter.
    """
    if isinstance(model, nn.parallel.DistributedDataParallel) and torch.distributed.get_world_size(model.process_group) > 1:
        raise ValueError(
            "model is wrapped in DistributedDataParallel, which would not average the gradients of parameters that are added "
            "now: adapt model.module first, then wrap it"
        )
    if any(type(module).__name__ == "FullyShardedDataParallel" for module in model.modules()):
        raise ValueError(
            "model is wrapped in FullyShardedDataParallel, which has flattened its weights: adapt the plain model first, then "
            "wrap it (fully_shard keeps the weights' shapes)"
        )
    refuse_other_adapters(model)
    return unwrap(model)


def refuse_missing(layers: Mapping[str, nn.Module], *, values: bool = True) -> None:
    """Raise ValueError for a layer whose weight accelerate has offloaded, or, if `values` are needed, that is on meta."""
    for name, layer in layers.items():
        plain = getattr(layer, "plain", layer)
        refuse_offloaded(plain, name)
        weight = dict(plain._parameters.items()).get("weight")  # a TorchScript module's are no dictionary
        if values and weight is not None and weight.is_meta:
            raise ValueError(
                f"layer {name} ({describe(plain)}) has no values, only a shape (the meta device): load its weights first"
            )


def tied_layers(model: nn.Module, layers: Mapping[str, nn.Module]) -> tuple[str, ...]:
    """Those of `layers` whose weight also has another name."""
    tied = {name for group in tied_parameters(model) for name in group}
    return tuple(name for name in layers if f"{name}.weight" in tied)


def pristine_matrix(layer: nn.Module) -> Tensor:
    """A layer's pre-trained weight `(out, in)`, without any of its adapters; a quantized one in float32."""
    pristine = getattr(layer, "pristine_weight", None)
    return dense_matrix(layer) if pristine is None else pristine()


@contextmanager
def whole_parameters(module: nn.Module):
    """Inside the block, sharded parameters are whole, and still differentiable."""
    spread = [(m, name, p) for m in module.modules() for name, p in m._parameters.items() if p is not None and is_sharded(p)]
    for owner, name, parameter in spread:
        owner._parameters[name] = gather(parameter)  # type: ignore[assignment]
    try:
        yield
    finally:
        for owner, name, parameter in spread:
            owner._parameters[name] = parameter


class FusedPaths:
    """Fused inference code of torch's transformer layers, which reads weights directly and would skip the updates."""

    _SWITCHES = ((nn.TransformerEncoder, "use_nested_tensor"), (nn.TransformerEncoderLayer, "activation_relu_or_gelu"))

    def __init__(self, model: nn.Module, layers: Iterable[nn.Module]):
        adapted = set(layers)
        self._before: list[tuple[nn.Module, str, Any]] = [
            (module, name, getattr(module, name))
            for module in model.modules()
            for kind, name in self._SWITCHES
            if isinstance(module, kind) and not adapted.isdisjoint(module.modules())
        ]

    def disable(self) -> None:
        """Make torch run the layers one by one."""
        for module, name, _ in self._before:
            setattr(module, name, False)

    def restore(self) -> None:
        """Allow the fused code again where it was allowed."""
        for module, name, value in self._before:
            setattr(module, name, value)


def saved_modules(model: nn.Module, names: Iterable[str], layers: Mapping[str, nn.Module]) -> tuple[str, ...]:
    """Full names of the modules that `modules_to_save` names.

    Raises:
        NoMatchingModuleError: a name that matches nothing.
        ValueError: a module that holds an adapted layer.
    """
    modules = list({id(module): name for name, module in reversed(named_layers(model).items())}.values())[::-1]
    kept = []
    for pattern in names:
        found = [name for name in modules if name == pattern or name.endswith("." + pattern)]
        if not found:
            raise NoMatchingModuleError(
                f"modules_to_save: {pattern!r} matches no module; nearest names: {', '.join(nearest(pattern, modules))}"
            )
        kept += found
    for name in kept:
        inside = [layer for layer in layers if layer == name or layer.startswith(name + ".")]
        if inside:
            raise ValueError(
                f"modules_to_save: {name!r} holds the adapted layer {inside[0]}; a layer is adapted or saved whole, not both"
            )
    return tuple(dict.fromkeys(kept))
