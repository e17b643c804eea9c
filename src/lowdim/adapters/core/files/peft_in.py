"""Adapters that PEFT wrote: a LoRA folder is attached as lowdim's LoRA, exactly, or refused with the reason."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lowdim.adapters.core.adapted import Adapted
from lowdim.adapters.core.attach import put_in_place
from lowdim.adapters.core.composed import is_composed
from lowdim.adapters.core.files.peft_factors import factor_for_peft
from lowdim.adapters.core.files.peft_reader import PeftAdapter, read_peft
from lowdim.adapters.core.fingerprints import layer_fingerprint
from lowdim.adapters.core.guards import error_context, refuse_missing
from lowdim.adapters.core.layer import AdaptedLayer, gain_of, kind_of
from lowdim.adapters.core.low_rank import LoRAUpdate
from lowdim.adapters.core.method import method_class
from lowdim.adapters.core.tensors import load_kept
from lowdim.errors import CheckpointError, nearest, shown
from lowdim.linalg import wide
from lowdim.surgery import CONVOLUTIONS, known_dtype, matrix_shape, named_layers, plain_name, submodule

__all__ = ["PeftUpdates", "attach_peft"]


def attach_peft(model: nn.Module, folder: Path) -> Adapted:
    """Attach a LoRA that PEFT wrote, in place.

    Raises:
        CheckpointError: as `read_peft`; or the model has other layers or shapes. The model is then unchanged.
    """
    found = read_peft(folder)
    if is_composed(model):
        raise CheckpointError(f"{folder}: the model's parameters are composed by another adapter: merge() that first")
    updates = PeftUpdates(model, folder, found)
    layers = updates.layers
    _check_bases(named_layers(model), found, folder)
    kept = _kept_modules(model, found, folder)
    adapted = put_in_place(
        model,
        updates.method,
        lambda: {name: updates.adapted(name, layer) for name, layer in layers.items()},
        layers=layers,
        fingerprints={name: layer_fingerprint(layer) for name, layer in layers.items()},
        modules_to_save=kept,
        seed=0,
        shared=None,
    )
    for name, state in kept.items():
        load_kept(model, name, state)
    return adapted


class PeftUpdates:
    """The updates of a LoRA that PEFT wrote, made one layer at a time; nothing is put into a model.

    Args:
        model: has the layers that the file names, of its shapes; their numbers are not read.

    Attributes:
        layers: those layers of `model`.
        method: lowdim's LoRA, of the highest rank among them.

    Raises:
        CheckpointError: the model has other layers or shapes.
    """

    def __init__(self, model: nn.Module, folder: Path, found: PeftAdapter):
        modules = named_layers(model)
        self.layers = _layers(modules, found, folder)
        refuse_missing(self.layers, values=False)
        self._parts = {name: _matrices(name, layer, found, folder) for name, layer in self.layers.items()}
        self._scales = {name: found.scale(name, len(A)) for name, (A, _) in self._parts.items()}
        ranks, scales = {len(A) for A, _ in self._parts.values()}, set(self._scales.values())
        # One scale and one rank for all are kept as they are; else the scale goes into B, and each layer has its own rank.
        self._common = len(ranks) == 1 and len(scales) == 1 and next(iter(scales)) > 0
        rank = max(ranks)
        alpha = next(iter(scales)) * rank if self._common else float(rank)
        self.method: Any = method_class("LoRA")(rank, alpha, found.config.lora_dropout, list(self.layers))

    def check_base(self, name: str, layer: nn.Module) -> None:
        """Nothing: PEFT does not record which weight the adapter was trained over."""

    def adapted(self, name: str, layer: nn.Module) -> AdaptedLayer:
        """The layer with its update."""
        A, B = self._parts[name]
        if not self._common:
            A, B = wide(A), wide(B) * self._scales[name]
        with error_context("LoRA", name, layer):
            wrapped = self.method.attach(layer, stats={"rank": len(A)}, dtype=_computed_in(A, layer), initialise=False)
        update = wrapped.update
        assert isinstance(update, LoRAUpdate)
        with torch.no_grad():
            update.A.copy_(A)
            update.B.copy_(B)
        return wrapped


def _computed_in(A: Tensor, layer: nn.Module) -> torch.dtype:
    """The factors' dtype, or the layer's where it is finer: PEFT computes with factors in 16 bits in float32, too."""
    plain = layer.plain if isinstance(layer, AdaptedLayer) else layer
    return torch.promote_types(A.dtype, known_dtype(plain) or A.dtype)


def _layers(modules: Mapping[str, nn.Module], found: PeftAdapter, folder: Path) -> dict[str, nn.Module]:
    """The model's layers of the adapter's names."""
    lacking = [name for name in found.factors if name not in modules]
    if lacking:
        more = f" and {len(lacking) - 1} more" if len(lacking) > 1 else ""
        raise CheckpointError(
            f"{folder} adapts layer {lacking[0]}{more}, which the model lacks (nearest: "
            f"{', '.join(nearest(lacking[0], modules))}){_trained_on(found)}"
        )
    return {name: modules[name] for name in found.factors}


def _trained_on(found: PeftAdapter) -> str:
    """The base model that the folder names, for the end of a message."""
    base = found.config.base_model_name_or_path
    return f"; it was trained on {shown(base)}" if base else ""


def _check_bases(modules: Mapping[str, nn.Module], found: PeftAdapter, folder: Path) -> None:
    """A weight that PEFT keeps beside its factors must be the model's own: a larger vocabulary would need larger layers."""
    for name, weight in found.bases.items():
        layer = modules.get(name)
        own = None if layer is None else getattr(layer, "weight", None)
        if own is None or own.shape != weight.shape or not torch.equal(own.detach().cpu(), weight.to(own.dtype)):
            raise CheckpointError(
                f"{folder} holds another weight of layer {name} than the model (a changed vocabulary?): merge it with PEFT "
                "(merge_and_unload)"
            )


