"""Weight matrices of a model, one at a time: from a module, a dict, safetensors files or a checkpoint folder.

Diagnostics ask for a matrix when they come to it, so a checkpoint larger than memory can be measured, and the
adapters of a wrapped model are merged one layer at a time, in a copy.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from lowdim.errors import CheckpointError, DataError, UnknownNameError, nearest
from lowdim.files import read_json_object
from lowdim.surgery import is_conv1d, with_matrix

__all__ = ["Weights", "weights_of"]

_INDEX = "model.safetensors.index.json"
_FLOATS = {"F64", "F32", "F16", "BF16", "F8_E4M3", "F8_E5M2"}
#: Models whose checkpoints store these layers `(in, out)`, as transformers' Conv1D does.
_CONV1D_MODELS = {"gpt2", "openai-gpt", "imagegpt", "decision_transformer"}
_CONV1D_LAYERS = ("c_attn.weight", "c_proj.weight", "c_fc.weight", "q_attn.weight")


@dataclass(frozen=True)
class _Entry:
    shape: tuple[int, ...]  # as given out
    load: Callable[[], Tensor]  # as stored
    transposed: bool = False  # stored (in, out)
    place: tuple[int, ...] = ()  # where it is in memory, the same for tied weights; empty for what is loaded or merged


class Weights(Mapping[str, Tensor]):
    """A read-only mapping from name to weight `(out, in)`; each access loads (or merges) that one weight."""

    def __init__(self, entries: Mapping[str, _Entry], origin: str):
        self._entries, self.origin = dict(entries), origin

    def __getitem__(self, name: str) -> Tensor:
        if name not in self._entries:
            close = ", ".join(nearest(name, self._entries))
            raise UnknownNameError(f"{self.origin} has no 2-D weight {name!r}; nearest: {close or 'there is none'}")
        entry = self._entries[name]
        tensor: Any = entry.load().detach()
        if hasattr(tensor, "full_tensor"):  # a DTensor is gathered, one weight at a time
            tensor = tensor.full_tensor()
        return tensor.T if entry.transposed else tensor

    def __iter__(self) -> Iterator[str]:
        return iter(self._entries)

    def __contains__(self, name: object) -> bool:
        return name in self._entries  # without loading

    def __len__(self) -> int:
        return len(self._entries)

    def shape(self, name: str) -> tuple[int, ...]:
        """`(out, in)` without loading."""
        return self._entries[name].shape

    def first_names(self) -> dict[str, str]:
        """Each name with the first name of the same tensor: of tied weights that is another one."""
        seen: dict[tuple[int, ...], str] = {}
        return {name: seen.setdefault(entry.place, name) if entry.place else name for name, entry in self._entries.items()}

    def only(self, names: Iterable[str]) -> Weights:
        """These weights alone, in the order that they have here."""
        wanted = set(names)
        return Weights({name: entry for name, entry in self._entries.items() if name in wanted}, self.origin)

    def oriented_like(self, other: Weights) -> Weights:
        """These weights with the layout that `other` knows about: a bare file does not say which layers are Conv1D."""
        entries = dict(self._entries)
        for name, entry in entries.items():
            twin = other._entries.get(name)
            if twin is not None and twin.transposed and not entry.transposed:
                entries[name] = _Entry(_turned(entry.shape), entry.load, True, entry.place)
        return Weights(entries, self.origin)


def weights_of(
    source: Any,
    *,
    merged: bool = True,
    convolutions: bool = False,
) -> Weights:
    """Every 2-D floating-point weight of a model as a lazy mapping name -> `(out, in)`.

    Args:
        source: a module; a mapping name -> tensor; one matrix (its name is `""`); a `.safetensors` file; a Hugging Face
            checkpoint folder (`model.safetensors`, or shards with an index); or a Weights, returned unchanged. Names
            are those of `state_dict`. A PEFT-wrapped model, or one adapted by lowdim, gives its plain model's names.
        merged: with adapters merged (in a copy of one layer at a time); False gives the weights from before adapting.
        convolutions: also kernels of two-dimensional convolutions, `(out, in, height, width)`.

    Returns:
        Weights. Nothing is loaded or merged before it is asked for.

    Raises:
        TypeError: a source of another kind, or an adapter that cannot be merged. ValueError: a matrix that is not 2-D.
        DataError: no safetensors files where the path points, or only an adapter. CheckpointError: a damaged file.

    Example:
        >>> from torch import nn
        >>> from lowdim.diagnose import weights_of
        >>> weights = weights_of(nn.Sequential(nn.Linear(3, 4), nn.LayerNorm(4), nn.Linear(4, 2)))
        >>> {name: weights.shape(name) for name in weights}
        {'0.weight': (4, 3), '2.weight': (2, 4)}

    Biases and norms are left out. transformers' Conv1D is turned to `(out, in)`; for a bare file of such a model nothing can
    tell, so pass the folder with its `config.json`, or the module. Modules and mappings keep their order; files have none, and
    their names are in natural order (layer 10 after layer 9).
    """
    dims = (2, 4) if convolutions else (2,)
    if isinstance(source, Weights):
        return source
    if isinstance(source, Tensor):
        if source.ndim != 2:
            raise ValueError(f"a weight matrix must be 2-D; got shape {tuple(source.shape)}")
        return Weights({"": _entry(source)}, "the matrix")
    if isinstance(source, nn.Module):
        return Weights(dict(_walk(plain_model(source), "", merged, dims)), f"the model ({type(source).__name__})")
    if isinstance(source, Mapping):
        entries = {str(name): _entry(t) for name, t in source.items() if isinstance(t, Tensor) and _is_weight(t, dims)}
        return Weights(entries, "the dict of weights")
    if isinstance(source, (str, Path)):
        return _from_path(Path(source), dims)
    raise TypeError(f"source must be a module, a mapping, a matrix or a path; got {type(source).__name__}")


def _entry(tensor: Tensor, transposed: bool = False) -> _Entry:
    shape = tuple(tensor.shape)
    where = 0 if tensor.device.type == "meta" or hasattr(tensor, "full_tensor") else tensor.data_ptr()
    return _Entry(_turned(shape) if transposed else shape, lambda: tensor, transposed, (where, *shape) if where else ())


def _turned(shape: tuple[int, ...]) -> tuple[int, ...]:
    return shape[::-1]


def _is_weight(tensor: Tensor, dims: tuple[int, ...]) -> bool:
    return tensor.ndim in dims and tensor.is_floating_point()


# --- modules: names as in state_dict of the plain model ------------------------------------------------------------


def plain_model(model: nn.Module) -> nn.Module:
    """The model inside a PEFT wrapper (its layers stay wrapped)."""
    getter = getattr(model, "get_base_model", None)
    inner = getter() if callable(getter) and hasattr(model, "peft_config") else model
    return inner if isinstance(inner, nn.Module) else model


def is_peft_layer(module: nn.Module) -> bool:
    """Whether this is a layer that PEFT wrapped (recognised without importing peft)."""
    return callable(getattr(module, "get_base_layer", None)) and hasattr(module, "merged_adapters")


def is_lowdim_layer(module: nn.Module) -> bool:
    """Whether this is a layer that lowdim adapted: `.base`, `.update` and `.merged() -> plain layer`."""
    return callable(getattr(module, "merged", None)) and hasattr(module, "base") and hasattr(module, "update")


def _walk(module: nn.Module, prefix: str, merged: bool, dims: tuple[int, ...]) -> Iterator[tuple[str, _Entry]]:
    if is_peft_layer(module):
        base = module.get_base_layer()  # type: ignore[operator]
        yield from _wrapped(base, prefix, (lambda: _peft_merged(module, prefix)) if merged else (lambda: base), dims)
        return
    if is_lowdim_layer(module):
        inner: Any = module
        if not merged and not callable(getattr(module, "original_weight", None)):
            raise TypeError(f"layer {prefix[:-1]}: {type(module).__name__} does not know its base weight; keep the base model")
        # The frozen part may be a residual, so the base weight is asked for, not read.
        before = lambda: with_matrix(inner.base, inner.original_weight())  # noqa: E731
        yield from _wrapped(inner.base, prefix, inner.merged if merged else before, dims)
        return
    if hasattr(module, "original_module") and hasattr(module, "active_adapters"):  # PEFT's modules_to_save and its like
        yield from _walk(_saved_module(module, prefix, merged), prefix, merged, dims)
        return
    skip = module._non_persistent_buffers_set
    own = [*module._parameters.items(), *((k, b) for k, b in module._buffers.items() if k not in skip)]
    for key, tensor in own:
        if tensor is not None and _is_weight(tensor, dims):
            yield prefix + key, _entry(tensor, is_conv1d(module) and key == "weight")
    for key, child in module._modules.items():
        if child is not None:
            yield from _walk(child, f"{prefix}{key}.", merged, dims)


def _wrapped(
    base: nn.Module, prefix: str, plain: Callable[[], nn.Module], dims: tuple[int, ...]
) -> Iterator[tuple[str, _Entry]]:
    """Entries of an adapted layer: shapes from its base, values from `plain()` when they are asked for."""
    for key, tensor in base.named_parameters():
        if _is_weight(tensor, dims):
            turned = is_conv1d(base) and key == "weight"
            shape = tuple(tensor.shape)
            yield prefix + key, _Entry(_turned(shape) if turned else shape, lambda key=key: plain().get_parameter(key), turned)


def _peft_merged(layer: nn.Module, prefix: str) -> nn.Module:
    twin = copy.deepcopy(layer)
    try:
        if not twin.merged and not twin.disable_adapters:  # type: ignore[union-attr]
            twin.merge()  # type: ignore[operator]
    except (NotImplementedError, AttributeError) as error:
        raise TypeError(f"layer {prefix[:-1]}: the adapter {type(layer).__name__} cannot be merged into a weight") from error
    return twin.get_base_layer()  # type: ignore[operator]


def _saved_module(wrapper: nn.Module, prefix: str, merged: bool) -> nn.Module:
    original: Any = wrapper.original_module
    if not merged or getattr(wrapper, "disable_adapters", False):
        return original
    copies = getattr(wrapper, "modules_to_save", None)
    if copies is None:
        raise TypeError(f"layer {prefix[:-1]}: merge {type(wrapper).__name__} first (merge_and_unload)")
    active = [name for name in wrapper.active_adapters if name in copies]  # type: ignore[union-attr]
    return copies[active[0]] if active else original


# --- files -----------------------------------------------------------------------------------------------------------


def _from_path(path: Path, dims: tuple[int, ...]) -> Weights:
    files, turned = [path], False
    if path.is_dir():
        files, turned = _files_in(path), _is_conv1d_model(path)
    elif path.name.endswith(".index.json"):
        files = _shards(path)
    elif not path.is_file():
        raise DataError(f"{path} does not exist; name a .safetensors file or a checkpoint folder")
    elif path.suffix != ".safetensors":
        raise DataError(f"{path} must be a .safetensors file (pickled weights are not read); got {path.suffix or 'no suffix'}")
    entries: dict[str, _Entry] = {}
    for file in files:
        entries.update(_file_entries(file, turned, dims))
    return Weights(dict(sorted(entries.items(), key=_natural)), str(path))


def _natural(item: tuple[str, Any]) -> list[tuple[int, str]]:
    """The name in parts that sort numbers by size."""
    return [(int(part), "") if part.isdigit() else (-1, part) for part in re.split(r"(\d+)", item[0])]


def _files_in(folder: Path) -> list[Path]:
    if (folder / "model.safetensors").is_file():
        return [folder / "model.safetensors"]
    if (folder / _INDEX).is_file():
        return _shards(folder / _INDEX)
    if (folder / "adapter_config.json").is_file():
        raise DataError(
            f"{folder} holds an adapter, not a whole model: load it on its base and pass the model, or merge it first"
        )
    found = sorted(folder.glob("*.safetensors"))
    if len(found) != 1:
        raise DataError(
            f"{folder} must hold model.safetensors or {_INDEX}; found {[p.name for p in found] or 'no safetensors file'}"
        )
    return found


def _shards(index: Path) -> list[Path]:
    try:
        names = sorted(set(read_json_object(index)["weight_map"].values()))
        files = [index.parent / name for name in names]
        if any(file.parent != index.parent for file in files):
            raise ValueError("a shard lies in another folder")
    except (ValueError, KeyError, AttributeError, TypeError) as error:
        raise CheckpointError(f"{index} is not an index of shards (weight_map is missing or damaged): {error}") from error
    missing = [file.name for file in files if not file.is_file()]
    if missing:
        raise CheckpointError(f"{index} names shards that do not exist: {', '.join(missing)}")
    return files


def _file_entries(path: Path, turned: bool, dims: tuple[int, ...]) -> Iterator[tuple[str, _Entry]]:
    try:
        handle = safe_open(path, "pt")  # maps the file; tensors are read when asked for
        for name in handle.keys():  # noqa: SIM118 (not a dict)
            view = handle.get_slice(name)
            shape = tuple(view.get_shape())
            if len(shape) in dims and view.get_dtype() in _FLOATS:
                flip = turned and len(shape) == 2 and name.endswith(_CONV1D_LAYERS)
                yield name, _Entry(_turned(shape) if flip else shape, lambda name=name: handle.get_tensor(name), flip)
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{path} is damaged or not a safetensors file: {str(error)[:300]}") from error


def _is_conv1d_model(folder: Path) -> bool:
    config = folder / "config.json"
    if not config.is_file():
        return False
    return str(read_json_object(config).get("model_type")) in _CONV1D_MODELS
