"""Whether PEFT loads a folder as it is meant: tried on a copy of the model that has shapes and no numbers."""

from __future__ import annotations

import copy
import importlib.util
import warnings
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lowdim.adapters.core.layer import AdaptedLayer
from lowdim.adapters.core.shared import SHARED
from lowdim.surgery import is_quantized, make_linear

__all__ = ["check_in_peft"]

_INSTEAD = "merge() it and save the model"


def check_in_peft(model: nn.Module, layers: Iterable[str], tensors: Mapping[str, Tensor], folder: Path) -> None:
    """Load `folder` with the installed PEFT; without PEFT, or for a model that cannot be copied, nothing is checked.

    Raises:
        ValueError: PEFT cannot load it, adapts other layers, or leaves a tensor out.
    """
    shell = _shell(model) if importlib.util.find_spec("peft") is not None else None
    if shell is None:
        return
    from peft import PeftConfig, get_peft_model, set_peft_model_state_dict
    from peft.utils import ModulesToSaveWrapper

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            loaded: Any = get_peft_model(shell, PeftConfig.from_pretrained(str(folder)), low_cpu_mem_usage=True)  # type: ignore[arg-type]
            result = set_peft_model_state_dict(loaded, dict(tensors), low_cpu_mem_usage=True)
    except Exception as error:  # PEFT has no error of its own for a model that it does not adapt
        reason = " ".join(str(error).split())[:400]
        raise ValueError(f"PEFT cannot load this adapter ({type(error).__name__}: {reason}); {_INSTEAD}") from error
    found = {name: module for name, module in loaded.base_model.model.named_modules() if hasattr(module, "lora_A")}
    if found.keys() != set(layers):
        odd = sorted(found.keys() ^ set(layers))
        raise ValueError(f"PEFT would adapt other layers: {', '.join(odd[:4])}; {_INSTEAD}")
    scaled = [name for name, module in found.items() if module.scaling["default"] != 1.0]
    if scaled:
        raise ValueError(f"PEFT would scale the update of layer {scaled[0]}; {_INSTEAD}")
    wrappers = [module for module in loaded.modules() if isinstance(module, ModulesToSaveWrapper)]
    count = sum(_numbers(module) for module in (*found.values(), *(wrapper.modules_to_save for wrapper in wrappers)))
    if result.unexpected_keys or count != sum(value.numel() for value in tensors.values()):
        odd = ", ".join(result.unexpected_keys[:4]) or f"{count:,} numbers are loaded"
        raise ValueError(f"PEFT would not load all of this adapter ({odd}); {_INSTEAD}")


def _numbers(part: nn.Module) -> int:
    """The count of numbers that a layer of PEFT's, or a module that it saves, has besides the model's own."""
    return sum(value.numel() for key, value in part.state_dict().items() if not key.startswith("base_layer."))


def _shell(model: nn.Module) -> nn.Module | None:
    """The plain model without numbers; None if it cannot be copied, or holds its numbers where a copy would take them all."""
    if any(hasattr(module, "_hf_hook") for module in model.modules()):
        return None
    memo: dict[int, Any] = {}
    for tensor in (*model.parameters(), *model.buffers()):
        empty = torch.empty(tensor.shape, dtype=tensor.dtype, device="meta")
        memo[id(tensor)] = nn.Parameter(empty, requires_grad=False) if isinstance(tensor, nn.Parameter) else empty
    for module in model.modules():
        if is_quantized(module):
            shape = (module.out_features, module.in_features)
            memo[id(module)] = make_linear(torch.empty(*shape, device="meta"), requires_grad=False)  # type: ignore[arg-type]
    try:
        for module in list(model.modules()):
            if isinstance(module, AdaptedLayer):
                memo[id(module)] = copy.deepcopy(module.plain, memo)
        shell = copy.deepcopy(model, memo)
    except (TypeError, RuntimeError, AttributeError):  # something in it is no module and knows no copy
        return None
    for name in [name for name, _ in shell.named_children() if name.startswith(SHARED)]:
        delattr(shell, name)
    return shell
