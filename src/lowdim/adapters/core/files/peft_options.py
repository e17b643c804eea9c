"""What PEFT's options mean for the tensors of a folder: those that leave `B A` as it is, and those that are refused by name."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lowdim.errors import CheckpointError, shown

__all__ = ["HARMLESS", "PLAIN", "refuse_options", "refuse_type"]

#: Option -> the values that leave `B A` as it is, and what any other means.
PLAIN: Mapping[str, tuple[tuple[Any, ...], str]] = {
    "use_dora": ((False,), "DoRA, which scales the rows of the weight"),
    "bias": (("none",), "trained biases of the base model"),
    "lora_bias": ((False,), "a bias of B"),
    "target_parameters": ((None, []), "factors of parameters that are no layer's weight (experts)"),
    "trainable_token_indices": ((None, [], {}), "trained rows of the embedding"),
    "layer_replication": ((None, []), "a model in which layers are repeated"),
    "use_qalora": ((False,), "QALoRA, which averages groups of inputs"),
    "use_bdlora": ((None,), "BD-LoRA, whose factors are block-diagonal"),
    "alora_invocation_tokens": ((None, []), "aLoRA, which acts from some token on"),
    "arrow_config": ((None,), "Arrow, which chooses among adapters"),
    "kasa_config": ((None,), "KaSA, which cuts the base's weights"),
    "monteclora_config": ((None,), "MonteCLoRA, which draws its factors"),
    "init_lora_weights": (
        (True, False, "gaussian", "eva", "orthogonal", "mica"),
        "a start that changes the base's weights (save_pretrained takes path_initial_model_for_weight_conversion)",
    ),
}
_LAYERS = {"target_modules", "exclude_modules", "layers_pattern", "layers_to_transform", "modules_to_save", "fan_in_fan_out"}
_SCALE = {"r", "lora_alpha", "rank_pattern", "alpha_pattern", "use_rslora", "lora_dropout", "ensure_weight_tying"}
_TRAINING = {"corda_config", "eva_config", "loftq_config", "lora_ga_config", "velora_config", "qalora_group_size"}
_MACHINE = {"inference_mode", "megatron_config", "megatron_core", "runtime_config"}
_ABOUT = {"auto_mapping", "base_model_name_or_path", "peft_type", "peft_version", "revision", "task_type"}
#: Options with any value: they are read, or say where the tensors belong, how they were trained and where they came from.
HARMLESS = frozenset(_LAYERS | _SCALE | _TRAINING | _MACHINE | _ABOUT)

#: Types that change what goes into the model, or choose among adapters: there is nothing to merge.
_INPUTS = {"PROMPT_TUNING", "MULTITASK_PROMPT_TUNING", "P_TUNING", "PREFIX_TUNING", "ADAPTION_PROMPT", "CPT", "CARTRIDGE"}
_UNMERGED = frozenset(_INPUTS | {"XLORA", "POLY", "SHADOW"})
_MERGE = "merge it with PEFT (merge_and_unload) and take the merged model as the base"


def refuse_type(content: Mapping[str, Any], folder: Path) -> None:
    """Check that a configuration is that of a LoRA, whatever else is in it.

    Raises:
        CheckpointError: it is another of PEFT's types.
    """
    kind = content.get("peft_type")
    if isinstance(kind, str) and kind != "LORA":
        do = "nothing in it can be merged, so it stays with PEFT" if kind in _UNMERGED else _MERGE
        raise CheckpointError(f"{folder} holds PEFT's {shown(kind)}; lowdim reads its LORA: {do}")


def refuse_options(content: Mapping[str, Any], path: Path) -> None:
    """Check that the tensors mean `B A` and nothing more.

    Raises:
        CheckpointError: an option says that they mean more, or is not known and set.
    """
    for name, value in content.items():
        allowed, meaning = PLAIN.get(name, ((), ""))
        if meaning and value not in allowed:
            raise CheckpointError(f"{path}: {name}={shown(value)} means {meaning}; lowdim reads B A only: {_MERGE}")
        if not meaning and name not in HARMLESS and value not in (None, False, [], {}):
            raise CheckpointError(
                f"{path}: lowdim does not know the option {shown(name)[1:-1]} (={shown(value)}) of PEFT's LoRA; remove it from "
                f"the file if it does not change what B A means, else {_MERGE}"
            )
