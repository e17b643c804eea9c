"""Reading a LoRA folder of PEFT's: its configuration, checked, and its tensors, sorted by layer. Nothing in it is executed."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError
from torch import Tensor

from lowdim.adapters.core.files.layout import TENSORS as OURS
from lowdim.adapters.core.files.peft_names import PREFIX
from lowdim.adapters.core.files.peft_options import refuse_options, refuse_type
from lowdim.errors import CheckpointError, shown
from lowdim.files import read_json_object, read_tensors

__all__ = ["PeftAdapter", "is_of_peft", "is_peft_folder", "read_peft"]

CONFIG, TENSORS, PICKLED = "adapter_config.json", "adapter_model.safetensors", "adapter_model.bin"

_FACTOR = re.compile(r"(?P<layer>.+)\.lora_(?P<kind>embedding_)?(?P<side>[AB])(?:\.default)?(?:\.weight)?")


class _Config(BaseModel):
    """The entries of `adapter_config.json` that say what the tensors of a LoRA mean."""

    model_config = ConfigDict(extra="allow", strict=True, protected_namespaces=())

    peft_type: str
    r: int = Field(8, ge=1)
    lora_alpha: float = Field(8, allow_inf_nan=False)
    lora_dropout: float = Field(0.0, ge=0.0, lt=1.0)
    use_rslora: bool = False
    rank_pattern: dict[str, int] | None = None
    alpha_pattern: dict[str, float] | None = None
    modules_to_save: list[str] | None = None
    ensure_weight_tying: bool = False
    task_type: str | None = None
    base_model_name_or_path: str | None = None
    auto_mapping: dict[str, Any] | None = None


@dataclass(frozen=True)
class PeftAdapter:
    """A LoRA of PEFT's.

    Attributes:
        config: its configuration, checked.
        factors: layer -> `A`, `B` as PEFT stores them.
        kept: tensors of modules that were saved whole, by their names in the model.
        bases: weights of adapted layers, which PEFT adds for embeddings, by the layers' names.
    """

    config: _Config
    factors: dict[str, tuple[Tensor, Tensor]]
    kept: dict[str, Tensor]
    bases: dict[str, Tensor]

    def scale(self, layer: str, rank: int) -> float:
        """The factor of `B A` in a layer."""
        config = self.config
        alpha = _by_pattern(config.alpha_pattern or {}, layer, config.lora_alpha)
        named = _by_pattern(config.rank_pattern or {}, layer, config.r)
        if named != rank:
            raise CheckpointError(f"layer {layer} has factors of rank {rank}, and {CONFIG} says {named}")
        return alpha / (math.sqrt(rank) if config.use_rslora else rank)


def is_peft_folder(folder: Path) -> bool:
    """Whether a folder holds an adapter that PEFT wrote, or a part of one."""
    return any((folder / name).is_file() for name in (CONFIG, TENSORS, PICKLED))


def is_of_peft(folder: Path) -> bool:
    """Whether the adapter in a folder is PEFT's and not lowdim's.

    Raises:
        CheckpointError: it holds neither, and folders with adapters of PEFT's, which saves each but the first in one.
    """
    if (folder / OURS).is_file():
        return False
    if is_peft_folder(folder):
        return True
    inside = sorted(path.name for path in folder.glob("*/") if is_peft_folder(path))
    if inside:
        raise CheckpointError(f"{folder} holds no adapter itself; PEFT saved {', '.join(inside)} in it: name one of these")
    return False


def read_peft(folder: Path) -> PeftAdapter:
    """Read a folder of PEFT's; nothing in it is executed.

    Raises:
        CheckpointError: a file is missing or damaged, the tensors are a pickle, it is no LoRA, or one with options that mean
            more than `B A`, or that are not known.
    """
    path = folder / CONFIG
    content = read_json_object(path)
    refuse_type(content, folder)
    try:
        config = _Config.model_validate(content)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        raise CheckpointError(f"{path}: {shown('.'.join(map(str, first['loc'])))[1:-1]}: {first['msg']}") from None
    refuse_options(content, path)
    return PeftAdapter(config, *_sorted_out(_tensors(folder), folder))


def _tensors(folder: Path) -> dict[str, Tensor]:
    if (folder / TENSORS).is_file():
        return read_tensors(folder / TENSORS)[0]
    if (folder / PICKLED).is_file():
        raise CheckpointError(
            f"{folder / PICKLED} is a pickle, which may run code when it is read; lowdim reads {TENSORS}: load the adapter "
            "with PEFT and save it again (PeftModel.from_pretrained(base, folder).save_pretrained(other))"
        )
    raise CheckpointError(f"{folder / TENSORS} does not exist")


def _sorted_out(
    tensors: Mapping[str, Tensor], folder: Path
) -> tuple[dict[str, tuple[Tensor, Tensor]], dict[str, Tensor], dict[str, Tensor]]:
    """The factors of each layer, modules that were saved whole, and weights of adapted layers."""
    sides: dict[str, dict[str, Tensor]] = {}
    kept, bases = {}, {}
    for key, value in tensors.items():
        name = key.removeprefix(PREFIX)
        match = _FACTOR.fullmatch(name)
        if match is not None:
            sides.setdefault(match["layer"], {})[match["side"]] = value
        elif ".lora_" in name:
            raise CheckpointError(
                f"{folder}: tensor {name} is no factor of a LoRA; merge the adapter with PEFT (merge_and_unload)"
            )
        elif name.endswith(".base_layer.weight"):
            bases[name.removesuffix(".base_layer.weight")] = value
        else:
            kept[re.sub(r"\.modules_to_save(\.default)?\.", ".", name)] = value
    lacking = next((layer for layer, pair in sides.items() if pair.keys() != {"A", "B"}), None)
    if lacking is not None or not sides:
        what = f"layer {lacking} has one of its two factors" if lacking else "it holds no factors"
        raise CheckpointError(f"{folder} is damaged: {what}")
    return {layer: (pair["A"], pair["B"]) for layer, pair in sides.items()}, kept, bases


def _by_pattern(patterns: Mapping[str, Any], layer: str, default: Any) -> Any:
    """PEFT's rule: the first pattern that is the end of the name, from a dot on."""
    for pattern, value in patterns.items():
        try:
            if re.match(rf"(.*\.)?({pattern})$", layer):
                return value
        except re.error:
            raise CheckpointError(f"rank_pattern or alpha_pattern: {shown(pattern)} is no regular expression") from None
    return default
