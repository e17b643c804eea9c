"""A whole model of Maestro layers: creating it, reducing it, and recalibrating its BatchNorms."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import nn

from lowdim.layers.maestro.components import OrderedComponents
from lowdim.layers.maestro.layers import MaestroConv2d, MaestroLinear
from lowdim.linalg import is_sharded
from lowdim.modules import InterpolativeLinear, LowRankLinear
from lowdim.surgery import Patterns, as_linear, find_layers, float_dtype, is_linear, is_matrix_layer, swap_layers, without_tied

__all__ = ["maestro_compact", "maestro_decompose", "maestro_layers", "maestro_merge", "maestro_recalibrate"]


def maestro_decompose(model: nn.Module, *, target_modules: Patterns = None) -> nn.Module:
    """Replace linear layers and convolutions by Maestro layers of the same function, in place.

    Args:
        target_modules: see `lowdim.surgery.find_layers`; None selects every nn.Linear, Conv1D and nn.Conv2d but the
            prediction head and grouped convolutions. A layer whose weight is tied to another module is left unchanged.

    Returns:
        The model. Build the optimizer afterwards.

    Raises:
        ValueError: a pattern matches nothing; a layer that was asked for cannot be decomposed (groups != 1, NaN); named.

    Example:
        >>> from torch import nn
        >>> from lowdim.layers import maestro_decompose
        >>> [type(m).__name__ for m in maestro_decompose(nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(16, 2)))]
        ['MaestroConv2d', 'Flatten', 'MaestroLinear']

    Not for a model that only needs to be compressed once: truncating its SVD does that without training.

    Source: Horváth et al., "Maestro", ICML 2024, arXiv 2308.14929.
    """
    named = target_modules not in (None, "all-linear")

    def accept(layer: nn.Module) -> bool:
        if isinstance(layer, nn.Conv2d):
            return is_matrix_layer(layer) and (named or layer.groups == 1)
        return is_linear(layer)

    def make(_: str, layer: nn.Module) -> nn.Module:
        if isinstance(layer, nn.Conv2d):
            return MaestroConv2d.from_conv(layer)
        return MaestroLinear.from_linear(as_linear(layer, dtype=dtype)).take_place_of(layer)

    layers, _ = without_tied(model, find_layers(model, target_modules, accept=accept), named=named)
    dtype = float_dtype(model)
    swap_layers(model, layers, make)
    return model


def maestro_merge(model: nn.Module) -> nn.Module:
    """Reduce a trained model, in place: remove unused components, and use plain layers where they are smaller.

    Formula: a layer with `rank · (in + out) > in · out` becomes dense (`in` counts a kernel's entries); the others keep their
    first `rank` components only.

    Returns:
        The model, or the new layer if the model itself is one. Build a new optimizer afterwards.

    Raises:
        ValueError: the parameters are sharded (gather them first).

    Example:
        >>> from torch import nn
        >>> from lowdim.layers import MaestroLinear, maestro_merge
        >>> type(maestro_merge(nn.Sequential(MaestroLinear(8, 8)))[0]).__name__  # rank 8: twice as many numbers as dense
        'Linear'

    Not before training has ended: afterwards the ranks are fixed. `lowdim.layers.densify` makes all layers dense.

    Source: Horváth et al., "Maestro", ICML 2024, arXiv 2308.14929.
    """
    found = maestro_layers(model)
    _check_whole(found)
    dense: dict[str, nn.Module] = {}
    for name, layer in found.items():
        out_features, in_features = layer.dense_shape
        if layer.rank * (in_features + out_features) > in_features * out_features:
            dense[name] = layer
        else:
            layer.prune()
    if "" in dense:
        return _plain("", model)
    swap_layers(model, dense, _plain)
    return model


def maestro_compact(model: nn.Module) -> dict[str, nn.Module]:
    """Put plain small layers in the place of trained Maestro ones, in place, each in its smallest exact form.

    Formula: at rank r a layer becomes `LowRankLinear` (r (out + in) numbers), `InterpolativeLinear` (r (out + in − r) and r
    indices) or dense (out · in), whichever holds the fewest. Convolutions become dense.

    Returns:
        Name -> new layer, of those that are smaller than dense ones. Build a new optimizer afterwards.

    Raises:
        ValueError: the parameters are sharded (gather them first).

    Example:
        >>> from torch import nn
        >>> from lowdim.layers import MaestroLinear
        >>> from lowdim.layers.maestro.model import maestro_compact
        >>> model = nn.Sequential(MaestroLinear(8, 8), MaestroLinear(8, 8), MaestroLinear(8, 8))
        >>> model[1].rank, model[2].rank = 4, 1
        >>> _ = maestro_compact(model)
        >>> [type(layer).__name__ for layer in model]
        ['Linear', 'InterpolativeLinear', 'LowRankLinear']

    Source: Horváth et al., "Maestro", ICML 2024, arXiv 2308.14929.
    """
    found = maestro_layers(model)
    _check_whole(found)
    swap_layers(model, found, _smallest)
    small = (LowRankLinear, InterpolativeLinear)
    return {name: new for name in found if isinstance(new := model.get_submodule(name), small)}


@torch.no_grad()
def _smallest(name: str, layer: Any) -> nn.Module:
    """The layer in its smallest exact form; a rank of 0 is kept as a rank of 1 with zeros."""
    (out_features, in_features), rank = layer.dense_shape, layer.rank
    dense, factored = out_features * in_features, rank * (out_features + in_features)
    interpolated = factored - rank * rank + rank
    if not isinstance(layer, MaestroLinear) or min(factored, interpolated) >= dense:
        return _plain(name, layer)
    U, V = layer.prefix(rank)
    if rank == 0:
        U, V = layer.U.new_zeros(out_features, 1), layer.V.new_zeros(1, in_features)
    thin = factored <= interpolated
    new = LowRankLinear.from_factors(V, U, layer.bias) if thin else InterpolativeLinear.from_product(U, V, layer.bias)
    new.transposed = layer.transposed
    return new.train(layer.training)


def _check_whole(layers: Mapping[str, OrderedComponents]) -> None:
    sharded = [name for name, layer in layers.items() if is_sharded(layer.U)]
    if sharded:
        raise ValueError(f"model must hold whole parameters; got sharded ones (DTensor) in {sharded[0]}. Gather it first")


def _plain(_: str, layer: Any) -> nn.Module:
    return layer.to_conv() if isinstance(layer, MaestroConv2d) else layer.to_plain()


def maestro_layers(model: nn.Module) -> dict[str, OrderedComponents]:
    """Name -> layer, in model order."""
    return {name: layer for name, layer in model.named_modules() if isinstance(layer, OrderedComponents)}


def maestro_recalibrate(
    model: nn.Module, batches: Iterable[Any], forward: Callable[[nn.Module, Any], Any] | None = None
) -> nn.Module:
    """Recompute the statistics of every BatchNorm at the current ranks: sampled passes have changed them.

    The running statistics are reset and become the plain average over the batches; everything but the BatchNorms is in
    evaluation mode meanwhile, without gradients. A model without BatchNorm is unchanged.

    Args:
        batches: training data, one pass.
        forward: calls the model on a batch; by default `model(batch)`.

    Returns:
        The model, in its original mode.

    Raises:
        ValueError: no batch was given.

    Example:
        >>> import torch
        >>> from lowdim.layers import maestro_recalibrate
        >>> model = torch.nn.Sequential(torch.nn.BatchNorm1d(2, affine=False)).eval()
        >>> maestro_recalibrate(model, [torch.tensor([[1.0, 2.0], [3.0, 6.0]])])[0].running_mean
        tensor([2., 4.])

    Not needed without BatchNorm, nor after every step: once, before the model is evaluated or its ranks change.

    Source: Horváth et al., "Maestro", ICML 2024, arXiv 2308.14929.
    """
    norms = [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm) and m.track_running_stats]
    modes, momenta = {m: m.training for m in model.modules()}, [m.momentum for m in norms]
    if not norms:
        return model
    seen = 0
    try:
        model.eval()
        for norm in norms:
            norm.reset_running_stats()
            norm.momentum = None  # the average of all batches
            norm.train()
        with torch.no_grad():
            for batch in batches:
                model(batch) if forward is None else forward(model, batch)
                seen += 1
    finally:
        for norm, momentum in zip(norms, momenta, strict=True):
            norm.momentum = momentum
        for module, mode in modes.items():
            module.training = mode
    if not seen:
        raise ValueError("batches must hold at least one batch; got none, and the statistics are now empty")
    return model
