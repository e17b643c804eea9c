"""WINA for a whole model: its settings, thresholds from sample inputs, and what is saved."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from lowdim.calibrate import capture
from lowdim.calibrate.batches import given_batches
from lowdim.compress.core.report import CompressedLayer, CompressionReport, attach_report
from lowdim.compress.wina.linear import CRITERIA, RULES, WINALinear
from lowdim.compress.wina.masks import check_sparsity, scores_of, wina_threshold
from lowdim.errors import Options, check_choice, check_float
from lowdim.linalg import gather
from lowdim.surgery import Patterns, find_layers, is_linear, is_quantized, matrix_shape, swap_layers, without_tied

__all__ = ["WINAConfig", "wina", "wina_report"]

_SCORES = 2**18  # kept for the threshold of a layer


@dataclass(frozen=True)
class WINAConfig(Options):
    """How `wina` makes a model's inputs sparse.

    Attributes:
        sparsity: share of the inputs that a token leaves out, in [0, 1); or one for each module name or dotted suffix (0 for
            layers that none of them matches).
        criterion: `"wina"`: input times norm of its weights; `"teal"`: the input alone.
        mask_by: `"topk"` for each token, or `"threshold"`, which needs no sorting but samples.
        dense_prefix: share of a sequence's first tokens that use every input, in [0, 1].
        target_modules: last parts of module names, or a regular expression; None selects every nn.Linear and Conv1D outside
            the output head.
        exclude: layers whose name contains one of these are left alone.

    Raises:
        ValueError: a number outside of its interval, an unknown criterion or rule.

    Example:
        >>> from lowdim.compress import WINAConfig
        >>> WINAConfig(sparsity={"down_proj": 0.6}).criterion
        'wina'
    """

    sparsity: float | Mapping[str, float] = 0.5
    criterion: Literal["wina", "teal"] = "wina"
    mask_by: Literal["topk", "threshold"] = "topk"
    dense_prefix: float = 0.01
    target_modules: Patterns = None
    exclude: tuple[str, ...] = ("lm_head", "embed", "classifier", "pooler")

    def __post_init__(self) -> None:
        if isinstance(self.sparsity, Mapping):
            if not self.sparsity:
                raise ValueError("sparsity must name at least one module; got an empty mapping")
            for name, share in self.sparsity.items():
                check_sparsity(f"sparsity[{name!r}]", share)
        else:
            check_sparsity("sparsity", self.sparsity)
        check_choice("criterion", self.criterion, CRITERIA)
        check_choice("mask_by", self.mask_by, RULES)
        check_float("dense_prefix", self.dense_prefix, 0.0, 1.0)


def wina(model: nn.Module, config: WINAConfig, batches: Iterable[Any] | None = None) -> nn.Module:
    """Make the inputs of linear layers sparse, in place; no weight changes.

    Formula: `y = W (x ⊙ mask) + bias`, where `mask` keeps the `int(in (1 - sparsity))` inputs of a token with the largest
    `|x_j| ‖W[:, j]‖₂`, or those above a threshold that this share of sampled scores lies below. Each layer has its own mask.

    Args:
        config: how sparse, and which layers.
        batches: tensors, or dicts for `model(**batch)`; needed for thresholds, which come from one pass of the untouched
            model over them (at most 262,144 scores a layer, of every k-th token).

    Returns:
        The model, whose layers are `WINALinear`. `lowdim.compress.last_report(model)` has the bytes that a token reads and the
        operations that it takes, as `wina_report` counts them.

    Raises:
        ValueError: nothing matched, a weight or a sample with NaN or infinity, or thresholds without batches. The model is then
            unchanged.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> from lowdim.compress import WINAConfig, wina, wina_report
        >>> model = wina(nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 8)), WINAConfig(sparsity=0.5))
        >>> wina_report(model)["read_weight_bytes"] / wina_report(model)["dense_weight_bytes"]
        0.5

    Source: arXiv 2505.19427; microsoft/wina takes norms for `k_proj` and `gate_proj` alone, the paper and this for all layers.
    """
    found = find_layers(model, config.target_modules, exclude=config.exclude, accept=_can_be_masked)
    layers, _ = without_tied(model, found, named=config.target_modules is not None)
    _check_weights(layers)
    shares = _shares(model, config, layers)
    thresholds: dict[str, float] = {}
    if config.mask_by == "threshold":
        batches = given_batches(batches, "mask_by='threshold' takes the thresholds from sample inputs")
        thresholds = _thresholds(model, layers, shares, config, batches)

    def make(name: str, layer: nn.Module) -> nn.Module:
        return WINALinear(
            layer,
            sparsity=shares[name],
            criterion=config.criterion,
            mask_by=config.mask_by,
            threshold=thresholds.get(name),
            dense_prefix=config.dense_prefix,
        )

    swap_layers(model, layers, make)
    rows = tuple(_row(name, layer, shares[name]) for name, layer in layers.items())
    attach_report(model, CompressionReport("wina", rows, dict(wina_report(model))))
    return model


def wina_report(model: nn.Module) -> dict[str, int]:
    """What one token reads and computes in the sparse layers, against dense ones; stored bytes do not shrink.

    Returns:
        `dense_weight_bytes`, `read_weight_bytes = k out itemsize`, `dense_flops_per_token = 2 in out`,
        `flops_per_token = 2 k out`, with `k = int(in (1 - sparsity))`, summed over the layers; `copied_weight_bytes` of the
        transposed copies that exist now.

    Raises:
        ValueError: the model has no such layer.

    Example:
        >>> from torch import nn
        >>> from lowdim.compress import WINALinear, wina_report
        >>> wina_report(WINALinear.from_linear(nn.Linear(10, 4), 0.75))["flops_per_token"]
        16
    """
    layers = [module for module in model.modules() if isinstance(module, WINALinear)]
    if not layers:
        raise ValueError(f"{type(model).__name__} has no WINALinear; lowdim.compress.wina makes them")
    sizes = [(layer.in_features, layer.kept(), layer.out_features, layer.weight.element_size()) for layer in layers]
    return {
        "dense_weight_bytes": sum(n * out * size for n, _, out, size in sizes),
        "read_weight_bytes": sum(k * out * size for _, k, out, size in sizes),
        "dense_flops_per_token": sum(2 * n * out for n, _, out, _ in sizes),
        "flops_per_token": sum(2 * k * out for _, k, out, _ in sizes),
        "copied_weight_bytes": sum(layer.copied_bytes() for layer in layers),
    }


def _can_be_masked(layer: nn.Module) -> bool:
    return is_linear(layer) and not is_quantized(layer)


def _check_weights(layers: Mapping[str, nn.Module]) -> None:
    for name, layer in layers.items():
        if not bool(torch.isfinite(gather(layer.weight)).all()):  # type: ignore[arg-type]
            raise ValueError(f"layer {name}: the weight has NaN or infinite entries, so its columns have no norm")


def _shares(model: nn.Module, config: WINAConfig, layers: Mapping[str, nn.Module]) -> dict[str, float]:
    """The sparsity of each layer; of several names that match one, the longest counts."""
    if not isinstance(config.sparsity, Mapping):
        return dict.fromkeys(layers, float(config.sparsity))
    shares = dict.fromkeys(layers, 0.0)
    for pattern in sorted(config.sparsity, key=len):
        for name in find_layers(model, [pattern], accept=_can_be_masked):
            if name in shares:
                shares[name] = float(config.sparsity[pattern])
    return shares


def _thresholds(
    model: nn.Module, layers: Mapping[str, nn.Module], shares: Mapping[str, float], config: WINAConfig, batches: Iterable[Any]
) -> dict[str, float]:
    """From the inputs of the dense layers."""
    samples = {name: _Thinned(max(1, _SCORES // matrix_shape(layer)[1])) for name, layer in layers.items()}
    for found in capture(model, list(layers), batches, inputs=True):
        for name, x in found.items():
            samples[name].add(x.reshape(-1, x.shape[-1]))
    unseen = [name for name, kept in samples.items() if not kept.rows]
    if len(unseen) == len(samples):
        raise ValueError("batches is empty, or reaches none of the layers: thresholds come from sample inputs")
    if unseen:
        raise ValueError(f"layer {unseen[0]} saw no token of the sample batches; it has no threshold")
    return {name: _threshold(name, layers[name], samples[name], config, shares[name]) for name in layers}


def _threshold(name: str, layer: nn.Module, sample: _Thinned, config: WINAConfig, share: float) -> float:
    rows = torch.cat(sample.rows)
    if not bool(torch.isfinite(rows).all()):
        raise ValueError(f"layer {name}: its inputs on the sample batches have NaN or infinite entries")
    norms = WINALinear(layer, sparsity=0.0, criterion=config.criterion).column_norms
    return wina_threshold(scores_of(rows, norms), share)


class _Thinned:
    """Every k-th of the rows that are added, at most so many; k doubles when there are more."""

    def __init__(self, most: int):
        self.most, self.every, self.seen = most, 1, 0
        self.rows: list[Tensor] = []

    def add(self, rows: Tensor) -> None:
        """Keep every k-th of them."""
        self.rows.append(rows[-self.seen % self.every :: self.every].clone())
        self.seen += len(rows)
        while sum(map(len, self.rows)) > self.most:
            self.rows = [torch.cat(self.rows)[::2]]
            self.every *= 2


def _row(name: str, layer: nn.Module, share: float) -> CompressedLayer:
    out_features, in_features = matrix_shape(layer)
    size = out_features * in_features
    what = f"{share:.0%} of its inputs left out"
    return CompressedLayer(name, out_features, in_features, None, math.nan, size, size, what=what, replaced=True)
