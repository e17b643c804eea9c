"""Adapters on disk: `adapter.safetensors` holds the tensors and how to load them, `adapter.json` the same for people."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor, nn

import lowdim
from lowdim.adapters.core.adapted import Adapted
from lowdim.adapters.core.base import AdaptedLayer, registered_methods
from lowdim.adapters.core.composed import is_composed
from lowdim.adapters.core.guards import error_context, fingerprint, pristine_matrix, tied_layers, unchanged_on_error
from lowdim.adapters.core.shared import SHARED
from lowdim.adapters.core.whole import WholeAdapted, WholeMethod, refuse_adapted
from lowdim.errors import CheckpointError, nearest
from lowdim.files import read_json, read_tensors, whole_folder, write_json, write_tensors
from lowdim.surgery import freeze, matrix_shape, replace_layer

__all__ = ["load_adapter", "save"]

FORMAT, VERSION = "lowdim-adapter", 1
TENSORS, DESCRIPTION = "adapter.safetensors", "adapter.json"


def save(adapted: Adapted, folder: str | Path) -> Path:
    """Write the adapter: both files beside, then both renamed. The tensors file is complete in itself and is renamed last."""
    if not adapted.layers and not (isinstance(adapted, WholeAdapted) and adapted.shared is not None):
        raise ValueError("there is no adapter to save: the model has been merged")
    folder = Path(folder)
    tensors = adapted.state_dict()
    whole = _whole(adapted, tensors) if isinstance(adapted, WholeAdapted) else {}
    description = {
        "format": FORMAT,
        "version": VERSION,
        "lowdim": lowdim.__version__,
        "method": type(adapted.method).__name__,
        "config": adapted.method.config(),
        "seed": adapted.seed,
        "base_model": _base_model(adapted.model),
        "modules_to_save": list(adapted.modules_to_save),
        "layers": {
            name: {
                "shape": [layer.out_features, layer.in_features],
                "fingerprint": adapted.fingerprints.get(name),
                "meta": layer.update.meta(),
            }
            for name, layer in adapted.layers.items()
        },
        **whole,
        "digest": _digest(tensors),
    }
    with whole_folder(folder) as draft:
        write_json(draft / DESCRIPTION, description)
        write_tensors(draft / TENSORS, tensors, {"lowdim": json.dumps(description)})
    return folder


def load_adapter(model: nn.Module, folder: str | Path, *, check_base: bool = True) -> Adapted:
    """Attach a saved adapter to its base model, in place.

    Args:
        model: the model that the adapter was trained on, without adapters.
        folder: what `Adapted.save` wrote.
        check_base: refuse a base model with other weights; False attaches anyway.

    Returns:
        An `Adapted` in the state in which it was saved, schedules included.

    Raises:
        CheckpointError: a file is missing, truncated, foreign, of a newer version, or for another base model. The model is
            untouched then.
        ValueError: the model has an adapter, and the one in the file acts on the model as a whole (SAID, aTLAS).

    Example:
        >>> import tempfile, torch, lowdim
        >>> make = lambda: torch.nn.Sequential(torch.nn.Linear(4, 4))
        >>> model, twin = make(), make()
        >>> _ = twin.load_state_dict(model.state_dict())
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     _ = lowdim.adapt(model, lowdim.adapters.LoRA(rank=1)).save(folder)
        ...     adapted = lowdim.load_adapter(twin, folder)
        >>> x = torch.ones(2, 4)
        >>> bool(torch.equal(model(x), twin(x)))
        True
    """
    folder = Path(folder)
    tensors, about = _read(folder)
    cls = registered_methods().get(about["method"])
    if cls is None:
        close = ", ".join(nearest(about["method"], registered_methods()))
        raise CheckpointError(
            f"{folder}: no method {about['method']!r} is registered (nearest: {close}); import its module first"
        )
    try:
        whole = issubclass(cls, WholeMethod)
        method = cls.restored(about["config"], tensors, folder) if whole else cls.from_config(about["config"])
    except (ValueError, TypeError) as error:
        raise CheckpointError(f"{folder}: the configuration of {about['method']} is not valid: {error}") from error
    if isinstance(method, WholeMethod):
        return _load_whole(model, method, tensors, about, folder, check_base)
    if is_composed(model):
        raise CheckpointError(f"{folder}: the model's parameters are composed by another adapter: merge() that first")
    layers = {name: _find(model, name, entry, folder, check_base) for name, entry in about["layers"].items()}
    prepared = method.prepare(layers, seed=about["seed"], initialise=False)
    attached = {}
    for name, layer in layers.items():
        prefix = f"{name}.update."
        own = {key[len(prefix) :]: value for key, value in tensors.items() if key.startswith(prefix)}
        stats = {**prepared[name], **about["layers"][name]["meta"]}
        weight = pristine_matrix(layer).detach()
        dtype = next((t.dtype for t in own.values() if t.is_floating_point()), weight.dtype)
        with error_context(about["method"], name, layer):
            update = method.blank(*weight.shape, stats=stats, dtype=dtype, device=weight.device)
            update.restore({key: value.to(weight.device) for key, value in own.items()}, weight)
            attached[name] = (layer, update)
    shared = method.shared(layers, seed=about["seed"], initialise=False)
    if shared is not None:
        _restore_shared(shared, tensors, folder)
    heads = _heads(model, about["modules_to_save"], tensors, folder)
    tied = tied_layers(model, layers)
    first = not any(isinstance(module, AdaptedLayer) for module in model.modules())
    with unchanged_on_error(model):
        if first:
            freeze(model)
        wrapped = {name: AdaptedLayer(layer, update, method.dropout) for name, (layer, update) in attached.items()}
    for name, layer in wrapped.items():
        replace_layer(model, name, layer)
    for name, state in heads.items():
        module = model.get_submodule(name)
        module.load_state_dict(state)
        for parameter in module.parameters():
            parameter.requires_grad_(True)
    fingerprints = {name: entry["fingerprint"] for name, entry in about["layers"].items()}
    kept = about["modules_to_save"]
    return method.adapted_type()(model, method, wrapped, fingerprints, kept, about["seed"], tied, shared)


def _whole(adapted: WholeAdapted, tensors: dict[str, Tensor]) -> dict[str, Any]:
    """What the description says of a method that acts on the model as a whole; adds the method's own tensors."""
    tensors.update(adapted.method.saved())
    shapes = zip(adapted.names, adapted.composition.shapes)
    return {
        "parameters": {n: {"shape": list(shape), "fingerprint": adapted.fingerprints.get(n)} for n, shape in shapes},
        "shared": adapted.composition.about(),
    }


