"""LoRD: one-shot low-rank decomposition from a layer's output features."""

from __future__ import annotations

import logging
import math
import warnings
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, cast

import torch
from torch import Tensor, nn

from lowdim.calibrate import collect
from lowdim.compress.core.report import CompressedLayer, CompressionReport, attach_report
from lowdim.errors import Options, check_float, check_int, nearest
from lowdim.linalg import canonical_signs, compute_dtype
from lowdim.modules import LowRankLinear
from lowdim.ranks import parameter_rank
from lowdim.surgery import (
    Patterns,
    as_linear,
    find_layers,
    float_dtype,
    is_linear,
    matrix_shape,
    swap_layers,
    without_tied,
)

__all__ = ["LoRDConfig", "lord", "lord_factors", "lord_rank", "lord_spectra"]

_log = logging.getLogger(__name__)
_LEAST = 2**26  # bytes of calibration sums that are held at once also for a small model


@dataclass(frozen=True)
class LoRDConfig(Options):
    """How `lord` decomposes a model.

    Attributes:
        rank: one for all layers, >= 1, or `{module name: rank}`, which selects the layers where `target_modules` is None.
        rank_ratio: rank = ⌊ratio · min(in, out)⌋, in (0, 1].
        param_ratio: rank = ⌊ratio · in · out / (in + out)⌋, the layer's share of parameters that is kept, in (0, 1].
        rank_multiple: ranks are rounded down to a multiple of this, >= 1; 64 or 128 suit tensor cores.
        target_modules: names, dotted suffixes or a regular expression; None selects every nn.Linear and Conv1D whose
            name contains no entry of `exclude` (and is not the model's prediction head).
        exclude: used where `target_modules` is None.
        skip_unprofitable: leave a layer dense where two factors would hold no fewer weights.
        centered: decompose around the outputs' mean, with a new bias for every layer; False adds no bias to layers without one.
        cap_rank: a `rank` above a layer's smaller side becomes that side there, where it is an error otherwise; the report's
            `details["capped_ranks"]` lists these layers. `lowdim compress` sets it.

    Exactly one of `rank`, `rank_ratio` and `param_ratio` must be given.
    """

    #: Mutually exclusive options.
    one_of: ClassVar[tuple[tuple[str, ...], ...]] = (("rank", "rank_ratio", "param_ratio"),)

    rank: int | Mapping[str, int] | None = None
    rank_ratio: float | None = None
    param_ratio: float | None = None
    rank_multiple: int = 1
    target_modules: Patterns = None
    exclude: tuple[str, ...] = ("lm_head", "embed", "classifier")
    skip_unprofitable: bool = True
    centered: bool = True
    cap_rank: bool = False

    def __post_init__(self) -> None:
        given = [name for name in self.one_of[0] if getattr(self, name) is not None]
        if len(given) != 1:
            raise ValueError(f"exactly one of rank, rank_ratio and param_ratio must be given; got {', '.join(given) or 'none'}")
        if isinstance(self.rank, Mapping):
            if not self.rank:
                raise ValueError("rank must name at least one module; got an empty mapping")
            for name, rank in self.rank.items():
                check_int(f"rank[{name!r}]", rank, 1)
            object.__setattr__(self, "rank", dict(self.rank))
        elif self.rank is not None:
            check_int("rank", self.rank, 1)
        _check_ratios(self.rank_ratio, self.param_ratio)
        check_int("rank_multiple", self.rank_multiple, 1)
        object.__setattr__(self, "exclude", (self.exclude,) if isinstance(self.exclude, str) else tuple(self.exclude))


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
        max_bytes: bound on the calibration sums, 8 · out² bytes a layer. If they need more, the layers are processed
            in several passes over `batches`, which must then be iterable again (a list or DataLoader, not a generator). None:
            half of the model's size, at least 64 MiB, if `batches` is; without bound for a generator.

    Returns:
        The model, all parameters of the new layers trainable. `lowdim.compress.last_report(model)` lists which layers
        were replaced, which were left dense and why, and the relative error of each: `√(Σ_{i>r} λ_i / Σ λ_i)`.

    Raises:
        ValueError: no batches, nothing matched, a layer that saw no token or not a finite output, a rank outside
            [1, min(in, out)]. The model is then unchanged.

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
    table = _rank_table(model, config.rank) if isinstance(config.rank, Mapping) else None
    layers, tied = _select(model, config, table)
    ranks = {name: _rank_of(name, layer, config, table) for name, layer in layers.items()}
    todo = {
        name: layer for name, layer in layers.items() if not (config.skip_unprofitable and _unprofitable(layer, ranks[name]))
    }
    if batches is None:
        raise ValueError("batches is missing: LoRD needs sample data (PELA's weight SVD does not)")
    dtype = float_dtype(model)
    new: dict[str, LowRankLinear] = {}
    errors: dict[str, float] = {}
    tokens: dict[str, int] = {}
    chunks = _chunks(model, todo, batches, max_bytes)
    if len(chunks) > 1 and isinstance(batches, Iterator):
        raise ValueError(
            f"batches can be read only once, but max_bytes={max_bytes} asks for {len(chunks)} passes; "
            "pass a list or a DataLoader, or raise max_bytes"
        )
    for chunk in chunks:
        stats = collect(model, chunk, {"output_covariance"}, batches)
        for name, layer in chunk.items():
            found = stats.pop(name)  # free each covariance once its layer is done
            tokens[name] = found["output_count"]
            new[name], errors[name] = _decompose(layer, found, ranks[name], dtype, centered=config.centered)
    _warn(model, layers, todo, tokens)
    report = _report(model, layers, tied, new, errors, tokens)
    wanted = {name: config.rank if table is None else table[layer] for name, layer in layers.items()}
    capped = {
        name: ranks[name] for name, rank in wanted.items() if isinstance(rank, int) and rank > min(matrix_shape(layers[name]))
    }
    if capped:
        report.details["capped_ranks"] = capped
    swap_layers(model, todo, lambda name, _: new[name])
    attach_report(model, report)
    _log.info("%s", report.summary)
    return model


