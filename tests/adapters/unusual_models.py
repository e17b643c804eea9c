"""Small models for the tests of unusual ones, adapters moved away from their start, and the warnings of a call."""

import warnings

import torch
from torch import nn

SIZES = {
    "vocab_size": 32,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "max_position_embeddings": 16,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
IDS = torch.randint(3, 30, (2, 6), generator=torch.Generator().manual_seed(1))


def disturb(adapted, size=0.1):
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for layer in adapted.layers.values():
            for p in layer.update.parameters():
                if p.requires_grad:
                    p.add_((size * torch.randn(p.shape, generator=generator)).to(p.dtype))


def made(kind, config):
    torch.manual_seed(0)
    return kind(config).eval()


def told(make):
    """The warnings of a call, and its result."""
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        result = make()
    return [str(w.message) for w in seen], result


def net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 3)))