def _load_whole(
    model: nn.Module,
    method: WholeMethod,
    tensors: Mapping[str, Tensor],
    about: Mapping[str, Any],
    folder: Path,
    check_base: bool,
) -> Adapted:
    missing = [key for key in ("parameters", "shared") if not isinstance(about.get(key), dict)]
    if missing or not about["parameters"]:
        raise CheckpointError(f"{folder / TENSORS} is damaged: its description lacks {', '.join(missing) or 'parameters'}")
    refuse_adapted(model)
    known, chosen = dict(model.named_parameters()), {}
    for name, entry in about["parameters"].items():
        found = known.get(name)
        if found is None:
            close = ", ".join(nearest(name, known))
            raise CheckpointError(f"{folder} composes parameter {name}, which the model lacks (nearest: {close})")
        if list(found.shape) != list(entry["shape"]):
            raise CheckpointError(
                f"{folder} composes parameter {name} of shape {tuple(entry['shape'])}; the model's is {tuple(found.shape)}"
            )
        if check_base and entry.get("fingerprint") and entry["fingerprint"] != fingerprint(found):
            raise CheckpointError(
                f"{folder} was trained on another base model: parameter {name} differs (check_base=False attaches anyway)"
            )
        chosen[name] = found
    own = [value for key, value in tensors.items() if key.startswith(f"{SHARED}.") and value.is_floating_point()]
    dtype = own[0].dtype if own else None
    shared = method.composition(chosen, model, seed=about["seed"], dtype=dtype, initialise=True)
    shared.check(about["shared"])
    _restore_shared(shared, tensors, folder)
    heads = _heads(model, about["modules_to_save"], tensors, folder)
    for name, state in heads.items():
        model.get_submodule(name).load_state_dict(state)
    prints = {name: entry["fingerprint"] for name, entry in about["parameters"].items()}
    return method.put(model, shared, prints, about["modules_to_save"], about["seed"])


