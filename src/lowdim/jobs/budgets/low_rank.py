"""Ranks of low-rank layers for a size on disk."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lowdim.jobs.budgets.budget import Budget, Fitted, check_reachable
from lowdim.jobs.systems import Compressor
from lowdim.ranks import Choices, by_error_per_byte, welore_at
from lowdim.surgery import find_layers, float_dtype, is_linear, known_dtype, matrix_shape, without_tied

__all__ = ["COUNTED", "fit_lord", "fit_pela", "fit_welore"]

COUNTED = "on disk"
#: Covariances that are held at once while ranks are searched.
_COVARIANCES = 2**30
_GRID = torch.arange(1, 201, dtype=torch.float64).mul(0.005).round(decimals=12)  # the thresholds that WeLore tries


def fit_lord(method: Compressor, given: Mapping[str, Any], model: nn.Module, batches: Sequence[Any], budget: Budget) -> Fitted:
    """LoRD: the share of each layer's outputs that is lost, for each byte saved."""
    from lowdim.compress import lord_spectra

    config = method.build(given)
    layers = _layers(model, config, exclude=config.exclude)
    spectra = lord_spectra(model, batches, target_modules=list(layers))
    biased = {name: config.centered or layer.bias is not None for name, layer in layers.items()}
    found, fitted = _by_spectra("lord", model, layers, spectra, biased, budget, config.rank_multiple)
    rest = {key: value for key, value in given.items() if key != "target_modules"}  # the table says which
    return fitted(method.build({**rest, "rank": found}))


def fit_pela(method: Compressor, given: Mapping[str, Any], model: nn.Module, batches: Sequence[Any], budget: Budget) -> Fitted:
    """PELA: the share of each weight that is lost, for each byte saved."""
    from lowdim.compress.core.spectra import weight_spectra

    config = method.build(given)
    layers = _layers(model, config, exclude=config.exclude)
    layers = {name: layer for name, layer in layers.items() if matrix_shape(layer)[0] >= config.min_out_features} or layers
    biased = {name: layer.bias is not None for name, layer in layers.items()}
    found, fitted = _by_spectra("pela", model, layers, weight_spectra(layers), biased, budget)
    return fitted(method.build({**given, "rank": found}))


def fit_welore(
    method: Compressor, given: Mapping[str, Any], model: nn.Module, batches: Sequence[Any], budget: Budget
) -> Fitted:
    """WeLore: its own rule, which is one threshold for all layers: the smallest that meets the budget."""
    from lowdim.compress.core.spectra import weight_spectra

    config = method.build(given)
    layers = _layers(model, config)
    spectra = weight_spectra(layers)
    dense = {name: _bytes(layer) for name, layer in layers.items()}
    whole = _stored(model)

    def size(threshold: float) -> int:
        total = whole
        for name, rank in welore_at(spectra, threshold).items():
            full, layer = len(spectra[name]), layers[name]
            if full > 1 and (full - rank) / full > config.min_reduction:
                total += rank * _price(model, layer) + (layer.bias is not None) * _bias(model, layer) - dense[name]
        return total

    sizes = [size(threshold) for threshold in _GRID.tolist()]
    allowed = check_reachable("welore", budget, COUNTED, whole, min(sizes), _outside(whole, dense))
    threshold = next(t for t, found in zip(_GRID.tolist(), sizes) if found <= allowed)
    return Fitted(method.build({**given, "threshold": threshold}), COUNTED, whole, allowed, min(sizes))


def _by_spectra(
    method: str,
    model: nn.Module,
    layers: Mapping[str, nn.Module],
    spectra: Mapping[str, Tensor],
    biased: Mapping[str, bool],
    budget: Budget,
    multiple: int = 1,
) -> tuple[dict[str, int], Any]:
    """The rank of each layer that is factored, and what makes the result from a config."""
    dense = {name: _bytes(layer) for name, layer in layers.items()}
    tables, ranks = {}, {}
    for name, layer in layers.items():
        ranks[name], tables[name] = _choices(model, layer, spectra[name], dense[name], biased[name], multiple)
    whole = _stored(model)
    outside = whole - sum(dense.values())
    least = outside + sum(int(table.sizes[-1]) for table in tables.values())
    allowed = check_reachable(method, budget, COUNTED, whole, least, _outside(whole, dense))
    chosen = by_error_per_byte(tables, allowed - outside)
    found = {name: ranks[name][choice - 1] for name, choice in chosen.items() if choice}
    return found, lambda config: Fitted(config, COUNTED, whole, allowed, least)


def _choices(
    model: nn.Module, layer: nn.Module, spectrum: Tensor, dense: int, biased: bool, multiple: int
) -> tuple[list[int], Choices]:
    """The ranks at which factors are smaller than the layer, falling; and their sizes and lost energies, after the layer's."""
    price, bias = _price(model, layer), biased * _bias(model, layer)
    most = min(*matrix_shape(layer), (dense - bias - 1) // price)
    ranks = torch.arange(most, 0, -1)
    ranks = ranks[ranks % multiple == 0]
    energy = spectrum.to("cpu", torch.float64).square()
    lost = (energy.sum() - energy.cumsum(0)).clamp_min(0) / energy.sum().clamp_min(1e-300)
    sizes = torch.cat([torch.tensor([dense]), ranks * price + bias])
    return ranks.tolist(), Choices(sizes, torch.cat([torch.zeros(1, dtype=torch.float64), lost[ranks - 1]]))


def _layers(model: nn.Module, config: Any, exclude: tuple[str, ...] = ()) -> dict[str, nn.Module]:
    automatic = config.target_modules in (None, "all-linear")
    found = find_layers(model, config.target_modules, exclude=exclude if automatic else (), accept=is_linear)
    return without_tied(model, found, named=not automatic, within=True)[0]


def _stored(model: nn.Module) -> int:
    from lowdim.pretrained import stored_bytes

    return stored_bytes(model)


def _bytes(layer: nn.Module) -> int:
    return sum(p.numel() * p.element_size() for p in layer.parameters())


def _itemsize(model: nn.Module, layer: nn.Module) -> int:
    return (known_dtype(layer) or float_dtype(model)).itemsize


def _price(model: nn.Module, layer: nn.Module) -> int:
    """Bytes of one rank."""
    return sum(matrix_shape(layer)) * _itemsize(model, layer)


def _bias(model: nn.Module, layer: nn.Module) -> int:
    return matrix_shape(layer)[0] * _itemsize(model, layer)


def _outside(whole: int, dense: Mapping[str, int]) -> str:
    """What part of the model the system leaves alone."""
    from lowdim.units import format_bytes

    return f"{format_bytes(whole - sum(dense.values()))} of it are in layers that it leaves alone"
