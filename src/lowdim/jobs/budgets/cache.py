"""MatryoshkaKV's ranks, for the bytes that are cached for a token."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn

from lowdim.jobs.budgets.budget import Budget, Fitted, check_reachable
from lowdim.jobs.systems import Compressor

__all__ = ["COUNTED", "fit_cache"]

COUNTED = "cached for a token"


def fit_cache(method: Compressor, given: Mapping[str, Any], model: nn.Module, batches: Sequence[Any], budget: Budget) -> Fitted:
    """MatryoshkaKV: its own search, which runs when the model is compressed; here the budget becomes a share of the cache."""
    from lowdim.compress.matryoshka_kv.interface import kv_layers

    method.build(given)
    layers = kv_layers(model)
    config = getattr(model, "config").get_text_config(decoder=True)  # noqa: B009 (nn.Module has no such attribute)
    heads = config.num_key_value_heads or config.num_attention_heads
    size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    dense = 2 * len(layers) * heads * size * next(model.parameters()).element_size()
    interval = max(1, size // 4)  # of greedy_kv_ranks, below which no rank falls
    least = dense * interval // size
    allowed = check_reachable("matryoshka-kv", budget, COUNTED, dense, least)
    return Fitted(method.build({**given, "budget": allowed / dense}), COUNTED, dense, allowed, least)
