"""Shapes of models without weights, for pretraining and for forecasts.

Llama models of the papers on low-rank pretraining (`SHAPES`):

| name | width | inner | blocks | heads | parameters (32,000 tokens) |
| --- | --- | --- | --- | --- | --- |
| `llama-tiny` | 128 | 344 | 4 | 4 | 9.0 M (0.8 M without tokens) |
| `llama-60m` | 512 | 1376 | 8 | 8 | 58 M |
| `llama-130m` | 768 | 2048 | 12 | 12 | 134 M |
| `llama-350m` | 1024 | 2736 | 24 | 16 | 368 M |
| `llama-1b` | 2048 | 5461 | 24 | 32 | 1.34 B |
| `llama-7b` | 4096 | 11008 | 32 | 32 | 6.74 B |

Models that are in use (`MODELS`), as their makers' `config.json` describe them:

| name | parameters |
| --- | --- |
| `llama-3.2-1b` | 1.24 B |
| `llama-3.2-3b` | 3.21 B |
| `mistral-7b` | 7.24 B |
| `qwen2.5-7b` | 7.62 B |
| `llama-3.1-8b` | 8.03 B |
| `llama-2-13b` | 13.0 B |
| `qwen2.5-32b` | 32.8 B |
| `llama-3.1-70b` | 70.6 B |
| `mixtral-8x7b` | 46.7 B, a mixture of 8 experts |
"""

from __future__ import annotations

from typing import Any

__all__ = ["MODELS", "SHAPES", "is_shape", "llama_config", "shape_config", "shape_names"]

#: width, inner width of the perceptron, blocks, heads, longest text
SHAPES: dict[str, tuple[int, int, int, int, int]] = {
    "llama-tiny": (128, 344, 4, 4, 1024),
    "llama-60m": (512, 1376, 8, 8, 1024),
    "llama-130m": (768, 2048, 12, 12, 1024),
    "llama-350m": (1024, 2736, 24, 16, 1024),
    "llama-1b": (2048, 5461, 24, 32, 2048),
    "llama-7b": (4096, 11008, 32, 32, 2048),
}

#: class of the configuration; width, inner width, blocks, heads, heads of keys and values, words, longest text; what else
MODELS: dict[str, tuple[str, tuple[int, int, int, int, int, int, int], dict[str, Any]]] = {
    "llama-3.2-1b": ("LlamaConfig", (2048, 8192, 16, 32, 8, 128_256, 131_072), {"tie_word_embeddings": True, "head_dim": 64}),
    "llama-3.2-3b": ("LlamaConfig", (3072, 8192, 28, 24, 8, 128_256, 131_072), {"tie_word_embeddings": True, "head_dim": 128}),
    "mistral-7b": ("MistralConfig", (4096, 14336, 32, 32, 8, 32_000, 32_768), {"sliding_window": None}),
    "qwen2.5-7b": ("Qwen2Config", (3584, 18944, 28, 28, 4, 152_064, 131_072), {}),
    "llama-3.1-8b": ("LlamaConfig", (4096, 14336, 32, 32, 8, 128_256, 131_072), {}),
    "llama-2-13b": ("LlamaConfig", (5120, 13824, 40, 40, 40, 32_000, 4096), {}),
    "qwen2.5-32b": ("Qwen2Config", (5120, 27648, 64, 40, 8, 152_064, 131_072), {}),
    "llama-3.1-70b": ("LlamaConfig", (8192, 28672, 80, 64, 8, 128_256, 131_072), {}),
    "mixtral-8x7b": (
        "MixtralConfig",
        (4096, 14336, 32, 32, 8, 32_000, 32_768),
        {"num_local_experts": 8, "num_experts_per_tok": 2, "sliding_window": None},
    ),
}


def is_shape(name: str) -> bool:
    """Whether this names a shape without weights."""
    return name in SHAPES or name in MODELS


def shape_names() -> tuple[str, ...]:
    """The names of all shapes."""
    return (*SHAPES, *MODELS)


def shape_config(name: str) -> Any:
    """The transformers configuration of one of `SHAPES` or `MODELS`.

    Example:
        >>> from lowdim.models.architectures import shape_config
        >>> config = shape_config("mixtral-8x7b")
        >>> config.num_hidden_layers, config.num_local_experts
        (32, 8)
    """
    if name in SHAPES:
        return llama_config(name)
    import transformers

    cls, (width, inner, blocks, heads, key_heads, words, longest), more = MODELS[name]
    return getattr(transformers, cls)(
        vocab_size=words,
        hidden_size=width,
        intermediate_size=inner,
        num_hidden_layers=blocks,
        num_attention_heads=heads,
        num_key_value_heads=key_heads,
        max_position_embeddings=longest,
        use_cache=False,
        **{"tie_word_embeddings": False, **more},
    )


def llama_config(name: str, *, vocab_size: int = 32_000) -> Any:
    """The transformers configuration of one of `SHAPES`; embeddings and head are not tied.

    Example:
        >>> from lowdim.models.architectures import llama_config
        >>> llama_config("llama-tiny", vocab_size=258).num_hidden_layers
        4

    Source: Zhao et al., "GaLore", ICML 2024, arXiv 2403.03507, and Touvron et al., "LLaMA", 2023, arXiv 2302.13971.
    """
    from transformers import LlamaConfig

    width, inner, blocks, heads, longest = SHAPES[name]
    return LlamaConfig(
        vocab_size=vocab_size,
        hidden_size=width,
        intermediate_size=inner,
        num_hidden_layers=blocks,
        num_attention_heads=heads,
        max_position_embeddings=longest,
        tie_word_embeddings=False,
        use_cache=False,
    )
