"""Base models as GGUF files that llama.cpp reads: written from a transformers model, or from a quantized file, in float32."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gguf
import torch
from torch import Tensor

#: Architectures whose norms multiply by one plus their weight.
SHIFTED = ("gemma", "gemma2", "gemma3", "nemotron")


def neighbours(rows: Tensor, heads: int) -> Tensor:
    """Rows for a rotation of neighbours: `2 i` and `2 i + 1` of a head are `i` and `i + d / 2` of a rotation of halves."""
    size = len(rows) // heads
    out = torch.empty_like(rows)
    for head in range(heads):
        for i in range(size // 2):
            out[head * size + 2 * i] = rows[head * size + i]
            out[head * size + 2 * i + 1] = rows[head * size + size // 2 + i]
    return out


def write_base(path: Path, model: Any, architecture: str, *, turned: bool, tokens: list[str] | None = None) -> Path:
    """A causal language model of transformers, in float32; `turned` for architectures that rotate neighbours in llama.cpp."""
    config = model.config
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    head = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    writer.add_key_length(head)
    writer.add_value_length(head)
    writer.add_rope_dimension_count(head)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    if hasattr(config, "rms_norm_eps"):
        writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    else:
        writer.add_layer_norm_eps(getattr(config, "layer_norm_eps", None) or config.norm_epsilon)
    for name, add in (
        ("attention_multiplier", writer.add_attention_scale),
        ("embedding_multiplier", writer.add_embedding_scale),
        ("residual_multiplier", writer.add_residual_scale),
        ("logits_scaling", writer.add_logit_scale),
        ("attn_logit_softcapping", writer.add_attn_logit_softcapping),
        ("final_logit_softcapping", writer.add_final_logit_softcapping),
    ):
        if getattr(config, name, None):
            add(getattr(config, name))
    if (architecture.startswith("gemma") and architecture != "gemma") or architecture == "phi3":
        writer.add_sliding_window(config.sliding_window or config.max_position_embeddings)
    writer.add_vocab_size(config.vocab_size)
    words = tokens or [f"<{i}>" for i in range(config.vocab_size)]
    writer.add_tokenizer_model("llama")
    writer.add_token_list(words)
    writer.add_token_scores([-float(i) for i in range(len(words))])
    kinds = [gguf.TokenType.UNKNOWN, gguf.TokenType.CONTROL, gguf.TokenType.CONTROL]
    writer.add_token_types([*kinds, *[gguf.TokenType.NORMAL] * (len(words) - len(kinds))])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    kind = next(kind for kind, name in gguf.MODEL_ARCH_NAMES.items() if name == architecture)
    table = gguf.get_tensor_name_map(kind, config.num_hidden_layers)
    heads = {"attn_q": config.num_attention_heads, "attn_k": config.num_key_value_heads}
    for key, parameter in model.named_parameters():  # a tied head has no second name
        name = table.get_name(key, try_suffixes=(".weight", ".bias"))
        assert name is not None, key
        value, part = parameter.detach().float(), name.split(".")[-2]
        if turned and part in heads:
            value = neighbours(value, heads[part])
        if architecture in SHIFTED and key.endswith("norm.weight"):
            value = value + 1
        writer.add_tensor(name, value.contiguous().numpy())
    return _finished(writer, path)


def dequantized(source: Path, path: Path) -> Path:
    """The same model with every tensor in float32, in the places and the order that the file has."""
    reader = gguf.GGUFReader(source)
    writer = gguf.GGUFWriter(path, reader.fields["general.architecture"].contents())
    for name, field in reader.fields.items():
        if not name.startswith("GGUF.") and name not in ("general.architecture", "general.file_type"):
            inner = field.types[-1] if field.types[0] == gguf.GGUFValueType.ARRAY else None
            writer.add_key_value(name, field.contents(), field.types[0], sub_type=inner)
    writer.add_file_type(gguf.LlamaFileType.ALL_F32)
    for tensor in reader.tensors:
        writer.add_tensor(tensor.name, gguf.dequantize(tensor.data, tensor.tensor_type))
    return _finished(writer, path)


def _finished(writer: Any, path: Path) -> Path:
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path
