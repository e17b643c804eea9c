"""Merging without loading the model: its safetensors files are read tensor by tensor and written again, adapted layers merged.

In memory there is one weight at a time, also in float32, whatever the size of the model. The numbers are those of a merge of
the whole model in float32, rounded once to the dtype that each tensor has in its file.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from lowdim.jobs.adapted import described

if TYPE_CHECKING:
    from torch import Tensor, nn

    from lowdim.adapters.core.files.peft_in import PeftUpdates
    from lowdim.adapters.core.files.saved import SavedUpdates
    from lowdim.adapters.core.merging import LayerChange
    from lowdim.models import Source
    from lowdim.models.shards import Shards

__all__ = ["merge_shards"]

#: Endings of files that go along with the weights: configuration, tokenizer, chat templates, the index of the shards.
_TEXTS = (".json", ".jinja", ".model", ".txt", ".tiktoken", ".spm", ".vocab", ".bpe")
#: How files begin that are a tokenizer's, which an adapter may have its own of.
_TOKENIZER = ("tokenizer", "special_tokens_map", "added_tokens", "vocab", "merges", "chat_template", "spiece", "sentencepiece")
_LICENSES = ("license", "notice", "use_policy")
_LEFT_OUT = ("adapter_config.json", "trainer_state.json")


@dataclass(frozen=True)
class _Merge:
    """A merge that can be done tensor by tensor.

    Attributes:
        updates: makes one adapted layer at a time.
        layers: name of a tensor in the files -> name of the adapted layer that it is the weight of.
        kept: name of a tensor in the files -> the one that was trained and saved whole in its place.
        model: the base model without numbers.
    """

    shards: Shards
    updates: SavedUpdates | PeftUpdates
    layers: dict[str, str]
    kept: dict[str, Tensor]
    model: nn.Module


def merge_shards(folder: Path, out: Path, source: Source) -> Any | None:
    """Merge the adapter in `folder` into a copy of the base model's files.

    Returns:
        `lowdim.export.ExportResult`; None where this way is not open, and nothing was written: the base is not a folder of
        plain safetensors, or the adapter acts on the whole model, brings a head, was trained over quantized weights, or changes
        a weight that others share.

    Raises:
        CheckpointError: a file is missing or damaged, or the adapter was trained on another base model.
        ValueError: a merged weight has entries that its dtype cannot hold.
        OSError: no space or no permission; nothing is left in `out`.
    """
    from lowdim.adapters.core.merging import warn_of_lost_zeros
    from lowdim.export import merged_files
    from lowdim.files import whole_folder

    found = _planned(folder, source)
    if found is None:
        return None
    space = _Space()
    zeros: list[LayerChange] = []
    changes: dict[str, Callable[[Tensor], Tensor]] = {
        **{key: _merged(found.updates, name, space, zeros) for key, name in found.layers.items()},
        **{key: _replaced(value) for key, value in found.kept.items()},
    }
    with whole_folder(out) as draft:
        for name, file in _companions(found.shards, folder).items():
            (draft / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(file, draft / name)
        found.shards.copy(draft, changes)
        warn_of_lost_zeros(zeros)
        return merged_files(found.model, out, draft)


def _planned(folder: Path, source: Source) -> _Merge | None:
    from lowdim.adapters.core.files.layout import read_adapter
    from lowdim.adapters.core.files.peft_in import PeftUpdates
    from lowdim.adapters.core.files.peft_reader import read_peft
    from lowdim.adapters.core.files.saved import SavedUpdates, saved_method
    from lowdim.adapters.core.whole import WholeMethod
    from lowdim.models import skeleton
    from lowdim.models.shards import Shards

    about = described(folder)
    if about.labels or about.kind is None or about.quantize is not None:
        return None
    model = skeleton(source, about.kind)
    shards = None if model is None else Shards.of(Path(source.path))
    if model is None or shards is None:
        return None
    kept: dict[str, Tensor] = {}
    if about.of_peft:
        adapter = read_peft(folder)
        if adapter.kept or adapter.bases:
            return None
        updates: SavedUpdates | PeftUpdates = PeftUpdates(model, folder, adapter)
    else:
        tensors, header = read_adapter(folder)
        method = saved_method(header, tensors, folder)
        if isinstance(method, WholeMethod):
            return None
        updates = SavedUpdates(model, folder, method, tensors, header)
        kept = {key: value for key, value in tensors.items() if key.startswith(tuple(f"{m}." for m in header.modules_to_save))}
    wanted = {f"{name}.weight": cast("Tensor", layer.weight) for name, layer in updates.layers.items()} | kept
    keys = {name: _key(shards, model, name, tuple(value.shape)) for name, value in wanted.items()}
    if None in keys.values() or _shared(model, wanted) or any(map(_unusual, updates.layers.values())):
        return None
    found = _Merge(
        shards,
        updates,
        {str(keys[f"{name}.weight"]): name for name in updates.layers},
        {str(keys[name]): value for name, value in kept.items()},
        model.to(next((shards.entries[str(key)].dtype for key in keys.values()), None)),
    )
    return found if _separate(found) else None


def _key(shards: Shards, model: Any, name: str, shape: tuple[int, ...]) -> str | None:
    """What a parameter is called in the files, which may leave out the name of the inner model, or add it."""
    inner = f"{model.base_model_prefix}."
    for key in (name, name.removeprefix(inner), inner + name):
        entry = shards.entries.get(key)
        if entry is not None and entry.shape == shape and entry.dtype is not None:
            return key
    return None


def _shared(model: nn.Module, names: Iterable[str]) -> bool:
    """Whether one of the parameters has another name, too: merged, it could no longer be shared."""
    from lowdim.surgery import tied_parameters

    tied = {name for group in tied_parameters(model) for name in group}
    return any(name in tied for name in names)


def _unusual(layer: nn.Module) -> bool:
    """Whether a layer needs more than its weight and bias to be merged."""
    return bool(layer._buffers or layer._modules or set(layer._parameters) - {"weight", "bias"})


def _separate(found: _Merge) -> bool:
    """Whether each layer's update depends on its own tensors alone: seen from that of the smallest layer."""
    from lowdim.adapters.core.update import WeightUpdate

    key, name = min(
        found.layers.items(), key=lambda item: found.shards.entries[item[0]].stop - found.shards.entries[item[0]].start
    )
    layer = found.updates.adapted(name, _holding(found.updates.layers[name], found.shards.read(key)))
    return type(layer.update).connect is WeightUpdate.connect


