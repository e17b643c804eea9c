"""Tiny random decoders of many architectures whose attention is not flat, for tests of the KV cache."""

from __future__ import annotations

import torch

#: Name -> configuration's class, the model's class, and what differs from `SIZES`.
MODELS = {
    "llama": ("LlamaConfig", "LlamaForCausalLM", {}),
    "qwen3": ("Qwen3Config", "Qwen3ForCausalLM", {"head_dim": 8}),
    "mistral": ("MistralConfig", "MistralForCausalLM", {"sliding_window": None}),
    "phi3": ("Phi3Config", "Phi3ForCausalLM", {}),
    "olmo2": ("Olmo2Config", "Olmo2ForCausalLM", {}),
    "gemma2": ("Gemma2Config", "Gemma2ForCausalLM", {"head_dim": 8, "query_pre_attn_scalar": 8, "sliding_window": 6}),
    "gemma3": (
        "Gemma3TextConfig",
        "Gemma3ForCausalLM",
        {
            "head_dim": 8,
            "query_pre_attn_scalar": 8,
            "sliding_window": 6,
            "layer_types": ["sliding_attention", "full_attention"],
        },
    ),
    "cohere": ("CohereConfig", "CohereForCausalLM", {"logit_scale": 1.0}),
    "smollm2": (
        "LlamaConfig",
        "LlamaForCausalLM",
        {"hidden_size": 72, "num_attention_heads": 9, "num_key_value_heads": 3, "tie_word_embeddings": True},
    ),
}
SIZES = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": None,
    "initializer_range": 0.3,
}


def build(name: str = "llama", *, seed: int = 0, dtype: torch.dtype = torch.float32, **changes):
    """The model, in evaluation mode, with the same numbers each time; it never ends a text by itself."""
    import transformers

    config, model, own = MODELS[name]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        made = getattr(transformers, model)(getattr(transformers, config)(**{**SIZES, **own, **changes}))
    made.generation_config.eos_token_id = None
    return made.to(dtype).eval()


def ids(rows: int = 2, length: int = 9, seed: int = 1) -> torch.Tensor:
    return torch.randint(3, 64, (rows, length), generator=torch.Generator().manual_seed(seed))


def batches() -> list[dict[str, torch.Tensor]]:
    return [{"input_ids": ids(8, 24, seed)} for seed in (2, 3)]
