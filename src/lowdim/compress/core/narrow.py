"""Key and value projections of grouped-query attention, which suffer most from a low rank."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

__all__ = ["below_head_dim"]

_PROJECTIONS = frozenset({"k_proj", "v_proj", "key", "value"})


def below_head_dim(model: nn.Module, ranks: Mapping[str, int]) -> dict[str, int]:
    """The layers among `ranks` that are key or value projections of grouped-query attention, with a rank below the head's size.

    Several query heads share each of these projections, and a rank below the size of a head limits all of them.

    Example:
        >>> from types import SimpleNamespace
        >>> from torch import nn
        >>> from lowdim.compress.core.narrow import below_head_dim
        >>> model = nn.Module()
        >>> model.config = SimpleNamespace(num_attention_heads=8, num_key_value_heads=2, hidden_size=64)
        >>> below_head_dim(model, {"layers.0.k_proj": 6, "layers.0.v_proj": 9, "layers.0.q_proj": 6})
        {'layers.0.k_proj': 6}
    """
    config: Any = getattr(model, "config", None)
    text = getattr(config, "get_text_config", None)
    config = text() if callable(text) else config
    heads, shared = getattr(config, "num_attention_heads", None), getattr(config, "num_key_value_heads", None)
    if not isinstance(heads, int) or not isinstance(shared, int) or shared >= heads:
        return {}
    size = getattr(config, "head_dim", None) or getattr(config, "hidden_size", 0) // heads
    return {name: rank for name, rank in ranks.items() if name.rpartition(".")[2] in _PROJECTIONS and rank < size}