def _holding(layer: nn.Module, weight: Tensor, space: _Space | None = None) -> nn.Module:
    """A layer of shapes alone with this weight, in float32 or better."""
    import torch
    from torch import nn

    from lowdim.linalg import wide
    from lowdim.surgery import shallow_copy

    exact = wide(weight) if space is None else space(weight)
    held = shallow_copy(layer)
    held._parameters["weight"] = nn.Parameter(exact, requires_grad=False)
    if held._parameters.get("bias") is not None:
        held._parameters["bias"] = nn.Parameter(torch.zeros(layer.bias.shape), requires_grad=False)  # type: ignore[union-attr]
    return held


def _merged(
    updates: SavedUpdates | PeftUpdates, name: str, space: _Space, zeros: list[LayerChange]
) -> Callable[[Tensor], Tensor]:
    """What puts the merged weight of a layer in the place of the one in the file; `zeros` is given those of a sparse one."""
    from lowdim.adapters.core.merging import merged_weight, zeros_of

    def change(weight: Tensor) -> Tensor:
        layer = _holding(updates.layers[name], weight, space)
        updates.check_base(name, layer)
        merged_weight(name, updates.adapted(name, layer), weight)
        if (change := zeros_of(name, cast("Tensor", layer.weight), weight)) is not None:
            zeros.append(change)
        return weight

    return change


class _Space:
    """Memory for one weight in float32 that is used again for each layer: fresh memory costs more time than the arithmetic."""

    def __init__(self) -> None:
        self._held: Tensor | None = None

    def __call__(self, weight: Tensor) -> Tensor:
        """A copy of `weight` in float32 or better, in the memory of the last one where that is float32."""
        import torch

        if weight.dtype.itemsize > 4:
            return weight.clone()
        if self._held is None or self._held.numel() < weight.numel():
            self._held = None  # freed before the new one is made
            self._held = torch.empty(weight.numel())
        return self._held[: weight.numel()].view(weight.shape).copy_(weight)


def _replaced(value: Tensor) -> Callable[[Tensor], Tensor]:
    return lambda before: value.to(before.dtype)


def _companions(shards: Shards, adapter: Path) -> dict[str, Path]:
    """The files that go along with the weights, by their names in the new folder; the adapter's tokenizer comes first."""
    from lowdim.models.shards import SHARDS_INDEX, SINGLE

    base, own = shards.folder, (adapter / "tokenizer_config.json").is_file()
    found = {file.name: file for file in sorted(base.iterdir()) if file.is_file() and _goes_along(file.name)}
    found = {name: file for name, file in found.items() if not (own and name.startswith(_TOKENIZER))}
    if shards.files == (SINGLE,):
        found.pop(SHARDS_INDEX, None)
    if own:
        found |= {file.name: file for file in sorted(adapter.iterdir()) if file.is_file() and file.name.startswith(_TOKENIZER)}
    else:
        found |= {file.relative_to(base).as_posix(): file for file in sorted(base.glob("additional_chat_templates/*.jinja"))}
    return found


def _goes_along(name: str) -> bool:
    from lowdim.models.shards import SHARDS_INDEX

    if name.endswith(".index.json"):
        return name == SHARDS_INDEX
    return name not in _LEFT_OUT and (name.lower().endswith(_TEXTS) or name.lower().startswith(_LICENSES))
