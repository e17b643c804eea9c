"""WeLore: a rank for each layer from its singular values, and fine-tuning of the low-rank layers only."""

from __future__ import annotations

import logging
import math
import warnings
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn

from lowdim import ranks as rank_rules
from lowdim.compress.core.report import CompressedLayer, CompressionReport, attach_report
from lowdim.compress.core.spectra import weight_spectra, wide_weight
from lowdim.errors import NoMatchingModuleError, Options, check_float
from lowdim.linalg import balanced_factors
from lowdim.modules import LowRankLinear
from lowdim.surgery import (
    Patterns,
    find_layers,
    float_dtype,
    freeze_except,
    is_linear,
    known_dtype,
    matrix_shape,
    swap_layers,
    without_tied,
)

__all__ = ["WeLoreConfig", "WeLoreLinear", "welore", "welore_freeze"]

_log = logging.getLogger(__name__)


class _DefaultTarget(float):
    """The default target, which a threshold replaces."""


@dataclass(frozen=True)
class WeLoreConfig(Options):
    """How `welore` reduces a model.

    Attributes:
        target: share of all ranks to remove, in (0, 1); it determines the threshold. 0.5 if no threshold is given.
        threshold: the threshold itself, in [0, 1].
        min_reduction: a layer is factored if more than this share of its ranks is removed, in [0, 1). Below one half, two
            factors of a square matrix have no fewer numbers than the matrix.
        target_modules: last parts of module names, or a regular expression; None selects every nn.Linear and Conv1D outside
            the output head.

    Raises:
        ValueError: both or neither of target and threshold; a number outside its interval.

    Example:
        >>> from lowdim.compress import WeLoreConfig
        >>> WeLoreConfig().target, WeLoreConfig(threshold=0.175).target
        (0.5, None)
    """

    target: float | None = _DefaultTarget(0.5)
    threshold: float | None = None
    min_reduction: float = 0.5
    target_modules: Patterns = None

    def __post_init__(self) -> None:
        if isinstance(self.target, _DefaultTarget):
            object.__setattr__(self, "target", 0.5 if self.threshold is None else None)
        if (self.target is None) == (self.threshold is None):
            raise ValueError(
                f"exactly one of target and threshold must be given; got target={self.target!r}, threshold={self.threshold!r}"
            )
        if self.target is not None:
            check_float("target", self.target, 0.0, 1.0, low_open=True, high_open=True)
        if self.threshold is not None:
            check_float("threshold", self.threshold, 0.0, 1.0)
        check_float("min_reduction", self.min_reduction, 0.0, 1.0, high_open=True)


class WeLoreLinear(LowRankLinear):
    """A low-rank layer whose factors also have WeLore's names: `y = U (V x) + bias`, `U` is `B` and `V` is `A`.

    Example:
        >>> from lowdim.compress import WeLoreLinear
        >>> layer = WeLoreLinear(6, 4, rank=2)
        >>> layer.U.shape, layer.V.shape, layer.U is layer.B
        (torch.Size([4, 2]), torch.Size([2, 6]), True)

    Source: arXiv 2407.11239.
    """

    @property
    def U(self) -> nn.Parameter:
        """`(out, rank)`."""
        return self.B

    @property
    def V(self) -> nn.Parameter:
        """`(rank, in)`."""
        return self.A


