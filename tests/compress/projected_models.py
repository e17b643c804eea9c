"""Tiny decoders with MatryoshkaKV's projections, and what they say without a cache."""

import torch

import kv_models
from lowdim.compress import MatryoshkaKVConfig, MatryoshkaProjection, matryoshka_kv


def projected(name="llama", dtype=torch.float64, **config):
    model = kv_models.build(name, dtype=dtype)
    return matryoshka_kv(model, MatryoshkaKVConfig(**config), kv_models.batches())


def logits(model, ids=None, **inputs):
    with torch.no_grad():
        return model(kv_models.ids() if ids is None else ids, **{"use_cache": False, **inputs}).logits


def projections(model):
    return [module for module in model.modules() if isinstance(module, MatryoshkaProjection)]
