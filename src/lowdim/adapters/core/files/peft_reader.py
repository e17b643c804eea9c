"""Reading a LoRA folder of PEFT's: its configuration, checked, and its tensors, sorted by layer. Nothing in it is executed."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from torch import Tensor

from lowdim.adapters.core.files.peft_names import PREFIX
from lowdim.errors import CheckpointError, shown
from lowdim.files import read_json_object, read_tensors

__all__ = ["PeftAdapter", "is_peft_folder", "read_peft"]

CONFIG, TENSORS, PICKLED = "adapter_config.json", "adapter_model.safetensors", "adapter_model.bin"

#: Entries that change what the tensors mean, and the values that do not.
_PLAIN: Mapping[str, tuple[Any, ...]] = {
    "bias": ("none",),
    "use_dora": (False,),
    "lora_bias": (False,),
    "use_qalora": (False,),
    "use_bdlora": (None,),
    "target_parameters": (None, []),
    "layer_replication": (None, []),
    "trainable_token_indices": (None, [], {}),
    "alora_invocation_tokens": (None, []),
    "arrow_config": (None,),
    "init_lora_weights": (True, False, "gaussian", "eva", "orthogonal"),  # others take a part out of the base's weights
}
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
    """Whether a folder holds an adapter that PEFT wrote."""
    return (folder / CONFIG).is_file()


def read_peft(folder: Path) -> PeftAdapter:
    """Read a folder of PEFT's; nothing in it is executed.

    Raises:
        CheckpointError: a file is missing or damaged, it is no LoRA, or one with options whose meaning is not that of `B A`.
    """
    path = folder / CONFIG
    content = read_json_object(path)
    try:
        config = _Config.model_validate(content)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        raise CheckpointError(f"{path}: {shown('.'.join(map(str, first['loc'])))[1:-1]}: {first['msg']}") from None
    if config.peft_type != "LORA":
        raise CheckpointError(
            f"{folder} holds PEFT's {shown(config.peft_type)}; lowdim reads its LORA. Merge it with PEFT (merge_and_unload)"
        )
    for name, allowed in _PLAIN.items():
        if name in content and content[name] not in allowed:
            raise CheckpointError(
                f"{path}: {name}={shown(content[name])} means more than B A, which lowdim's LoRA cannot give exactly; merge it "
                "with PEFT (merge_and_unload)"
            )
    return PeftAdapter(config, *_sorted_out(_tensors(folder), folder))


def _tensors(folder: Path) -> dict[str, Tensor]:
    if (folder / TENSORS).is_file():
        return read_tensors(folder / TENSORS)[0]
    path = folder / PICKLED
    if not path.is_file():
        raise CheckpointError(f"{folder / TENSORS} does not exist")
    try:
        tensors = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # unpickling damaged bytes raises anything
        reason = " ".join(str(error).split())[:200]
        raise CheckpointError(f"{path} is damaged, or holds more than tensors, which is not read ({reason})") from error
    if not isinstance(tensors, dict) or not all(isinstance(k, str) and isinstance(v, Tensor) for k, v in tensors.items()):
        raise CheckpointError(f"{path} is damaged: it must hold tensors by name; got {type(tensors).__name__}")
    return tensors


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