def welore(model: nn.Module, config: WeLoreConfig, batches: Iterable[Any] | None = None) -> nn.Module:
    """Factor the layers whose singular values decay, each at its own rank, in place; needs no data.

    Formula: `s` the singular values of `W (out, in)`, `z = (s - min s) / (max s - min s)`. At a threshold k, common to all
    layers, the kept rank is `r = #{z >= k}` (`lowdim.ranks.welore` finds k from the target). If more than `min_reduction`
    of the ranks are removed, `W ~ U V` with `U = U_r √S_r (out, r)`, `V = √S_r V_rᵀ (r, in)`: a low-rank component. Other
    layers are unchanged.

    Args:
        config: the amount of reduction, and which layers.
        batches: not used; other systems need samples here.

    Returns:
        The model. `model.welore_report` is `{"threshold": k, "layers": {name: ("lrc" or "dense", rank)}}`, the full rank for
        dense ones; `lowdim.compress.last_report(model)` has parameters and the relative error `√(Σ_{i>r} s² / Σ s²)` of each
        layer, and both shares of removed ranks: as the rule counts them, and as actually removed, in low-rank components.

    Raises:
        ValueError: nothing matched, every layer has one row or column only, a weight with NaN or infinity, a target that cannot
            be reached. The model is then unchanged.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> from lowdim.compress import WeLoreConfig, welore
        >>> model = nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 8))
        >>> model[0].weight.data = torch.diag(torch.logspace(0, -2, 8))
        >>> model[2].weight.data = torch.diag(torch.linspace(1, 0.5, 8))
        >>> welore(model, WeLoreConfig(target=0.4)).welore_report["layers"]
        {'0': ('lrc', 3), '2': ('dense', 8)}

    One matrix is decomposed at a time: all singular values first, then the required factors. This decomposes those matrices
    twice, but holds no unused factor. When not: the reduction is counted in ranks, and a square matrix at half its rank has as
    many numbers as before; with samples `lord` keeps more of a layer's outputs at the same rank; in encoders that use their
    full width no layer is much flatter than the others, and uniform ranks are as good. Fine-tune afterwards (`welore_freeze`).

    Source: Jaiswal et al., "From GaLore to WeLore: How Low-Rank Weights Non-uniformly Emerge from Low-Rank Gradients", arXiv
    2407.11239.
    """
    del batches
    named = config.target_modules not in (None, "all-linear")
    found = find_layers(model, config.target_modules, accept=is_linear)
    layers, tied = without_tied(model, found, named=named)
    spectra = weight_spectra(layers)
    threshold, kept = _ranks(layers, spectra, config)
    factored = {
        name: layer
        for name, layer in layers.items()
        if name in kept and (len(spectra[name]) - kept[name]) / len(spectra[name]) > config.min_reduction
    }
    report = _report(model, layers, tied, spectra, kept, set(factored), threshold)
    dtype = float_dtype(model)
    swap_layers(model, factored, lambda name, layer: _factor(layer, kept[name], dtype))
    cast(Any, model).welore_report = {
        "threshold": threshold,
        "layers": {
            name: ("lrc", kept[name]) if name in factored else ("dense", min(matrix_shape(layer)))
            for name, layer in layers.items()
        },
    }
    attach_report(model, report)
    if not factored:
        warnings.warn(
            f"WeLore left all {len(layers)} layers of {type(model).__name__} dense: at threshold {threshold:g} none loses more "
            f"than min_reduction={config.min_reduction:g} of its ranks; raise the target or lower min_reduction",
            UserWarning,
            stacklevel=2,
        )
    _log.info("%s", report.summary)
    return model


def welore_freeze(model: nn.Module, *, train_norms: bool = False) -> list[nn.Parameter]:
    """Make only the factors of the low-rank components trainable, so gradients and optimizer state are small.

    Works on a compressed model and on one that was saved and loaded again (`load_low_rank`); all its low-rank layers then
    count as components.

    Args:
        train_norms: also train normalisation layers, as the authors do. Biases stay frozen.

    Returns:
        The trained parameters in model order: U and V of each component (and norms). Pass them to AdamW; the paper uses a rate
        of 5e-5 for continued training, 1e-4 for a downstream task, and no weight decay.

    Raises:
        ValueError: the model has no low-rank component.

    Example:
        >>> from torch import nn
        >>> from lowdim.compress import WeLoreConfig, welore, welore_freeze
        >>> model = welore(nn.Sequential(nn.Linear(8, 32), nn.LayerNorm(32)), WeLoreConfig(threshold=0.9, min_reduction=0))
        >>> len(welore_freeze(model)), len(welore_freeze(model, train_norms=True))
        (2, 4)

    When not: after a compression with few low-rank layers; then tune all parameters, or an adapter.

    Source: arXiv 2407.11239.
    """
    kind = WeLoreLinear if hasattr(model, "welore_report") else LowRankLinear
    chosen: list[nn.Parameter] = []
    components = 0
    for module in model.modules():
        if isinstance(module, kind):
            components += 1
            chosen += [module.B, module.A]
        elif train_norms and "norm" in type(module).__name__.lower():
            chosen += module.parameters(recurse=False)
    if not components:
        raise ValueError(
            f"{type(model).__name__} has no low-rank component to train; compress it with welore first (a lower min_reduction, "
            "or a higher target, gives more)"
        )
    return freeze_except(model, chosen)


