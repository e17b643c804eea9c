"""`--ratios farms`: the share of each layer that is left out follows its tail exponent (AlphaPruning with FARMS)."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

from torch import nn

from lowdim.diagnose import pruning_ratios
from lowdim.errors import check_choice
from lowdim.jobs.budgets import sparse_layers
from lowdim.jobs.systems import Compressor
from lowdim.methods import RANKS
from lowdim.methods.exponents import layer_exponents
from lowdim.surgery import blocks_of, matrix_shape

__all__ = ["check_ratios", "ratios_by_layer", "with_ratios"]

#: Systems with a share for each layer, and the option that holds it.
_BY_LAYER = {"wina": "sparsity"}


def check_ratios(ratios: str, method: Compressor, config: Any, *, budget: str | None = None) -> None:
    """Raise unless the method can have the ratios.

    Raises:
        UnknownNameError: an unknown word.
        ValueError: the method has no ratio by layer, or is given ratios or a budget that finds them.
    """
    check_choice("--ratios", ratios, RANKS)
    if ratios == "uniform":
        return
    slug = method.entry.slug
    if slug not in _BY_LAYER:
        raise ValueError(f"--ratios {ratios}: {slug} has no ratio by layer; {', '.join(_BY_LAYER)} has")
    if budget is not None:
        raise ValueError(f"--budget finds the {_BY_LAYER[slug]} of each layer itself; give --ratios {ratios} or a budget")
    if isinstance(given := getattr(config, _BY_LAYER[slug]), Mapping):
        raise ValueError(f"--ratios {ratios} spreads one {_BY_LAYER[slug]} over the layers; got one for each: {dict(given)}")


def with_ratios(method: Compressor, config: Any, model: nn.Module) -> tuple[Any, list[str]]:
    """The config with a ratio for each layer, at the same share of all together; and what to look at.

    Raises:
        ValueError: fewer than two layers can be measured; the others are named.
    """
    option = _BY_LAYER[method.entry.slug]
    ratios, notes = ratios_by_layer(model, sparse_layers(model, config), getattr(config, option))
    return dataclasses.replace(config, **{option: ratios}), notes


def ratios_by_layer(model: nn.Module, layers: Mapping[str, nn.Module], sparsity: float) -> tuple[dict[str, float], list[str]]:
    """The share of each layer to leave out: `lowdim.diagnose.pruning_ratios` over exponents fitted as the authors do (`peak`).

    Layers of one transformer block share a value where all blocks have as many. Those that cannot be measured have `sparsity`.

    Args:
        layers: name -> layer.
        sparsity: of all together, in (0, 1).

    Returns:
        The shares, and notes.

    Raises:
        ValueError: fewer than two layers can be measured; the others are named.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> from lowdim.jobs.ratios import ratios_by_layer
        >>> _ = torch.manual_seed(0)
        >>> model = nn.Sequential(nn.Linear(32, 32), nn.Linear(32, 32))
        >>> shares, _ = ratios_by_layer(model, dict(model.named_children()), 0.5)
        >>> sorted(round(share, 1) for share in shares.values())
        [0.4, 0.6]
    """
    exponents = layer_exponents(model, method="peak")
    alphas = {name: exponents.alphas[name] for name in layers if name in exponents.alphas}
    left = {name: exponents.skipped.get(name, "it is no layer that can be measured") for name in layers if name not in alphas}
    exponents._replace(alphas=alphas, skipped=left).refuse_few("ratios")
    sizes = [math.prod(matrix_shape(layers[name])) for name in alphas]
    found = pruning_ratios(list(alphas.values()), sizes, sparsity, block=_block(model, list(alphas)))
    shares = {**dict(zip(alphas, found, strict=True)), **dict.fromkeys(left, sparsity)}
    notes = [f"not measured by FARMS, and so at {sparsity:g}: layer {name}: {why}" for name, why in list(left.items())[:4]]
    return {name: shares[name] for name in layers}, notes


def _block(model: nn.Module, names: list[str]) -> int:
    """Layers in each transformer block, where all have as many and stand together; else 1."""
    blocks = blocks_of(model, names)
    counts = {sum(name.startswith(f"{block}.") for name in names) for block in blocks}
    alike = len(counts) == 1 and len(names) == len(blocks) * max(counts)
    return counts.pop() if alike else 1