def lord_spectra(
    model: nn.Module,
    batches: Iterable[Any],
    *,
    target_modules: Patterns = None,
    exclude: tuple[str, ...] = LoRDConfig.exclude,
) -> dict[str, Tensor]:
    """Singular values `√λ` of each layer's centred outputs, descending: input for `lowdim.ranks` to choose the ranks.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> from lowdim.compress import lord_spectra
        >>> from lowdim.ranks import energy_rank
        >>> spectra = lord_spectra(nn.Sequential(nn.Linear(4, 16)), [torch.randn(300, 4)])
        >>> {name: energy_rank(s, 1 - 1e-6) for name, s in spectra.items()}
        {'0': 4}
    """
    selected = find_layers(
        model, target_modules, exclude=exclude if target_modules in (None, "all-linear") else (), accept=is_linear
    )
    found: dict[str, Tensor] = {}
    for chunk in _chunks(model, selected, batches, None):
        stats = collect(model, chunk, {"output_covariance"}, batches)
        for name in chunk:
            found[name] = torch.linalg.eigvalsh(stats.pop(name)["output_covariance"]).flip(0).clamp_min(0).sqrt()
    return found


def lord_factors(
    weight: Tensor,  # (out, in)
    bias: Tensor | None,  # (out,)
    mean: Tensor,  # (out,)
    covariance: Tensor,  # (out, out)
    rank: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """Factors and new bias of one layer from the mean and the centred covariance of its own outputs.

    Formula: `B = V_r`, `A = V_rᵀ W`, `bias' = μ − V_r V_rᵀ (μ − bias)`. With mean zero and the second moment as
    covariance it is the uncentred form.

    Returns:
        `A (rank, in)`, `B (out, rank)`, `bias (out,)` in the weight's dtype, computed in the covariance's (float32 or better).

    Raises:
        ValueError: shapes that do not fit, rank outside [1, min(out, in)], NaN or infinity.

    Example:
        >>> import torch
        >>> from lowdim.compress import lord_factors
        >>> A, B, bias = lord_factors(torch.eye(3), None, torch.zeros(3), torch.diag(torch.tensor([1.0, 4.0, 9.0])), 2)
        >>> (B @ A).diag().tolist()
        [0.0, 1.0, 1.0]

    Source: Kaushal, Vaidhya, Rish, "LORD", arXiv 2309.14021.
    """
    A, B, new_bias, _ = _factors(weight, bias, mean, covariance, rank)
    return A, B, new_bias


def lord_rank(
    out_features: int,
    in_features: int,
    rank_ratio: float | None = None,
    param_ratio: float | None = None,
    multiple: int = 1,
) -> int:
    """The rank of a layer from the share of its full rank, or of its parameters, that is kept.

    Formula: `⌊rank_ratio · min(in, out)⌋` or `⌊param_ratio · in · out / (in + out)⌋`, rounded down to a multiple of `multiple`
    unless that is 0, and clipped to [1, min(in, out)].

    Raises:
        ValueError: not exactly one ratio, a ratio outside (0, 1].

    Example:
        >>> from lowdim.compress import lord_rank
        >>> lord_rank(1536, 384, rank_ratio=0.75), lord_rank(1536, 384, param_ratio=0.5, multiple=64)
        (288, 128)
    """
    check_int("out_features", out_features, 1)
    check_int("in_features", in_features, 1)
    check_int("multiple", multiple, 1)
    if (rank_ratio is None) == (param_ratio is None):
        raise ValueError(f"exactly one of rank_ratio and param_ratio must be given; got {rank_ratio!r} and {param_ratio!r}")
    _check_ratios(rank_ratio, param_ratio)
    full = min(in_features, out_features)
    if rank_ratio is not None:
        rank = _round_down(math.floor(rank_ratio * full + 1e-9), multiple)  # 0.29 * 100 is just below 29
    else:
        rank = parameter_rank(out_features, in_features, share=cast(float, param_ratio), multiple=multiple)
    return max(1, min(rank, full))


def _check_ratios(rank_ratio: float | None, param_ratio: float | None) -> None:
    for name, value in (("rank_ratio", rank_ratio), ("param_ratio", param_ratio)):
        if value is not None:
            check_float(name, value, 0.0, 1.0, low_open=True)


def _round_down(rank: int, multiple: int) -> int:
    return rank // multiple * multiple or rank


def _rank_table(model: nn.Module, ranks: Mapping[str, int]) -> dict[nn.Module, int]:
    modules = dict(model.named_modules(remove_duplicate=False))  # a module may have two names
    for name in ranks:
        if name not in modules:
            raise ValueError(f"rank names no module {name!r}; nearest: {', '.join(nearest(name, modules))}")
    return {modules[name]: rank for name, rank in ranks.items()}


def _select(
    model: nn.Module, config: LoRDConfig, table: Mapping[nn.Module, int] | None
) -> tuple[dict[str, nn.Module], dict[str, list[str]]]:
    patterns = config.target_modules
    if patterns is None and isinstance(config.rank, Mapping):
        patterns = list(config.rank)
    automatic = patterns in (None, "all-linear")
    found = find_layers(model, patterns, exclude=config.exclude if automatic else (), accept=is_linear)
    if table is not None:
        without = [name for name, layer in found.items() if layer not in table]
        if without and config.target_modules is not None:
            raise ValueError(f"rank has no entry for {', '.join(without)}, which target_modules selects")
        found = {name: layer for name, layer in found.items() if layer in table}  # a name is also a suffix of others
    return without_tied(model, found, named=not automatic, within=True)


def _rank_of(name: str, layer: nn.Module, config: LoRDConfig, table: Mapping[nn.Module, int] | None) -> int:
    out_features, in_features = matrix_shape(layer)
    rank = config.rank if table is None else table[layer]
    if rank is None:
        return lord_rank(out_features, in_features, config.rank_ratio, config.param_ratio, config.rank_multiple)
    assert isinstance(rank, int)
    limit = min(out_features, in_features)
    if rank > limit and not config.cap_rank:
        raise ValueError(
            f"layer {name}: rank must be in [1, {limit}]; got {rank}; LoRDConfig(..., cap_rank=True) caps it there"
        )
    return _round_down(min(rank, limit), config.rank_multiple)


def _unprofitable(layer: nn.Module, rank: int) -> bool:
    out_features, in_features = matrix_shape(layer)
    return rank * (in_features + out_features) >= in_features * out_features


def _chunks(
    model: nn.Module, layers: Mapping[str, nn.Module], batches: Iterable[Any], max_bytes: int | None
) -> list[dict[str, nn.Module]]:
    """The layers of each pass over the batches; see `lord`."""
    if max_bytes is None and not isinstance(batches, Iterator):
        max_bytes = max(_LEAST, sum(p.numel() * p.element_size() for p in model.parameters()) // 2)
    chunks: list[dict[str, nn.Module]] = []
    room = 0
    for name, layer in layers.items():
        need = 8 * matrix_shape(layer)[0] ** 2
        if not chunks or (max_bytes is not None and need > room):
            chunks.append({})
            room = max_bytes or 0
        chunks[-1][name] = layer
        room -= need
    return chunks


def _decompose(
    layer: nn.Module, stats: Mapping[str, Any], rank: int, dtype: torch.dtype, *, centered: bool
) -> tuple[LowRankLinear, float]:
    linear = as_linear(layer, dtype=dtype)
    mean, covariance = stats["output_mean"], stats["output_covariance"]
    if not centered:
        covariance = covariance + torch.outer(mean, mean)
        mean = torch.zeros_like(mean)
    A, B, bias, eigenvalues = _factors(linear.weight, linear.bias, mean, covariance, rank)
    total = float(eigenvalues.sum())
    error = 0.0 if total == 0 else math.sqrt(float(eigenvalues[rank:].sum()) / total)
    new = LowRankLinear.from_factors(A, B, bias if centered or linear.bias is not None else None)
    return new.take_place_of(layer), error


def _factors(
    weight: Tensor, bias: Tensor | None, mean: Tensor, covariance: Tensor, rank: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    out_features, in_features = weight.shape
    check_int("rank", rank, 1, min(out_features, in_features))
    shapes = {"mean": (mean, (out_features,)), "covariance": (covariance, (out_features, out_features))}
    if bias is not None:
        shapes["bias"] = (bias, (out_features,))
    wide = compute_dtype(torch.promote_types(weight.dtype, covariance.dtype))
    for name, (value, shape) in shapes.items():
        if tuple(value.shape) != shape:
            raise ValueError(f"{name} must have shape {shape} for a weight {tuple(weight.shape)}; got {tuple(value.shape)}")
        if not bool(torch.isfinite(value).all()):
            raise ValueError(f"{name} has NaN or infinite entries")
    eigenvalues, vectors = _principal(weight.detach().to(wide), bias, covariance.detach().to(wide))
    B, _ = canonical_signs(vectors[:, :rank])
    mean = mean.detach().to(wide)
    shifted = mean if bias is None else mean - bias.detach().to(wide)
    A = B.T @ weight.detach().to(wide)
    new_bias = mean - B @ (B.T @ shifted)
    return A.to(weight.dtype), B.to(weight.dtype), new_bias.to(weight.dtype), eigenvalues


def _principal(weight: Tensor, bias: Tensor | None, covariance: Tensor) -> tuple[Tensor, Tensor]:
    """Eigenvalues, descending, and eigenvectors of the outputs' covariance (or second moment)."""
    reach = weight if bias is None else torch.cat([weight, bias.detach().to(weight.dtype)[:, None]], dim=1)
    if reach.shape[0] <= reach.shape[1]:
        eigenvalues, vectors = torch.linalg.eigh(covariance)
    else:  # outputs are in the span of the weight's columns and the bias: an eigenproblem of the inputs' size is enough
        span = torch.linalg.qr(reach).Q
        eigenvalues, vectors = torch.linalg.eigh(span.T @ covariance @ span)
        vectors = span @ vectors
    return eigenvalues.flip(0).clamp_min(0), vectors.flip(1)  # rounding may leave some slightly below 0


def _warn(model: nn.Module, layers: Mapping[str, nn.Module], todo: Mapping[str, nn.Module], tokens: Mapping[str, int]) -> None:
    if not todo:
        warnings.warn(
            f"LoRD left all {len(layers)} layers of {type(model).__name__} dense: at these ranks none would shrink; "
            "lower the rank, or set skip_unprofitable=False",
            UserWarning,
            stacklevel=3,
        )
    few = {name: matrix_shape(layer)[0] for name, layer in todo.items() if tokens[name] < 10 * matrix_shape(layer)[0]}
    if few:
        name = max(few, key=lambda n: few[n] / tokens[n])
        warnings.warn(
            f"few calibration tokens: layer {name} with {few[name]} outputs saw {tokens[name]}; "
            f"at least 10 for each output are advised ({len(few)} of {len(todo)} layers have fewer)",
            UserWarning,
            stacklevel=3,
        )


def _report(
    model: nn.Module,
    layers: Mapping[str, nn.Module],
    tied: Mapping[str, list[str]],
    new: Mapping[str, LowRankLinear],
    errors: Mapping[str, float],
    tokens: Mapping[str, int],
) -> CompressionReport:
    rows = []
    for name, layer in model.named_modules():
        if name not in layers and name not in tied:
            continue
        before = sum(p.numel() for p in layer.parameters())
        if name in new:
            after = sum(p.numel() for p in new[name].parameters())
            rank = new[name].rank
            size = matrix_shape(layer)
            rows.append(CompressedLayer(name, *size, rank, errors[name], before, after, what=f"rank {rank}", replaced=True))
        else:
            note = f"left dense: tied to {', '.join(tied[name])}" if name in tied else "left dense: it would not shrink"
            rows.append(CompressedLayer(name, *matrix_shape(layer), None, 0.0, before, before, note))
    return CompressionReport("LoRD", tuple(rows), {"tokens": min(tokens.values(), default=0)})
