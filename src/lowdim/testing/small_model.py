"""Small models with fixed numbers, and the output of one with a saved adapter: the same in every process."""

from __future__ import annotations

import importlib
from typing import Any

import torch

import lowdim

__all__ = ["output_of_saved", "sample_input", "small_model", "tied_llama"]


def small_model(seed: int = 0, dtype: torch.dtype = torch.float32) -> Any:  # its parts are read by name
    """Two linear layers of different shape and a head, the same numbers for the same seed."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        first, second, head = torch.nn.Linear(8, 12), torch.nn.Linear(12, 6), torch.nn.Linear(6, 3)
    body = torch.nn.ModuleDict({"first": first, "second": second})
    model = _Small(body, head)
    return model if dtype == torch.float32 else model.to(dtype)


def sample_input(rows: int = 5, seed: int = 1, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Rows for `small_model`."""
    return torch.randn(rows, 8, generator=torch.Generator().manual_seed(seed)).to(dtype)


def tied_llama() -> Any:
    """A Llama of two layers in float64 whose head shares the embedding and whose layers share a query; skips without it."""
    import pytest

    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        vocab_size=16, hidden_size=8, intermediate_size=12, num_hidden_layers=2, num_attention_heads=2, tie_word_embeddings=True
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = transformers.LlamaForCausalLM(config).double()
    layers = model.model.layers
    layers[1].self_attn.q_proj.weight = layers[0].self_attn.q_proj.weight
    return model.eval()


def output_of_saved(folder: str, module: str, seed: int = 0) -> str:
    """The output of `small_model(seed)` with the adapter in `folder`, as the path of a safetensors file.

    Args:
        module: imported first, so that the method is registered.
    """
    from safetensors.torch import save_file

    importlib.import_module(module)
    model = small_model(seed)
    lowdim.load_adapter(model, folder)
    with torch.no_grad():
        save_file({"y": model(sample_input())}, f"{folder}/output.safetensors")
    return f"{folder}/output.safetensors"


class _Small(torch.nn.Module):
    def __init__(self, body: torch.nn.ModuleDict, score: torch.nn.Module):
        super().__init__()
        self.body, self.score = body, score

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.score(torch.tanh(self.body["second"](torch.tanh(self.body["first"](x)))))