def _matrices(name: str, layer: nn.Module, found: PeftAdapter, folder: Path) -> tuple[Tensor, Tensor]:
    """`A (r, in)` and `B (out, r)` of the layer's matrix."""
    plain = layer.plain if isinstance(layer, AdaptedLayer) else layer
    if isinstance(plain, CONVOLUTIONS) and (plain.groups != 1 or set(plain.dilation) != {1} or plain.padding_mode != "zeros"):
        raise CheckpointError(
            f"{folder}: layer {name} is {plain}, whose groups, dilation or padding PEFT treats in its own way; merge the "
            "adapter with PEFT (merge_and_unload)"
        )
    try:
        out_features, in_features = matrix_shape(layer)
    except TypeError as error:
        raise CheckpointError(f"{folder} adapts layer {name}, which is no layer with a weight matrix here: {error}") from None
    if any(factor.ndim < 2 or not factor.numel() for factor in found.factors[name]):
        shapes = " and ".join(str(tuple(factor.shape)) for factor in reversed(found.factors[name]))
        raise CheckpointError(
            f"{folder} is damaged: layer {name} has factors of shape {shapes} (shards that were not gathered before saving?)"
        )
    A, B = (factor.flatten(1) for factor in found.factors[name])
    if A.ndim != 2 or B.ndim != 2 or (B.shape[0], A.shape[1]) != (out_features, in_features) or len(A) != B.shape[1]:
        raise CheckpointError(
            f"{folder} adapts layer {name} by factors of shape {tuple(B.shape)} and {tuple(A.shape)}; the model's layer has "
            f"shape {(out_features, in_features)}{_trained_on(found)}"
        )
    if kind_of(layer) == "other" or not A.is_floating_point() or not B.is_floating_point():
        raise CheckpointError(f"{folder} adapts layer {name}, a {type(plain).__name__}, which lowdim's LoRA cannot")
    try:
        factor = factor_for_peft(plain, gain_of(layer))
    except TypeError as error:
        raise CheckpointError(f"{folder} adapts layer {name}: {error}") from None
    return A, B if factor == 1.0 else B / factor


def _kept_modules(model: nn.Module, found: PeftAdapter, folder: Path) -> dict[str, dict[str, Tensor]]:
    """Module -> its tensors, for all that PEFT saved whole."""
    modules = named_layers(model)
    left = dict(found.kept)
    wanted = tuple(found.config.modules_to_save or ())
    asked = [name for name in modules if wanted and name.endswith(wanted)]
    kept: dict[str, dict[str, Tensor]] = {}
    for name in dict.fromkeys([*asked, *(key.rpartition(".")[0] for key in found.kept)]):
        state = {key[len(name) + 1 :]: left.pop(key) for key in list(left) if key.startswith(f"{name}.")}
        if not state:
            continue
        if name not in modules:
            close = ", ".join(nearest(name, modules))
            raise CheckpointError(f"{folder} holds module {name}, which the model lacks (nearest: {close})")
        own = {plain_name(key): value for key, value in modules[name].state_dict().items()}
        _check_state(name, own, state, folder)
        # PEFT adds the embeddings without being asked where a layer like them is adapted
        if name in asked or not all(torch.equal(own[key].cpu(), value.to(own[key].dtype)) for key, value in state.items()):
            kept[name] = state
    if left:
        raise CheckpointError(f"{folder} holds {next(iter(left))}, which belongs to no module")
    clash = next((name for name in kept for layer in found.factors if layer == name or layer.startswith(f"{name}.")), None)
    if clash is not None:
        raise CheckpointError(f"{folder} adapts module {clash} and holds it whole; merge it with PEFT (merge_and_unload)")
    _check_ties(model, {name: state for name, state in kept.items() if name in asked}, found, folder)
    return kept


def _check_state(name: str, want: Mapping[str, Any], state: Mapping[str, Tensor], folder: Path) -> None:
    for key in sorted(set(want) | set(state)):
        got, need = (tuple(s[key].shape) if key in s else "nothing" for s in (state, want))
        if got != need:
            raise CheckpointError(f"{folder}: {name}.{key} has shape {got} in the file and {need} in the model")


def _check_ties(model: nn.Module, kept: Mapping[str, dict[str, Tensor]], found: PeftAdapter, folder: Path) -> None:
    """A weight that this model shares must be the same wherever PEFT keeps a copy of it."""
    given: dict[int, Tensor] = {}
    for name, state in kept.items():
        for key, parameter in submodule(model, name).named_parameters(remove_duplicate=False):
            value = state.get(plain_name(key))
            if value is not None and not torch.equal(given.setdefault(id(parameter), value), value):
                raise CheckpointError(
                    f"{folder} holds two different copies of {name}.{key}, which this model shares; merge it with PEFT"
                )
    if found.config.ensure_weight_tying:
        return
    names = tuple(f"{name}." for name in kept)
    for key, parameter in model.named_parameters(remove_duplicate=False):
        if id(parameter) in given and not plain_name(key).startswith(names):
            raise CheckpointError(
                f"{folder} holds a copy of a weight that this model shares with {plain_name(key)}, which PEFT leaves as it "
                "was: merge it with PEFT (merge_and_unload), or load the model with tie_word_embeddings=False"
            )