def _read(folder: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    if not (folder / TENSORS).is_file() and (folder / "adapter_config.json").is_file():
        raise CheckpointError(f"{folder} holds a PEFT adapter; load it with peft.PeftModel.from_pretrained")
    tensors, metadata = read_tensors(folder / TENSORS)
    try:
        about = json.loads(metadata["lowdim"])
    except (KeyError, ValueError):
        raise CheckpointError(f"{folder / TENSORS} was not written by lowdim (no description in its header)") from None
    if about.get("format") != FORMAT or not isinstance(about.get("version"), int):
        raise CheckpointError(f"{folder / TENSORS} is not a lowdim adapter (format {about.get('format')!r})")
    if about["version"] > VERSION:
        raise CheckpointError(
            f"{folder} has format version {about['version']}; this lowdim reads up to {VERSION}: upgrade lowdim"
        )
    missing = [key for key in ("method", "config", "seed", "layers", "modules_to_save") if key not in about]
    if missing:
        raise CheckpointError(f"{folder / TENSORS} is damaged: its description lacks {', '.join(missing)}")
    if about.get("digest") != _digest(tensors):
        raise CheckpointError(f"{folder / TENSORS} is damaged: its tensors do not match its digest")
    if (folder / DESCRIPTION).exists():
        beside = read_json(folder / DESCRIPTION)
        if not isinstance(beside, dict) or beside.get("digest") != about["digest"]:
            raise CheckpointError(
                f"{folder / DESCRIPTION} does not belong to {TENSORS} (an interrupted save?); "
                "remove it to load the tensors as they are"
            )
    return tensors, about


def _find(model: nn.Module, name: str, entry: Mapping[str, Any], folder: Path, check_base: bool) -> nn.Module:
    modules = dict(model.named_modules())
    layer = modules.get(name)
    if layer is None:
        raise CheckpointError(
            f"{folder} adapts layer {name}, which the model lacks (nearest: {', '.join(nearest(name, modules))})"
        )
    shape = matrix_shape(layer)
    if list(shape) != list(entry["shape"]):
        raise CheckpointError(f"{folder} adapts layer {name} of shape {tuple(entry['shape'])}; the model's is {shape}")
    if check_base and entry.get("fingerprint") and entry["fingerprint"] != fingerprint(pristine_matrix(layer)):
        raise CheckpointError(
            f"{folder} was trained on another base model: the weight of layer {name} differs (check_base=False attaches anyway)"
        )
    return layer


def _restore_shared(shared: nn.Module, tensors: Mapping[str, Tensor], folder: Path) -> None:
    prefix = f"{SHARED}."
    own = {key.removeprefix(prefix): value for key, value in tensors.items() if key.startswith(prefix)}
    try:
        shared.load_state_dict(own)
    except RuntimeError as error:
        reason = " ".join(str(error).split())
        raise CheckpointError(f"{folder}: the numbers that are shared do not fit this model: {reason}") from error


def _heads(model: nn.Module, names: list[str], tensors: Mapping[str, Tensor], folder: Path) -> dict[str, dict[str, Tensor]]:
    heads = {}
    for name in names:
        own = {
            key[len(name) + 1 :]: value
            for key, value in tensors.items()
            if key.startswith(name + ".") and ".update." not in key
        }
        try:
            module = model.get_submodule(name)
        except AttributeError:
            raise CheckpointError(f"{folder} holds module {name}, which the model lacks") from None
        want = module.state_dict()
        for key in sorted(set(want) | set(own)):
            if key not in own or key not in want or own[key].shape != want[key].shape:
                got = tuple(own[key].shape) if key in own else "nothing"
                need = tuple(want[key].shape) if key in want else "nothing"
                raise CheckpointError(f"{folder}: {name}.{key} has shape {got} in the file and {need} in the model")
        heads[name] = own
    return heads


def _digest(tensors: Mapping[str, Tensor]) -> str:
    import torch

    digest = hashlib.blake2b(digest_size=16)
    for name in sorted(tensors):
        tensor = tensors[name].detach().cpu().contiguous()
        digest.update(f"{name}{tuple(tensor.shape)}{tensor.dtype}".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().tobytes() if tensor.numel() else b"")
    return digest.hexdigest()


def _base_model(model: nn.Module) -> dict[str, Any]:
    config = getattr(model, "config", None)
    return {"class": type(model).__name__, "name_or_path": getattr(config, "_name_or_path", None) or None}
