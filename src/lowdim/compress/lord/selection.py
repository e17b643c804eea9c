"""The layers that LoRD decomposes, and the rank of each."""

from __future__ import annotations

from collections.abc import Mapping

from torch import nn

from lowdim.compress.lord.config import LoRDConfig, lord_rank, round_down
from lowdim.errors import nearest
from lowdim.surgery import find_layers, is_linear, matrix_shape, without_tied

__all__ = ["rank_of", "rank_table", "select", "unprofitable"]


def rank_table(model: nn.Module, ranks: Mapping[str, int]) -> dict[nn.Module, int]:
    """The rank of each module that the user named."""
    modules = dict(model.named_modules(remove_duplicate=False))  # a module may have two names
    for name in ranks:
        if name not in modules:
            raise ValueError(f"rank names no module {name!r}; nearest: {', '.join(nearest(name, modules))}")
    return {modules[name]: rank for name, rank in ranks.items()}


def select(
    model: nn.Module, config: LoRDConfig, table: Mapping[nn.Module, int] | None
) -> tuple[dict[str, nn.Module], dict[str, list[str]]]:
    """The layers that may be decomposed, and the tied ones, as `without_tied` gives them."""
    patterns = config.target_modules
    if patterns is None and isinstance(config.rank, Mapping):
        patterns = list(config.rank)
    automatic = patterns in (None, "all-linear")
    found = find_layers(model, patterns, exclude=config.exclude if automatic else (), accept=is_linear)
    if table is not None:
        without = [name for name, layer in found.items() if layer not in table]
        if without and config.target_modules is not None:
            raise ValueError(f"rank has no entry for {', '.join(without)}, which target_modules selects")
        found = {name: layer for name, layer in found.items() if layer in table}  # a name is also a suffix of others
    return without_tied(model, found, named=not automatic, within=True)


def rank_of(name: str, layer: nn.Module, config: LoRDConfig, table: Mapping[nn.Module, int] | None) -> int:
    """The rank that the configuration gives a layer."""
    out_features, in_features = matrix_shape(layer)
    rank = config.rank if table is None else table[layer]
    if rank is None:
        return lord_rank(out_features, in_features, config.rank_ratio, config.param_ratio, config.rank_multiple)
    assert isinstance(rank, int)
    limit = min(out_features, in_features)
    if rank > limit and not config.cap_rank:
        raise ValueError(
            f"layer {name}: rank must be in [1, {limit}]; got {rank}; LoRDConfig(..., cap_rank=True) caps it there"
        )
    return round_down(min(rank, limit), config.rank_multiple)


def unprofitable(layer: nn.Module, rank: int) -> bool:
    """Whether two factors would hold no fewer weights than the layer."""
    out_features, in_features = matrix_shape(layer)
    return rank * (in_features + out_features) >= in_features * out_features
