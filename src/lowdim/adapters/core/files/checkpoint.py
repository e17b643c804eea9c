"""Adapters on disk: `adapter.safetensors` holds the tensors and how to load them, `adapter.json` the same for people."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from lowdim.adapters.core.adapted import Adapted
from lowdim.adapters.core.attach import put_in_place
from lowdim.adapters.core.composed import is_composed
from lowdim.adapters.core.files.layout import DESCRIPTION, FORMAT, TENSORS, VERSION, digest_of
from lowdim.adapters.core.guards import error_context, fingerprint, pristine_matrix
from lowdim.adapters.core.method import registered_methods
from lowdim.adapters.core.shared import SHARED
from lowdim.adapters.core.whole import WholeMethod, refuse_adapted
from lowdim.errors import CheckpointError, nearest
from lowdim.files import read_json, read_tensors
from lowdim.surgery import matrix_shape

__all__ = ["load_adapter"]


def load_adapter(model: nn.Module, folder: str | Path, *, check_base: bool = True) -> Adapted:
    """Attach a saved adapter to its base model, in place.

    Args:
        model: the model that the adapter was trained on, without adapters.
        folder: a folder that `Adapted.save` wrote.
        check_base: reject a base model with other weights; False attaches anyway.

    Returns:
        An `Adapted` in the state in which it was saved, schedules included.

    Raises:
        CheckpointError: a file is missing, truncated, not written by lowdim, of a newer version, or for another base model.
            The model is then unchanged.
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
    fingerprints = {name: entry["fingerprint"] for name, entry in about["layers"].items()}
    adapted = put_in_place(
        model,
        method,
        lambda: {name: method.layer_type(layer, update, method.dropout) for name, (layer, update) in attached.items()},
        layers=layers,
        fingerprints=fingerprints,
        modules_to_save=about["modules_to_save"],
        seed=about["seed"],
        shared=shared,
    )
    for name, state in heads.items():
        model.get_submodule(name).load_state_dict(state)
    return adapted


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
    if about.get("digest") != digest_of(tensors):
        raise CheckpointError(f"{folder / TENSORS} is damaged: its tensors do not match its digest")
    if (folder / DESCRIPTION).exists():
        readable = read_json(folder / DESCRIPTION)
        if not isinstance(readable, dict) or readable.get("digest") != about["digest"]:
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
        raise CheckpointError(f"{folder}: the shared tensors do not fit this model: {reason}") from error


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
