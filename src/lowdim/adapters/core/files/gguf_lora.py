"""A LoRA as a GGUF file, as llama.cpp loads it: its names of tensors, its order of rows, its metadata.

Source: llama.cpp's `convert_lora_to_gguf.py`, `conversion/` and `src/llama-adapter.cpp`; names are gguf-py's own table.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lowdim.adapters.core.files.peft_names import PREFIX
from lowdim.errors import MissingExtraError

__all__ = ["ARCHITECTURES", "FILE", "Names", "gguf_problems", "rope_order", "write_gguf_lora"]

FILE = "adapter.gguf"


@dataclass(frozen=True)
class Architecture:
    """A model class in GGUF.

    Attributes:
        name: llama.cpp's, `general.architecture`.
        turned: whether the rows of the query and key projections stand in another order there: llama.cpp rotates neighbours,
            `(x₀, x₁), (x₂, x₃), …`, where transformers rotates halves, `(x₀, x_{d/2}), (x₁, x_{d/2+1}), …`.
    """

    name: str
    turned: bool = False


#: Class of transformers -> its architecture. Others are refused: a wrong name or order would load and answer wrongly.
ARCHITECTURES: Mapping[str, Architecture] = {
    "ArceeForCausalLM": Architecture("arcee", turned=True),
    "CohereForCausalLM": Architecture("command-r"),
    "Gemma2ForCausalLM": Architecture("gemma2"),
    "Gemma3ForCausalLM": Architecture("gemma3"),
    "GemmaForCausalLM": Architecture("gemma"),
    "GraniteForCausalLM": Architecture("granite", turned=True),
    "LlamaForCausalLM": Architecture("llama", turned=True),
    "MistralForCausalLM": Architecture("llama", turned=True),
    "MixtralForCausalLM": Architecture("llama", turned=True),
    "NemotronForCausalLM": Architecture("nemotron"),
    "Olmo2ForCausalLM": Architecture("olmo2"),
    "OlmoForCausalLM": Architecture("olmo", turned=True),
    "Phi3ForCausalLM": Architecture("phi3"),
    "Qwen2ForCausalLM": Architecture("qwen2"),
    "Qwen3ForCausalLM": Architecture("qwen3"),
    "SmolLM3ForCausalLM": Architecture("smollm3", turned=True),
    "StableLmForCausalLM": Architecture("stablelm"),
    "Starcoder2ForCausalLM": Architecture("starcoder2"),
}


def gguf_problems(model: nn.Module, layers: Iterable[str]) -> list[str]:
    """The reasons why an adapter of these layers has no place in a GGUF file; empty if it has.

    Raises:
        MissingExtraError: gguf is not installed.
    """
    kind = type(model).__name__
    if kind not in ARCHITECTURES:
        known = ", ".join(name.removesuffix("ForCausalLM") for name in ARCHITECTURES)
        return [
            f"the names that a {kind} has in GGUF are not known here (known are the ...ForCausalLM of {known}); a plain PEFT "
            "folder may be one that llama.cpp's own convert_lora_to_gguf.py takes"
        ]
    names = Names(model)
    nameless = [name for name in layers if names.of(name) is None]
    return [f"layers without a name in GGUF: {', '.join(nameless[:4])}"] if nameless else []


def write_gguf_lora(path: Path, model: nn.Module, tensors: Mapping[str, Tensor], alpha: float) -> None:
    """Write PEFT's tensors of a LoRA with one rank as float32 GGUF; `gguf_problems` must have found none.

    For each layer, `NAME.lora_a (rank, in)` and `NAME.lora_b (out, rank)`, with the factor `alpha / rank`; rows of the second
    in llama.cpp's order. The token embedding's first factor is stored transposed, `(num, rank)`.
    """
    gguf, names = gguf_module(), Names(model)
    writer = gguf.GGUFWriter(path, names.architecture.name)
    writer.add_type(gguf.GGUFType.ADAPTER)
    writer.add_string(gguf.Keys.Adapter.TYPE, "lora")
    writer.add_float32(gguf.Keys.Adapter.LORA_ALPHA, float(alpha))
    for key, value in tensors.items():
        layer, _, side = key.removeprefix(PREFIX).removesuffix(".weight").rpartition(".")
        name = names.of(layer)
        first = side.endswith("A")
        if side.startswith("lora_embedding_") and first:
            value = value.T
        elif not first and (order := names.order(str(name), len(value))) is not None:
            value = value[order]
        ready = value.detach().to("cpu", torch.float32).contiguous().numpy()
        writer.add_tensor(f"{name}.{'lora_a' if first else 'lora_b'}", ready)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def rope_order(rows: int, heads: int) -> Tensor:
    """For each row of a query or key projection in llama.cpp's order, which of transformers' it is, `(rows,)`.

    Example:
        >>> from lowdim.adapters.core.files.gguf_lora import rope_order
        >>> rope_order(8, 2).tolist()
        [0, 2, 1, 3, 4, 6, 5, 7]
    """
    return torch.arange(rows).view(heads, 2, rows // heads // 2).transpose(1, 2).reshape(-1)


def gguf_module() -> Any:
    """The module gguf.

    Raises:
        MissingExtraError: it is not installed.
    """
    try:
        import gguf
    except ImportError:
        raise MissingExtraError("gguf", "gguf", "an adapter for llama.cpp") from None
    return gguf


class Names:
    """What a model's layers are called in GGUF, and in which order their rows stand."""

    def __init__(self, model: Any):
        gguf, config = gguf_module(), model.config
        self.architecture = ARCHITECTURES[type(model).__name__]
        kind = next(kind for kind, name in gguf.MODEL_ARCH_NAMES.items() if name == self.architecture.name)
        self._table = gguf.get_tensor_name_map(kind, config.num_hidden_layers)
        heads = config.num_attention_heads
        self._heads = {"attn_q": heads, "attn_k": getattr(config, "num_key_value_heads", None) or heads}

    def of(self, layer: str) -> str | None:
        """The name of a layer's weight, such as `blk.0.attn_q.weight`; None if it has none."""
        return self._table.get_name(f"{layer}.weight", try_suffixes=(".weight",))

    def order(self, name: str, rows: int) -> Tensor | None:
        """`rope_order` of a weight, by its name in GGUF; None where rows keep their places."""
        heads = self._heads.get(name.split(".")[-2]) if self.architecture.turned else None
        return None if heads is None else rope_order(rows, heads)
