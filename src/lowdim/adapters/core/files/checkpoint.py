"""Loading an adapter: lowdim's own folders, and PEFT's."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import cast

from torch import Tensor, nn

from lowdim.adapters.core.adapted import Adapted
from lowdim.adapters.core.attach import put_in_place
from lowdim.adapters.core.composed import is_composed
from lowdim.adapters.core.files.bounds import BoundedAllocation
from lowdim.adapters.core.files.layout import TENSORS, Header, read_adapter
from lowdim.adapters.core.files.peft_in import attach_peft
from lowdim.adapters.core.files.peft_reader import is_of_peft
from lowdim.adapters.core.files.saved import SavedUpdates, reading, saved_method
from lowdim.adapters.core.fingerprints import base_difference
from lowdim.adapters.core.guards import plain_model, refuse_missing
from lowdim.adapters.core.shared import shared_prefix
from lowdim.adapters.core.tensors import load_kept
from lowdim.adapters.core.whole import WholeMethod, refuse_adapted
from lowdim.errors import CheckpointError, nearest
from lowdim.surgery import named_layers, plain_name, submodule

__all__ = ["load_adapter"]


def load_adapter(model: nn.Module, folder: str | Path, *, check_base: bool = True) -> Adapted:
    """Attach a saved adapter to its base model, in place.

    Args:
        model: the model that the adapter was trained on, without adapters.
        folder: a folder that `Adapted.save` wrote, or PEFT with a LoRA (which does not say what its base model's weights are).
        check_base: reject a base model with other weights; False attaches anyway.

    Returns:
        An `Adapted` in the state in which it was saved, schedules included.

    Raises:
        CheckpointError: a file is missing, truncated, not written by lowdim or PEFT, of a newer version, or for another base
            model; or an adapter of PEFT's that is more than `B A`. The model is then unchanged.
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
    folder, model = Path(folder), plain_model(model)
    if is_of_peft(folder):
        return attach_peft(model, folder)
    tensors, header = read_adapter(folder)
    method = saved_method(header, tensors, folder)
    if isinstance(method, WholeMethod):
        return _load_whole(model, method, tensors, header, folder, check_base)
    if is_composed(model):
        raise CheckpointError(f"{folder}: the model's parameters are composed by another adapter: merge() that first")
    saved = SavedUpdates(model, folder, method, tensors, header)
    if check_base:
        for name, layer in saved.layers.items():
            saved.check_base(name, layer)
    attached = {name: (layer, saved.update(name, layer)) for name, layer in saved.layers.items()}
    shared = saved.shared()
    if shared is not None:
        _restore_shared(shared, tensors, header, folder)
    heads = _heads(model, header.modules_to_save, tensors, folder)
    adapted = put_in_place(
        model,
        method,
        lambda: {name: method.layer_type(layer, update, method.dropout) for name, (layer, update) in attached.items()},
        layers=saved.layers,
        fingerprints=cast("dict[str, str]", {name: entry.fingerprint for name, entry in header.layers.items()}),
        modules_to_save=header.modules_to_save,
        seed=header.seed,
        shared=shared,
    )
    for name, state in heads.items():
        load_kept(model, name, state)
    adapted.layer_ranks = {
        name: entry.meta["given_rank"] for name, entry in header.layers.items() if "given_rank" in entry.meta
    }
    adapted.capped_ranks = {name: entry.meta["rank"] for name, entry in header.layers.items() if entry.meta.get("capped")}
    return adapted


def _load_whole(
    model: nn.Module,
    method: WholeMethod,
    tensors: Mapping[str, Tensor],
    header: Header,
    folder: Path,
    check_base: bool,
) -> Adapted:
    if not header.parameters or header.shared is None:
        lacking = "parameters" if not header.parameters else "shared"
        raise CheckpointError(f"{folder / TENSORS} is damaged: its description lacks {lacking}")
    refuse_adapted(model)
    refuse_missing(named_layers(model), values=False)
    known, chosen = dict(model.named_parameters()), {}
    for name, entry in header.parameters.items():
        found = known.get(name)
        if found is None:
            close = ", ".join(nearest(name, known))
            raise CheckpointError(f"{folder} composes parameter {name}, which the model lacks (nearest: {close})")
        if list(found.shape) != entry.shape:
            raise CheckpointError(
                f"{folder} composes parameter {name} of shape {tuple(entry.shape)}; the model's is {tuple(found.shape)}"
            )
        difference = base_difference(entry.fingerprint, found) if check_base and entry.fingerprint else None
        if difference:
            raise CheckpointError(
                f"{folder} was trained on another base model: parameter {name} {difference} (check_base=False attaches anyway)"
            )
        chosen[name] = found
    own = [value for key, value in tensors.items() if key.startswith(_prefix(header)) and value.is_floating_point()]
    dtype = own[0].dtype if own else None
    bounded = BoundedAllocation(tensors, [entry.shape for entry in header.parameters.values()])
    with reading(folder, header), bounded:
        shared = method.composition(chosen, model, seed=header.seed, dtype=dtype, initialise=True)
        shared.check(header.shared or {})
    _restore_shared(shared, tensors, header, folder)
    heads = _heads(model, header.modules_to_save, tensors, folder)
    for name, state in heads.items():
        load_kept(model, name, state)
    prints = cast("dict[str, str]", {name: entry.fingerprint for name, entry in header.parameters.items()})
    return method.put(model, shared, prints, header.modules_to_save, header.seed)


def _prefix(header: Header) -> str:
    return shared_prefix(header.modules_to_save)


def _restore_shared(shared: nn.Module, tensors: Mapping[str, Tensor], header: Header, folder: Path) -> None:
    prefix = _prefix(header)
    own = {key.removeprefix(prefix): value for key, value in tensors.items() if key.startswith(prefix)}
    try:
        shared.load_state_dict(own)
    except RuntimeError as error:
        reason = " ".join(str(error).split())
        raise CheckpointError(f"{folder}: the shared tensors do not fit this model: {reason}") from error


def _heads(model: nn.Module, names: Sequence[str], tensors: Mapping[str, Tensor], folder: Path) -> dict[str, dict[str, Tensor]]:
    """The tensors of the modules that were saved whole; none of them holds an adapted layer, so all below a name is its own."""
    heads = {}
    for name in names:
        own = {key[len(name) + 1 :]: value for key, value in tensors.items() if key.startswith(f"{name}.")}
        try:
            module = submodule(model, name)
        except AttributeError:
            raise CheckpointError(f"{folder} holds module {name}, which the model lacks") from None
        want = {plain_name(key): value for key, value in module.state_dict().items()}
        for key in sorted(set(want) | set(own)):
            if key not in own or key not in want or own[key].shape != want[key].shape:
                got = tuple(own[key].shape) if key in own else "nothing"
                need = tuple(want[key].shape) if key in want else "nothing"
                raise CheckpointError(f"{folder}: {name}.{key} has shape {got} in the file and {need} in the model")
        heads[name] = own
    return heads