def _ranks(
    layers: Mapping[str, nn.Module], spectra: Mapping[str, Tensor], config: WeLoreConfig
) -> tuple[float, dict[str, int]]:
    """The threshold, and the kept rank of each layer that has more than one; a shared weight counts once."""
    owners: dict[int, str] = {}
    for name, layer in layers.items():
        if len(spectra[name]) > 1:
            owners.setdefault(id(getattr(layer, "weight", layer)), name)
    if not owners:
        raise NoMatchingModuleError(
            f"no layer is left: each of {', '.join(layers)} has one row or column, so its rank cannot be reduced"
        )
    counted = {name: spectra[name] for name in owners.values()}
    if config.target is not None:
        threshold, kept = rank_rules.welore(counted, config.target)
    else:
        assert config.threshold is not None
        threshold = float(config.threshold)
        kept = rank_rules.welore_at(counted, threshold)
    return threshold, {
        name: kept[owners[id(getattr(layer, "weight", layer))]]
        for name, layer in layers.items()
        if id(getattr(layer, "weight", layer)) in owners
    }


@torch.no_grad()
def _factor(layer: nn.Module, rank: int, dtype: torch.dtype) -> nn.Module:
    """The low-rank component; `dtype` is for quantized layers that do not tell theirs."""
    A, B = balanced_factors(wide_weight(layer), rank)
    dtype = known_dtype(layer) or dtype
    new = WeLoreLinear.from_factors(A.to(dtype), B.to(dtype), cast("Tensor | None", layer.bias))
    return new.take_place_of(layer)


def _report(
    model: nn.Module,
    layers: Mapping[str, nn.Module],
    tied: Mapping[str, list[str]],
    spectra: Mapping[str, Tensor],
    kept: Mapping[str, int],
    factored: set[str],
    threshold: float,
) -> CompressionReport:
    rows, seen = [], set()
    ranks = by_rule = cut = 0
    for name, layer in model.named_modules():
        if name not in layers and name not in tied:
            continue
        out_features, in_features = matrix_shape(layer)
        new = [p for p in layer.parameters() if id(p) not in seen]  # a shared weight is counted at its first layer
        before = sum(p.numel() for p in new)
        twin = any(p is layer.weight for p in new)
        seen |= {id(p) for p in new}
        if name in kept and twin:
            gone = len(spectra[name]) - kept[name]
            ranks, by_rule, cut = ranks + len(spectra[name]), by_rule + gone, cut + gone * (name in factored)
        if name in factored:
            rank, energy = kept[name], spectra[name].square()
            error = math.sqrt(float(energy[rank:].sum() / energy.sum()))
            change = rank * (out_features + in_features) - out_features * in_features if twin else 0
            what = {"what": f"rank {rank}", "replaced": True}
            rows.append(CompressedLayer(name, out_features, in_features, rank, error, before, before + change, **what))
            continue
        if name in tied:
            note = f"left dense: tied to {', '.join(tied[name])}"
        elif name not in kept:
            note = "left dense: it has one row or column"
        else:
            note = f"left dense: {len(spectra[name]) - kept[name]} of {len(spectra[name])} ranks below the threshold"
        rows.append(CompressedLayer(name, out_features, in_features, None, 0.0, before, before, note))
    details = {"threshold": threshold, "reduction": by_rule / ranks, "reduction_in_components": cut / ranks}
    return CompressionReport("WeLore", tuple(rows), details)
