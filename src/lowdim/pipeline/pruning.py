"""Magnitude pruning to a size: by one threshold for all layers, at one share of each, or at shares from FARMS."""

from __future__ import annotations

import math
from typing import Any

import torch

from lowdim.comparison.judge import Judgement
from lowdim.errors import LowdimError
from lowdim.jobs.ratios import ratios_by_layer
from lowdim.modules import base_layers, magnitude_prune, pruned_bytes
from lowdim.records import difference_text
from lowdim.surgery import matrix_shape
from lowdim.units import format_bytes

__all__ = ["SHARES", "helped", "pruned"]

#: Pruning at one share of every layer, and at shares from FARMS; `magnitude` has one threshold for all. Only where named.
SHARES = {"magnitude+uniform": "uniform", "magnitude+farms": "farms"}


def helped(found: Judgement, judged: str) -> str:
    """Whether shares from FARMS were better than one share for every layer, where both are judged; starts with a space."""
    farms, uniform = "magnitude+farms", "magnitude+uniform"
    if farms not in found.names or uniform not in found.names:
        return ""
    if found.is_better(farms, uniform):
        verdict = "are shown to be better than one ratio"
    elif found.is_better(uniform, farms):
        verdict = "are shown to be worse than one ratio"
    else:
        verdict = "are not distinguishable from one ratio"
    gap = difference_text(judged, *found.difference(farms, uniform))
    return f" Pruning ratios from FARMS {verdict} ({gap}, above 0 is better)."


def pruned(model: Any, whole: int, allowed: int, ratios: str | None = None) -> tuple[Any, int, list[str]]:
    """The share of weights is left out with which those that are kept, and a bit for each place, fit.

    Args:
        ratios: None: one threshold for all layers; `"uniform"`: that share of each; `"farms"`: shares from tail exponents.
    """
    layers = base_layers(model)
    sizes = {name: math.prod(matrix_shape(layer)) for name, layer in layers.items()}
    weights = sum(sizes.values())
    itemsize = next(iter(layers.values())).weight.element_size()  # type: ignore[operator, union-attr]
    outside = whole - weights * itemsize
    kept = (allowed - outside - pruned_bytes(weights, 0, itemsize)) // itemsize
    if kept < 1:
        least = outside + pruned_bytes(weights, 1, itemsize)
        raise LowdimError(f"pruning reaches {format_bytes(least)} at the smallest")
    kept = min(kept, weights)
    chosen: int | dict[str, int] = kept
    notes: list[str] = []
    if ratios is not None and kept < weights:
        shares = dict.fromkeys(layers, 1 - kept / weights)
        if ratios == "farms":
            shares, notes = ratios_by_layer(model, layers, 1 - kept / weights)
            low, high = min(shares, key=shares.__getitem__), max(shares, key=shares.__getitem__)
            notes = [f"left out of each layer: {shares[low]:.0%} ({low}) to {shares[high]:.0%} ({high})", *notes]
        chosen = {name: max(1, int(sizes[name] * (1 - share))) for name, share in shares.items()}
        if sum(chosen.values()) > kept:
            raise LowdimError(f"ratios by layer keep {sum(chosen.values())} weights, and {kept} fit")
    magnitude_prune(model, layers, chosen)
    left = sum(int(layer.mask().count_nonzero()) for layer in model.modules() if hasattr(layer, "bits"))
    with torch.no_grad():
        return model, outside + pruned_bytes(weights, left, itemsize), notes
