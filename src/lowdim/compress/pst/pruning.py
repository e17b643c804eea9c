"""A model that is fine-tuned and pruned by PST."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, cast

import torch
from torch import nn

from lowdim.compress.pst.config import PSTConfig
from lowdim.compress.pst.layer import PSTLinear, freeze_others
from lowdim.linalg import derive_seed, has_numbers
from lowdim.surgery import find_layers, is_linear, is_quantized, swap_layers, unchanged_on_error, without_tied

__all__ = ["pst"]


def pst(model: nn.Module, config: PSTConfig, batches: Iterable[Any] | None = None) -> nn.Module:
    """Make a model's layers lose weights on a schedule while few trained numbers tune them, in place.

    Formula: see `PSTLinear` (weight in use, scores, gradient) and `PSTConfig` (schedule). The model computes what it did before
    until the first step; only the six small tensors of each layer are trained, and everything else is frozen unless
    `train_others`. Set `requires_grad` of a new head yourself (`lowdim run` and `compare` do).

    After each optimizer step call `lowdim.compress.step(model)`, at the end `lowdim.compress.finalize(model)`, which puts plain
    layers with exact zeros in place; or pass `lowdim.compress.SparseTraining(model)` to the training as a companion.

    Args:
        config: sparsity, ranks, schedule, which layers.
        batches: not used; other systems need samples here.

    Returns:
        The model. Build the optimizer from what has `requires_grad` afterwards.

    Raises:
        ValueError: nothing matched, a layer is a PST layer already, `total_steps` is None, a weight with NaN or infinity. The
            model is then unchanged.
        TypeError: a named layer that is quantized, or whose weight is computed.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> from lowdim.compress import PSTConfig, finalize, last_report, pst, step
        >>> model = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 4))
        >>> model = pst(model, PSTConfig(total_steps=10, sparsity=0.75, weight_rank=1, mask_rank=1))
        >>> optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
        >>> for _ in range(10):
        ...     optimizer.zero_grad()
        ...     model(torch.randn(16, 8)).square().mean().backward()
        ...     optimizer.step()
        ...     step(model)
        >>> finalize(model)[0]
        Linear(in_features=8, out_features=8, bias=True)
        >>> [(layer.name, layer.before, layer.after) for layer in last_report(model).layers]
        [('0', 0, 48), ('2', 0, 24)]

    When not: for less memory or time in the passes (weights and the gradient of each masked weight are dense), or for a faster
    model without kernels for scattered zeros. Where all weights can be trained, movement pruning prunes better.

    Source: Li et al., "Parameter-Efficient Sparsity for Large Language Models Fine-Tuning", IJCAI 2022, arXiv 2205.11005.
    """
    del batches
    config.steps  # noqa: B018 (raises without them, before anything is searched)
    named = config.target_modules not in (None, "all-linear")
    found = find_layers(model, config.target_modules, exclude=config.exclude, accept=_takes)
    already = next((name for name, layer in found.items() if isinstance(layer, PSTLinear)), None)
    if already is not None:
        raise ValueError(
            f"layer {already} is a PST layer already; call lowdim.compress.finalize(model) first, or leave it out "
            "(exclude, target_modules)"
        )
    layers, _ = without_tied(model, found, named=named)

    def make(name: str, layer: nn.Module) -> nn.Module:
        weight = None if is_quantized(layer) else layer._parameters.get("weight")  # what is neither is refused below
        if weight is not None and has_numbers(weight) and not bool(torch.isfinite(weight).all()):
            raise ValueError("its weight has NaN or infinite entries, which no mask orders")
        return PSTLinear.from_linear(layer, config, seed=derive_seed(config.seed, "pst", name))

    with unchanged_on_error(model), torch.no_grad():
        swap_layers(model, cast(Any, layers), make)
    if not config.train_others:
        freeze_others(model)
    return model


def _takes(layer: nn.Module) -> bool:
    return is_linear(layer) or isinstance(layer, PSTLinear)
