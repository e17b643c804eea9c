"""Requirements of other programs on a PEFT LoRA folder, checked before one is written.

vLLM (`vllm/lora/peft_helper.py`, `lora_model.py`, `config/lora.py`): one rank and one alpha for all layers (`rank_pattern` is
not read), a rank up to its `max_lora_rank`, no DoRA, no biases, no `modules_to_save`, LoRA tensors of linear layers, and of
embeddings and the head where the model's class registers them.

llama.cpp (`src/llama-adapter.cpp`, which loads the GGUF file that `gguf_lora` writes): an architecture that it knows by name,
one alpha for all, matrices in the layout of nn.Linear, nothing but LoRA tensors, no embedding but the tokens', and neither that
nor the head where both share their weight.
"""

from __future__ import annotations

import shlex
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from torch import nn

from lowdim.adapters.core.files.gguf_lora import FILE, gguf_problems
from lowdim.adapters.core.layer import AdaptedLayer
from lowdim.surgery import is_conv1d

__all__ = ["TARGETS", "VLLM_RANKS", "problems", "rank_limit", "usage"]

#: Program -> its usual name.
TARGETS = {"vllm": "vLLM", "llamacpp": "llama.cpp"}
#: Allowed values of `--max-lora-rank`; the default is 16.
VLLM_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
VLLM_DEFAULT = 16


def rank_limit(target: str | None) -> int | None:
    """The highest rank that the program loads; None where there is no limit."""
    return VLLM_RANKS[-1] if target == "vllm" else None


def problems(adapted: Any, target: str) -> list[str]:
    """The reasons why the program cannot load the adapter (an `Adapted`) as LoRA; empty if it can."""
    found = []
    name = TARGETS[target]
    if adapted.modules_to_save:
        found.append(
            f"modules that are trained and saved whole ({_some(adapted.modules_to_save)}): {name} reads LoRA tensors only"
        )
    kinds: dict[str, list[str]] = {}
    for layer_name, layer in adapted.layers.items():
        reason = _unfit(adapted, layer_name, layer, target)
        if reason:
            kinds.setdefault(reason, []).append(layer_name)
    found += [f"{reason}: {_some(names)}" for reason, names in kinds.items()]
    return found or (gguf_problems(adapted.model, adapted.layers) if target == "llamacpp" else [])


def _unfit(adapted: Any, name: str, layer: AdaptedLayer, target: str) -> str:
    program = TARGETS[target]
    if layer.kind.startswith("conv"):
        return f"convolutions, for which {program} does not support LoRA"
    if is_conv1d(layer.plain):
        why = "its models with Conv1D do not support LoRA" if target == "vllm" else "no model with them is written as GGUF"
        return f"Conv1D layers, whose weight is stored transposed ({why})"
    inputs, outputs = (_end(adapted.model, side) for side in ("input", "output"))
    if layer.kind == "embedding" and inputs is not layer:
        return f"embeddings other than the tokens', for which {program} does not support LoRA"
    ends = layer is inputs or layer is outputs
    if target == "llamacpp" and ends and (name in adapted.tied or _ties_embeddings(adapted.model)):
        return "an embedding and a head that share their weight, which llama.cpp stores once"
    return ""


def _end(model: nn.Module, side: str) -> nn.Module | None:
    getter = getattr(model, f"get_{side}_embeddings", None)
    try:
        return getter() if callable(getter) else None  # type: ignore[return-value]
    except (NotImplementedError, AttributeError):
        return None  # a transformers model without it


def _ties_embeddings(model: Any) -> bool:
    return bool(getattr(getattr(model, "config", None), "tie_word_embeddings", False))


def usage(adapted: Any, target: str, folder: str, base: str | None, rank: int) -> list[str]:
    """What the user needs to know: the command, and what cannot be checked without the program."""
    if target == "llamacpp":
        file = shlex.quote(f"{folder}/{FILE}")
        model, more = _base_gguf(base)
        return [f"llama-cli --model {model} --lora {file}", f"llama-server --model {model} --lora {file}", *more]
    need = next(choice for choice in VLLM_RANKS if choice >= rank)
    flag = f" --max-lora-rank {need}" if need > VLLM_DEFAULT else ""
    model = shlex.quote(base) if base else "BASE_MODEL"
    notes = [f"vllm serve {model} --enable-lora{flag} --lora-modules {shlex.quote(f'NAME={folder}')}"]
    if flag:
        notes.append(f"the rank is {rank} and vLLM's default limit {VLLM_DEFAULT}, so --max-lora-rank {need} is needed")
    ends = [name for name, layer in adapted.layers.items() if layer in (_end(adapted.model, s) for s in ("input", "output"))]
    if ends:
        notes.append(
            f"{_some(ends)}: only model classes of vLLM that register embeddings for LoRA load these (Llama, Qwen3, ...)"
        )
    return [*notes, "the base model's class must support LoRA in vLLM (its list of supported models says so)"]


def _base_gguf(base: str | None) -> tuple[str, list[str]]:
    """The base model as llama.cpp reads it, and how to get it."""
    place = Path(base) if base else None
    files = sorted(place.glob("*.gguf")) if place is not None and place.is_dir() else []
    if len(files) == 1:
        return shlex.quote(str(files[0])), []
    wanted = shlex.quote(base) if base else "BASE_MODEL"
    return "BASE.gguf", [
        f"BASE.gguf is the base model, quantized or not; llama.cpp's convert_hf_to_gguf.py makes it from the folder {wanted}"
    ]


def _some(names: Iterable[str]) -> str:
    names = list(names)
    return ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")
