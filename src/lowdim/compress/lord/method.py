"""The compression of a whole model by LoRD."""

from __future__ import annotations

import dataclasses
import logging
import warnings
from collections.abc import Iterable, Mapping
from typing import Any

from torch import nn

from lowdim.calibrate.batches import given_batches
from lowdim.compress.core.report import CompressedLayer, CompressionReport, attach_report
from lowdim.compress.lord.config import LoRDConfig
from lowdim.compress.lord.factors import decompose
from lowdim.compress.lord.selection import rank_of, rank_table, select, unprofitable
from lowdim.compress.lord.statistics import output_statistics
from lowdim.errors import check_int
from lowdim.surgery import float_dtype, matrix_shape, swap_layers

__all__ = ["lord"]

_log = logging.getLogger(__name__)


def lord(
    model: nn.Module,
    config: LoRDConfig,
    batches: Iterable[Any] | None,
    *,
    max_bytes: int | None = None,
) -> nn.Module:
    """Replace linear layers by low-rank ones that keep the principal components of their outputs, in place.

    Formula: for outputs `y` with mean `μ` and covariance `C = V Λ Vᵀ`: `B = V_r`, `A = V_rᵀ W`,
    `bias' = μ − V_r V_rᵀ (μ − bias)`. That is the best rank-r affine approximation of the outputs on the samples; its squared
    error is the sum of the eigenvalues left out.

    Args:
        config: which layers and ranks.
        batches: samples, each consumed once: tensors (`model(x)`), tuples (`model(*b)`) or mappings (`model(**b)`).
            Positions that `attention_mask` masks are left out. A few hundred sequences of the model's own domain.
        max_bytes: bound on the calibration sums, 8 · out² bytes a layer. If they need more, the blocks of the model are
            decomposed one after another, each freed before the next, and only the samples' hidden states are kept besides:
            two passes. Where a model's blocks cannot be run by themselves, or the states take more than half of the model, the
            layers are decomposed in several passes. `batches` must then be iterable again (a list or DataLoader, not a
            generator). None: half of the model's size, at least 64 MiB, if `batches` is; without bound for a generator.

    Returns:
        The model, all parameters of the new layers trainable. `lowdim.compress.last_report(model)` lists which layers
        were replaced, which were left dense and why, and the relative error of each: `√(Σ_{i>r} λ_i / Σ λ_i)`.

    Raises:
        ValueError: no batches, nothing matched, a layer that saw no token or not a finite output, a rank outside
            [1, min(in, out)]. The model is then unchanged. (What stops it otherwise may leave some blocks decomposed.)

    Example:
        >>> import torch
        >>> from torch import nn
        >>> from lowdim.compress import LoRDConfig, last_report, lord
        >>> torch.manual_seed(0) and None
        >>> model = nn.Sequential(nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, 8))
        >>> model = lord(model, LoRDConfig(rank_ratio=0.5), [torch.randn(400, 8)])
        >>> [layer.rank for layer in last_report(model).layers]
        [4, 4]

    All statistics come from the original model: later layers do not compensate errors of early ones; fine-tune afterwards if
    they add up. It saves nothing on square layers above half the rank. Without sample data use PELA's
    weight SVD. A fused q/k/v projection has one spectrum, which q dominates: split it first where that is possible.

    Source: Kaushal, Vaidhya, Rish, "LORD", arXiv 2309.14021; the construction is atomic feature mimicking.
    """
    if max_bytes is not None:
        check_int("max_bytes", max_bytes, 1)
    batches = given_batches(batches, "LoRD needs sample data (PELA's weight SVD does not)")
    table = rank_table(model, config.rank) if isinstance(config.rank, Mapping) else None
    layers, tied = select(model, config, table)
    ranks = {name: rank_of(name, layer, config, table) for name, layer in layers.items()}
    wanted = {name: config.rank if table is None else table[layer] for name, layer in layers.items()}
    rows = _dense_rows(model, layers, tied)
    todo = {
        name: layer for name, layer in layers.items() if not (config.skip_unprofitable and unprofitable(layer, ranks[name]))
    }
    capped = {
        name: ranks[name] for name, rank in wanted.items() if isinstance(rank, int) and rank > min(matrix_shape(layers[name]))
    }
    if not todo:
        warnings.warn(
            f"LoRD left all {len(layers)} layers of {type(model).__name__} dense: at these ranks none would shrink; "
            "lower the rank, or set skip_unprofitable=False",
            UserWarning,
            stacklevel=2,
        )
    del layers, table  # a layer is freed once it is replaced
    tokens = _replace(model, todo, ranks, rows, batches, centered=config.centered, max_bytes=max_bytes)
    few = {name: rows[name].out_features for name, seen in tokens.items() if seen < 10 * rows[name].out_features}
    if few:
        name = max(few, key=lambda n: few[n] / tokens[n])
        warnings.warn(
            f"few calibration tokens: layer {name} with {few[name]} outputs saw {tokens[name]}; "
            f"at least 10 for each output are advised ({len(few)} of {len(tokens)} layers have fewer)",
            UserWarning,
            stacklevel=2,
        )
    report = CompressionReport("LoRD", tuple(rows.values()), {"tokens": min(tokens.values(), default=0)})
    if capped:
        report.details["capped_ranks"] = capped
    attach_report(model, report)
    _log.info("%s", report.summary)
    return model


def _dense_rows(model: nn.Module, layers: Mapping[str, nn.Module], tied: Mapping[str, list[str]]) -> dict[str, CompressedLayer]:
    """The report's row of each layer if it is left dense, in model order."""
    rows = {}
    for name, layer in model.named_modules():
        if name in layers or name in tied:
            size = sum(p.numel() for p in layer.parameters())
            note = f"left dense: tied to {', '.join(tied[name])}" if name in tied else "left dense: it would not shrink"
            rows[name] = CompressedLayer(name, *matrix_shape(layer), None, 0.0, size, size, note)
    return rows


def _replace(
    model: nn.Module,
    todo: dict[str, nn.Module],
    ranks: Mapping[str, int],
    rows: dict[str, CompressedLayer],
    batches: Iterable[Any],
    *,
    centered: bool,
    max_bytes: int | None,
) -> dict[str, int]:
    """Replace the layers, which leave `todo`, and write their rows; returns how many tokens each saw."""
    dtype, new, tokens = float_dtype(model), dict[str, nn.Module](), dict[str, int]()
    for group, free in output_statistics(model, todo, batches, max_bytes):
        for name in list(group):
            found = group.pop(name)  # each covariance is freed once its layer is done
            rank, tokens[name] = ranks[name], found["output_count"]
            new[name], error = decompose(todo[name], found, rank, dtype, centered=centered)
            rows[name] = dataclasses.replace(
                rows[name],
                rank=rank,
                relative_error=error,
                after=sum(p.numel() for p in new[name].parameters()),
                note="",
                what=f"rank {rank}",
                replaced=True,
            )
        swap_layers(model, {name: todo.pop(name) for name in free}, lambda name, _: new.pop(name))
    return tokens
