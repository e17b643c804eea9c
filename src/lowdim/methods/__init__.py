"""Prepare a model for training with a named method: swapped layers, trained parameters, optimizer.

`compare`, `plan` and `run` all use `apply`, so forecasts and training agree.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from torch import nn

from lowdim.catalogue import Variant
from lowdim.companion import Companion
from lowdim.errors import UnknownNameError, check_choice, nearest
from lowdim.methods.adapter import AdapterStrategy
from lowdim.methods.applied import Applied, Losses
from lowdim.methods.compression import CompressionStrategy
from lowdim.methods.full import FullStrategy
from lowdim.methods.layer import LayerStrategy
from lowdim.methods.optimizer import OptimizerStrategy
from lowdim.methods.probe import ProbeStrategy
from lowdim.methods.setup import OPTIMIZERS, RANKS, WARMUP, Setup
from lowdim.methods.strategy import Strategy

__all__ = [
    "OPTIMIZERS",
    "RANKS",
    "STRATEGIES",
    "WARMUP",
    "Applied",
    "Companion",
    "Losses",
    "Setup",
    "Strategy",
    "apply",
    "strategy_for",
    "with_options",
    "with_ranks",
]

#: The class for each `Variant.kind`.
STRATEGIES: dict[str, type[Strategy]] = {
    cls.kind: cls
    for cls in (ProbeStrategy, FullStrategy, AdapterStrategy, OptimizerStrategy, LayerStrategy, CompressionStrategy)
}


def strategy_for(variant: Variant) -> Strategy:
    """The strategy of a method.

    Raises:
        UnknownNameError: its `kind` is not one of `STRATEGIES`.
        TypeError: its `target` is not of that kind.

    Example:
        >>> from lowdim.catalogue import variant
        >>> from lowdim.methods import strategy_for
        >>> type(strategy_for(variant("galore"))).__name__
        'OptimizerStrategy'
    """
    check_choice(f"kind of method {variant.name}", variant.kind, STRATEGIES)
    return STRATEGIES[variant.kind](variant)


def apply(variant: Variant, model: nn.Module, **setup: Any) -> Applied:
    """Prepare `model` for training with `variant`, in place.

    Args:
        setup: the fields of `Setup`; `lr` and `steps` are required.

    Raises:
        ValueError, TypeError: from the method, naming the layer.

    Example:
        >>> import torch
        >>> from lowdim.catalogue import variant
        >>> from lowdim.methods import apply
        >>> applied = apply(variant("lora"), torch.nn.Sequential(torch.nn.Linear(20, 10)), lr=1e-3, steps=100)
        >>> applied.trained()
        240
    """
    return strategy_for(variant).apply(model, Setup(**setup))


def with_options(variant: Variant, options: Mapping[str, Any]) -> Variant:
    """The variant with additional hyperparameters.

    Raises:
        UnknownNameError: the method has no such hyperparameter.
        ValueError, TypeError: a value that is invalid for every model.
    """
    if not options:
        return variant
    known = strategy_for(variant).option_names()
    for name in options:
        if name not in known:
            close = f"; nearest: {', '.join(nearest(str(name), known))}" if known else " (it has none)"
            raise UnknownNameError(f"method {variant.name} has no option {name!r}{close}")
    changed = dataclasses.replace(variant, options={**variant.options, **options})
    strategy_for(changed).check()
    return changed


def with_ranks(variant: Variant, ranks: str) -> Variant:
    """The variant with one rank for all layers (`"uniform"`), or with ranks by layer (`"farms"`).

    Raises:
        UnknownNameError: another word.
        ValueError: the method has no rank by layer.

    Example:
        >>> from lowdim.catalogue import variant
        >>> from lowdim.methods import with_ranks
        >>> with_ranks(variant("lora"), "farms").name
        'lora+farms'
    """
    check_choice("--ranks", ranks, RANKS)
    changed = variant.by_farms() if ranks == "farms" else variant
    strategy_for(changed).check_ranks()
    return changed
