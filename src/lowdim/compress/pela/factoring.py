"""Every layer as two factors of the size that a ratio gives, from the SVD of its weight."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn

from lowdim.compress.core.report import CompressedLayer, CompressionReport, attach_report
from lowdim.errors import NoMatchingModuleError, Options, check_float, check_int, nearest
from lowdim.linalg import balanced_factors, compute_dtype, stream
from lowdim.modules import LowRankLinear
from lowdim.ranks import parameter_rank
from lowdim.surgery import (
    Patterns,
    dense_matrix,
    find_layers,
    float_dtype,
    is_linear,
    known_dtype,
    matrix_shape,
    submodule,
    swap_layers,
    without_tied,
)

__all__ = ["PELAConfig", "pela", "pela_factors", "pela_rank"]

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class PELAConfig(Options):
    """How `pela` factorizes a model, and how `PELAObjective` weighs its terms.

    Attributes:
        compression_ratio: each layer's parameters are divided by this, >= 1; it may be fractional.
        rank: a rank for each layer in place of the ratio's: `{module name: rank}`; layers that it does not name are left dense.
        target_modules: names, dotted suffixes or a regular expression; None selects every nn.Linear and Conv1D whose
            name contains no entry of `exclude` (and is not the model's prediction head).
        exclude: used where `target_modules` is None.
        min_out_features: layers with fewer outputs are left dense, >= 1.
        approximate: False draws random factors instead of decomposing: a model of the right shape, for loading tensors.
        feature_weight: α, of the difference between the outputs of the blocks, >= 0.
        logit_weight: β, of the difference between the logits, >= 0.
        perturbation_weight: γ, of the largest change of a weight's entries, >= 0.
        perturbation_eps: ε, the change that is aimed at, >= 0.
        feature_modules: names of the modules whose outputs are compared; None takes the entries of the outermost nn.ModuleLists
            that hold a factorized layer, which are the blocks of a transformer.
    """

    compression_ratio: float = 2.0
    rank: Mapping[str, int] | None = None
    target_modules: Patterns = None
    exclude: tuple[str, ...] = ("norm", "head", "patch_embed", "downsample", "cls")
    min_out_features: int = 10
    approximate: bool = True
    feature_weight: float = 1.0
    logit_weight: float = 0.0
    perturbation_weight: float = 1.0
    perturbation_eps: float = 1e-3
    feature_modules: tuple[str, ...] | None = None

    def __post_init__(self) -> None:
        check_float("compression_ratio", self.compression_ratio, 1.0)
        check_int("min_out_features", self.min_out_features, 1)
        if self.rank is not None:
            for name, rank in self.rank.items():
                check_int(f"rank[{name!r}]", rank, 1)
            object.__setattr__(self, "rank", dict(self.rank))
        for name in ("feature_weight", "logit_weight", "perturbation_weight", "perturbation_eps"):
            check_float(name, getattr(self, name), 0.0)
        object.__setattr__(self, "exclude", (self.exclude,) if isinstance(self.exclude, str) else tuple(self.exclude))
        modules = self.feature_modules
        if modules is not None:
            modules = (modules,) if isinstance(modules, str) else tuple(modules)
            if not modules:
                raise ValueError("feature_modules must name at least one module; got an empty list (None selects the blocks)")
            object.__setattr__(self, "feature_modules", modules)


def pela(model: nn.Module, config: PELAConfig, batches: Iterable[Any] | None = None) -> nn.Module:
    """Replace linear layers by two factors that hold `1 / compression_ratio` of their parameters, in place; needs no data.

    Formula: `r = ⌊in · out / (ρ (in + out))⌋`, and from `W = U S Vᵀ` the balanced factors `A = √S_r V_rᵀ (r, in)`,
    `B = U_r √S_r (out, r)`: `y = B (A x) + bias`. The bias is copied.

    Args:
        config: the ratio, and which layers.
        batches: not used; other systems need samples here.

    Returns:
        The model, all parameters of the new layers trainable. `lowdim.compress.last_report(model)` has the rank, the parameters
        and the relative error `‖W − B A‖ / ‖W‖` of each layer, and why a layer was left dense.

    Raises:
        ValueError: nothing matched, every layer is too small to be factorized, a weight with NaN or infinity. The model is then
            unchanged.

    Example:
        >>> import copy, torch
        >>> from torch import nn
        >>> from lowdim.compress import PELAConfig, last_report, pela
        >>> torch.manual_seed(0) and None
        >>> teacher = nn.Sequential(nn.Linear(32, 64), nn.GELU(), nn.Linear(64, 32))
        >>> student = pela(copy.deepcopy(teacher), PELAConfig(compression_ratio=4))
        >>> [layer.rank for layer in last_report(student).layers]
        [5, 5]

    A weight SVD alone loses much, since it does not see the inputs: train the student with `PELAObjective` afterwards, or use
    `lord` where there are samples and no time to train. When not: a trained model that must shrink at once; grouped key and
    value projections, where the rank easily falls below the size of a head (`report.details["below_head_dim"]` names them).

    Source: Guo, Wang, Kankanhalli, "PELA: Learning Parameter-Efficient Models with Low-Rank Approximation", arXiv 2310.10700;
    the authors' program guoyang9/PELA.
    """
    del batches
    automatic = config.target_modules in (None, "all-linear")
    found = find_layers(model, config.target_modules, exclude=config.exclude if automatic else (), accept=is_linear)
    layers, tied = without_tied(model, found, named=not automatic)
    shapes = {name: matrix_shape(layer) for name, layer in found.items()}  # (out, in)
    ranks = _ranks(config, {name: shapes[name] for name in layers})
    small = {name: _too_small(layer, ranks[name], config) for name, layer in layers.items()}
    todo = {name: layer for name, layer in layers.items() if small[name] is None}
    if not todo:
        reasons = "; ".join(f"{name} has {reason}" for name, reason in list(small.items())[:4])
        raise NoMatchingModuleError(f"nothing to factorize at compression_ratio={config.compression_ratio:g}: {reasons}")
    dtype = float_dtype(model)
    errors: dict[str, float] = {}

    def factor(name: str, layer: nn.Module) -> nn.Module:
        wanted = known_dtype(layer) or dtype
        if not config.approximate:
            return _random(layer, ranks[name], wanted, name)
        new, errors[name] = _factor(layer, ranks[name], wanted)
        return new

    before = _counts(found)
    with torch.no_grad():
        swap_layers(model, todo, factor)
    after = _counts({name: submodule(model, name) for name in found})
    rows = []
    for name, shape in shapes.items():
        if name in todo:
            what = {"what": f"rank {ranks[name]}", "replaced": True}
            row = CompressedLayer(name, *shape, ranks[name], errors.get(name, 1.0), before[name], after[name], **what)
        else:
            why = f"tied to {', '.join(tied[name])}" if name in tied else f"it has {small[name]}"
            row = CompressedLayer(name, *shape, None, 0.0, before[name], after[name], f"left dense: {why}")
        rows.append(row)
    report = CompressionReport("PELA", tuple(rows))
    attach_report(model, report)
    _log.info("%s", report.summary)
    return model


def pela_rank(in_features: int, out_features: int, compression_ratio: float) -> int:
    """The rank at which two factors have `1 / compression_ratio` of a layer's weights.

    Formula: `⌊in · out / (ρ (in + out))⌋`. 0 for a layer that is too small to be factorized.

    Raises:
        ValueError: a size below 1, a ratio below 1.

    Example:
        >>> from lowdim.compress import pela_rank
        >>> pela_rank(24, 40, 3), pela_rank(33, 18, 1.5), pela_rank(4, 2, 2)
        (5, 7, 0)

    Source: arXiv 2310.10700.
    """
    check_float("compression_ratio", compression_ratio, 1.0)
    return parameter_rank(out_features, in_features, share=1 / compression_ratio)


def pela_factors(
    weight: Tensor,  # (out, in)
    rank: int,
) -> tuple[Tensor, Tensor]:
    """Balanced factors of a weight: `A = √S_r V_rᵀ (rank, in)`, `B = U_r √S_r (out, rank)`, so that `A Aᵀ = Bᵀ B = S_r`.

    The same as `lowdim.linalg.balanced_factors`, in the weight's own dtype.

    Raises:
        ValueError: rank outside [1, min(out, in)], NaN or infinity in the weight.

    Example:
        >>> import torch
        >>> from lowdim.compress import pela_factors
        >>> A, B = pela_factors(torch.diag(torch.tensor([9.0, 4.0, 1.0])), 2)
        >>> (B @ A).diag().round().tolist()
        [9.0, 4.0, 0.0]

    Source: arXiv 2310.10700.
    """
    A, B = balanced_factors(weight, rank)
    return A.to(weight.dtype), B.to(weight.dtype)


def _counts(layers: Mapping[str, nn.Module]) -> dict[str, int]:
    """Parameters of each layer; a shared one counts at the first layer that has it."""
    seen: set[int] = set()
    counts = {}
    for name, layer in layers.items():
        new = {id(p): p.numel() for p in layer.parameters() if id(p) not in seen}
        counts[name] = sum(new.values())
        seen |= new.keys()
    return counts


def _ranks(config: PELAConfig, shapes: Mapping[str, tuple[int, int]]) -> dict[str, int]:
    """The rank of each layer: of the table, where there is one, or of the ratio; 0 for one that is left dense."""
    if config.rank is None:
        return {name: pela_rank(n, out, config.compression_ratio) for name, (out, n) in shapes.items()}
    for name, rank in config.rank.items():
        if name not in shapes:
            close = ", ".join(nearest(name, shapes))
            raise ValueError(f"rank names {name!r}, which is not a layer that can be factorized; nearest: {close}")
        if rank > min(shapes[name]):
            raise ValueError(f"layer {name}: rank must be in [1, {min(shapes[name])}]; got {rank}")
    return {name: config.rank.get(name, 0) for name in shapes}


def _too_small(layer: nn.Module, rank: int, config: PELAConfig) -> str | None:
    """Why a layer is left dense, if it is."""
    out_features, in_features = matrix_shape(layer)
    if config.rank is not None:
        return None if rank else "no rank in the table"
    if out_features < config.min_out_features:
        return f"{out_features} outputs, fewer than min_out_features={config.min_out_features}"
    return f"rank 0 at this ratio with {out_features} x {in_features} weights" if rank < 1 else None


def _factor(layer: nn.Module, rank: int, dtype: torch.dtype) -> tuple[nn.Module, float]:
    """The factorized layer, and its relative error; `dtype` is for quantized layers that do not tell theirs."""
    weight = dense_matrix(layer).detach()
    if weight.is_meta:
        raise ValueError(
            "its weight is on the meta device and has no numbers; approximate=False makes layers of the right shape"
        )
    weight = weight.to(compute_dtype(weight.dtype))
    A, B = balanced_factors(weight, rank)
    size = float(torch.linalg.vector_norm(weight))
    error = float(torch.linalg.vector_norm(weight - B @ A)) / size if size else 0.0
    new = LowRankLinear.from_factors(A.to(dtype), B.to(dtype), cast("Tensor | None", layer.bias))
    return new.take_place_of(layer), error


def _random(layer: nn.Module, rank: int, dtype: torch.dtype, name: str) -> nn.Module:
    out_features, in_features = matrix_shape(layer)
    device = cast(Tensor, layer.weight).device
    how: Mapping[str, Any] = {"rank": rank, "generator": stream(0, "pela", name), "device": device, "dtype": dtype}
    return LowRankLinear(in_features, out_features, layer.bias is not None, **how).take_place_of(layer)
