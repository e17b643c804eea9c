"""Shapes of Llama models without weights, for pretraining and for forecasts: sizes as in the papers on low-rank pretraining.

| name | width | inner | blocks | heads | parameters (32,000 tokens) |
| --- | --- | --- | --- | --- | --- |
| `llama-tiny` | 128 | 344 | 4 | 4 | 9.0 M (0.8 M without tokens) |
| `llama-60m` | 512 | 1376 | 8 | 8 | 58 M |
| `llama-130m` | 768 | 2048 | 12 | 12 | 134 M |
| `llama-350m` | 1024 | 2736 | 24 | 16 | 368 M |
| `llama-1b` | 2048 | 5461 | 24 | 32 | 1.34 B |
| `llama-7b` | 4096 | 11008 | 32 | 32 | 6.74 B |
"""

from __future__ import annotations

from typing import Any

__all__ = ["SHAPES", "llama_config"]

#: width, inner width of the perceptron, blocks, heads, longest text
SHAPES: dict[str, tuple[int, int, int, int, int]] = {
    "llama-tiny": (128, 344, 4, 4, 1024),
    "llama-60m": (512, 1376, 8, 8, 1024),
    "llama-130m": (768, 2048, 12, 12, 1024),
    "llama-350m": (1024, 2736, 24, 16, 1024),
    "llama-1b": (2048, 5461, 24, 32, 2048),
    "llama-7b": (4096, 11008, 32, 32, 2048),
}


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
