"""A model whose layers train towards N of every M weights."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, cast

import torch
from torch import nn

from lowdim.compress.nm_decay.layers import NMConv2d, NMLinear
from lowdim.compress.nm_decay.schedule import NMDecayConfig
from lowdim.linalg import has_numbers
from lowdim.surgery import find_layers, is_linear, is_matrix_layer, is_quantized, swap_layers, without_tied

__all__ = ["nm_decay"]


def nm_decay(model: nn.Module, config: NMDecayConfig, batches: Iterable[Any] | None = None) -> nn.Module:
    """Make a model's layers follow a schedule from dense weights to n of every m, in place; it then trains as before.

    Formula: see `NMDecayConfig` (the schedule) and `NMLinear` (the weight in use and its gradient). A mask keeps the n largest
    magnitudes in every m consecutive weights, taken anew at every forward.

    After each optimizer step call `lowdim.compress.step(model)`, at the end `lowdim.compress.finalize(model)`, which puts plain
    layers with exact zeros in place; or pass `lowdim.compress.SparseTraining(model)` to the training as a companion.

    Args:
        config: pattern, schedule, which layers. Convolutions are taken only if `target_modules` names them.
        batches: not used; other systems need samples here.

    Returns:
        The model. Its parameters are the same objects, so an optimizer built before goes on.

    Raises:
        ValueError: nothing matched, `total_steps` is None, a layer whose grouped dimension m does not divide, a weight with NaN
            or infinity. The model is then unchanged.
        TypeError: a named layer that is a grouped convolution or quantized.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> from lowdim.compress import NMDecayConfig, finalize, nm_decay, step
        >>> model = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 4))
        >>> model = nm_decay(model, NMDecayConfig(2, 4, total_steps=10))
        >>> optimizer = torch.optim.AdamW(model.parameters())
        >>> for _ in range(10):
        ...     optimizer.zero_grad()
        ...     model(torch.randn(16, 8)).square().mean().backward()
        ...     optimizer.step()
        ...     step(model)
        >>> weight = finalize(model)[0].weight
        >>> type(model[0]).__name__, bool(((weight.view(-1, 4) != 0).sum(1) == 2).all())
        ('Linear', True)

    When not: for less memory or time in training (weights, gradients and optimizer state stay dense), or for a faster model
    without kernels for the pattern: measure 2:4 before counting on it.

    Source: Bambhaniya et al., "Progressive Gradient Flow for Robust N:M Sparsity Training in Transformers", arXiv 2402.04744.
    """
    del batches
    config.frames()  # raises without total_steps, before anything is searched
    named = config.target_modules not in (None, "all-linear")
    found = find_layers(model, config.target_modules, exclude=config.exclude, accept=_takes if named else is_linear)
    layers, _ = without_tied(model, found, named=named)

    def make(_: str, layer: nn.Module) -> nn.Module:
        weight = None if is_quantized(layer) else layer._parameters.get("weight")  # what is neither is refused below
        if weight is not None and has_numbers(weight) and not bool(torch.isfinite(weight).all()):
            raise ValueError("its weight has NaN or infinite entries, which no mask orders")
        if isinstance(layer, nn.Conv2d):
            return NMConv2d.from_conv(layer, config)
        return NMLinear.from_linear(layer, config)

    with torch.no_grad():
        swap_layers(model, cast(Any, layers), make)
    return model


def _takes(layer: nn.Module) -> bool:
    return is_linear(layer) or (isinstance(layer, nn.Conv2d) and is_matrix_layer(layer))
