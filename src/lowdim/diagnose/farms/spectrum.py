"""Heavy-tailedness of every layer of a model, without the bias of its aspect ratio."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

import numpy as np
import torch
from torch import Tensor

from lowdim.diagnose.core.weights import weights_of
from lowdim.diagnose.farms.fit import METHODS, PowerLawFit, fit_alpha
from lowdim.diagnose.farms.windows import check_finite, check_windows, farms_eigs, squared_singular_values
from lowdim.errors import MissingExtraError, check_choice, check_float, check_int
from lowdim.linalg import compute_dtype
from lowdim.results import Result

__all__ = ["EXCLUDED", "LayerSpectrum", "NothingToMeasureError", "SpectrumResult", "farms"]

#: Parts of the names of embeddings.
EXCLUDED = ("embed", "wte", "wpe")


class NothingToMeasureError(ValueError):
    """No layer could be measured; `reasons` says why, by layer."""

    def __init__(self, origin: str, reasons: dict[str, str]):
        why = "; ".join(f"{name}: {reason}" for name, reason in list(reasons.items())[:3])
        super().__init__(f"nothing to measure in {origin}: {why or 'it has no 2-D or 4-D floating-point weight'}")
        self.reasons = reasons


@dataclass(frozen=True)
class LayerSpectrum(Result):
    """One layer's spectrum and its tail. Of a convolution the numbers are means over its divisions (see `farms`).

    Attributes:
        name: as in `state_dict`.
        shape: `(out, in)`, or `(out, in, height, width)`.
        alpha: exponent of the tail; small is heavy.
        ks_distance: largest distance between the tail and the fitted law, 0 to 1; a large one says that alpha means little.
        xmin: smallest eigenvalue of the tail.
        n_tail: eigenvalues in the tail.
        spectral_norm: largest squared singular value of the windows.
        squared_frobenius: sum of all of them.
        stable_rank: their ratio.
        alpha_hat: `alpha · log10(spectral_norm)`.
        n_eigs: eigenvalues of all windows.
        eigs: `(n_eigs,)` ascending.
    """

    left_out: ClassVar[tuple[str, ...]] = ("eigs",)

    name: str
    shape: tuple[int, ...]
    alpha: float
    ks_distance: float
    xmin: float
    n_tail: int
    spectral_norm: float
    squared_frobenius: float
    stable_rank: float
    alpha_hat: float
    n_eigs: int
    eigs: Tensor = field(repr=False)

    @property
    def alpha_error(self) -> float:
        """A cautious standard error of alpha, as if the matrix's own singular values were independent draws.

        Formula: `(alpha - 1) / √n`, with `n = min(out, in) · n_tail / n_eigs`, since the windows share the matrix's numbers.
        Singular values repel each other, so the true error is smaller.
        """
        return (self.alpha - 1) / math.sqrt(min(self.shape[:2]) * self.n_tail / self.n_eigs)


@dataclass(frozen=True)
class SpectrumResult(Result):
    """The layers' spectra.

    Attributes:
        layers: in the model's order.
        skipped: layer -> why it was not measured.
    """

    layers: list[LayerSpectrum]
    skipped: dict[str, str]

    @property
    def alphas(self) -> dict[str, float]:
        """Layer -> exponent."""
        return {layer.name: layer.alpha for layer in self.layers}

    def rows(self) -> list[dict[str, Any]]:
        """A row for each layer."""
        return [{**layer.to_dict(), "shape": "x".join(map(str, layer.shape))} for layer in self.layers]

    def _table(self) -> list[dict[str, Any]]:
        shown = ("name", "shape", "alpha", "ks_distance", "n_tail", "stable_rank")
        return [{key: row[key] for key in shown} for row in self.rows()]

    @property
    def summary(self) -> str:
        """One line."""
        alphas = np.array(list(self.alphas.values()))
        left = f", {len(self.skipped)} skipped" if self.skipped else ""
        return f"alpha {alphas.min():.2f} to {alphas.max():.2f}, median {np.median(alphas):.2f}, of {len(alphas)} layers{left}"

    def to_weightwatcher(self) -> Any:
        """The result with the columns of the package weightwatcher, as a pandas table, one row a layer.

        All come from the windows' spectra, so norms are not those of the whole matrix, and alpha is FARMS' own.

        `layer_id`: place among the measured layers. `name`: last part of `longname`, which is the layer's name. `layer_type`:
        dense or conv2d. `N`, `M`: larger and smaller side. `rf`: positions of a kernel. `Q`: `N / M`. `num_evals`:
        eigenvalues. `alpha`: exponent of the tail. `xmin`, `xmax`: where the tail begins and ends. `D`: distance from the
        fitted law. `num_pl_spikes`: eigenvalues in the tail. `norm`, `log_norm`: their sum and its log10. `spectral_norm`,
        `lambda_max`, `log_spectral_norm`: the largest. `alpha_weighted`: `alpha · log10(largest)`. `log_alpha_norm`: log10 of
        `Σ e^alpha`. `stable_rank`: sum over largest.

        Raises:
            MissingExtraError: pandas is not installed.
        """
        try:
            import pandas as pd
        except ImportError as error:
            raise MissingExtraError("pandas", "plot", "SpectrumResult.to_weightwatcher") from error
        return pd.DataFrame([_weightwatcher(i, layer) for i, layer in enumerate(self.layers)])

    def plot(self, *, ax: Any = None) -> Any:
        """Alpha by layer with its cautious error; returns the matplotlib axes."""
        axes = self._axes(ax)
        errors = [layer.alpha_error for layer in self.layers]
        axes.errorbar(range(len(self.layers)), list(self.alphas.values()), errors, fmt="o", markersize=4, capsize=2)
        axes.set_xlabel("layer, in the model's order")
        axes.set_ylabel("alpha")
        return axes


def farms(
    source: Any,
    *,
    rows: int = 128,
    ratio: float = 1.0,
    windows: int | None = 9,
    step: int | None = None,
    method: Literal["median", "ks", "peak"] = "median",
    xmin_pos: int = 2,
    bins: int = 100,
    conv_scale: float = 0.5,
    min_eigs: int = 5,
    exclude: Iterable[str] = EXCLUDED,
    callback: Callable[[str, int, int], None] | None = None,
) -> SpectrumResult:
    """The tail exponent of every layer, from windows of one aspect ratio.

    The exponent fitted to a whole matrix depends on its aspect ratio; that of windows of a fixed one does not. A small alpha
    (a heavy tail) marks a layer that was trained well.

    Formula: eigenvalues of all windows (`farms_eigs`), tail by `fit_alpha`. A kernel `(O, I, h, w)` is multiplied by
    `√conv_scale` and gives one matrix `(R, C)` with `R >= C` for each of its positions; each of the `⌊R / C⌋` divisions joins
    rows `d r .. (d + 1) r`, columns `0 .. c` of every position (ratio <= 1: `r = C`, `c = ⌊C ratio⌋`; above: `r = ⌊C / ratio⌋`,
    `c = C`), and the layer's numbers are means over the divisions.

    Args:
        source: a module, a mapping name -> tensor, a safetensors file or a checkpoint folder with or without shards. Adapters
            (PEFT's and lowdim's) are merged in a copy, layer by layer. At most two layers are in memory.
        rows: rows of a window, >= 1; about half the layers' smaller side is good.
        ratio: columns over rows, > 0.
        windows: how many along each dimension, >= 1; null takes one every `step`.
        step: rows and columns from one window to the next, >= 1, if `windows` is null.
        method: where the tail starts: `median` (for training), `peak` (the authors' for pruning), `ks` (the best fit).
        xmin_pos: the tail of `median` starts at place `N / xmin_pos`; >= 2.
        bins: of the histogram of `peak`; >= 1.
        conv_scale: factor on the squared kernels; > 0.
        min_eigs: linear layers with fewer eigenvalues are skipped; >= 2.
        exclude: layers whose names contain one of these are skipped.
        callback: called as `callback(name, done, total)` after each layer.

    Returns:
        SpectrumResult: `.layers`, `.alphas`, `.skipped` with reasons.

    Raises:
        ValueError: an option out of range, a weight that is not finite (the layer is named), nothing left to measure.
        TypeError, DataError, CheckpointError: as `weights_of`.

    Example:
        >>> import torch
        >>> from lowdim.diagnose import farms
        >>> w = torch.randn(96, 384, generator=torch.Generator().manual_seed(0))
        >>> [round(farms({"w": part}, rows=48).layers[0].alpha, 1) for part in (w, w[:, :96])]  # four to one, and square
        [2.1, 2.1]

    Look at `ks_distance` and `n_tail` beside each alpha: a large distance or a short tail means that the law does not
    fit. Alphas compare layers and checkpoints measured with the same options, not models measured with different ones.

    Source: Hu, Goel, Killiakov, Yang, "Eigenspectrum Analysis of Neural Networks without Aspect Ratio Bias", arXiv 2506.06280.
    """
    check_windows(rows, ratio, windows, step)
    check_choice("method", method, METHODS)
    check_int("xmin_pos", xmin_pos, 2)
    check_int("bins", bins, 1)
    check_float("conv_scale", conv_scale, 0.0, low_open=True)
    check_int("min_eigs", min_eigs, 2)
    if isinstance(exclude, str):
        raise TypeError(f"exclude must be a list of parts of names; got the string {exclude!r}")
    weights, parts = weights_of(source, convolutions=True), tuple(exclude)
    first = weights.first_names()
    layers, skipped = list[LayerSpectrum](), dict[str, str]()
    for done, name in enumerate(weights, 1):
        part = next((part for part in parts if part in name), None)
        if part is not None:
            skipped[name] = f"excluded by {part!r}"
        elif first[name] != name:
            skipped[name] = f"the same tensor as {first[name]}"
        else:
            found = _spectra(name, weights[name], rows, ratio, windows, step, conv_scale, min_eigs)
            fitted = found if isinstance(found, str) else _fits(found, method, xmin_pos, bins)
            if isinstance(found, str) or isinstance(fitted, str):
                skipped[name] = str(fitted)
            else:
                layers.append(_layer(name, weights.shape(name), found, fitted))
        if callback is not None:
            callback(name, done, len(weights))
    if not layers:
        raise NothingToMeasureError(weights.origin, skipped)
    return SpectrumResult(layers, skipped)


def _spectra(
    name: str, weight: Tensor, rows: int, ratio: float, windows: int | None, step: int | None, scale: float, least: int
) -> list[Tensor] | str:
    """The eigenvalues of each division (a matrix has one), ascending, on the CPU; or why there are none."""
    try:
        check_finite(weight)
    except ValueError as error:
        raise ValueError(f"layer {name}: {error}") from None
    if not weight.numel() or not any(map(bool, torch.aminmax(weight.detach()))):
        return "every entry is 0" if weight.numel() else "it has no entries"
    if weight.ndim == 4:
        return [eigs.cpu() for eigs in _kernel_eigs(weight.detach(), ratio, scale)]
    eigs = farms_eigs(weight, rows=rows, ratio=ratio, windows=windows, step=step)
    return [eigs.cpu()] if len(eigs) >= least else f"{len(eigs)} eigenvalues, fewer than min_eigs={least}"


def _kernel_eigs(kernel: Tensor, ratio: float, scale: float) -> list[Tensor]:
    matrices = kernel.flatten(2).movedim(-1, 0).to(compute_dtype(kernel.dtype)) * math.sqrt(scale)  # (positions, O, I)
    if matrices.shape[1] < matrices.shape[2]:
        matrices = matrices.mT
    long, short = matrices.shape[1:]
    r = short if ratio <= 1 else max(1, int(short // ratio))
    c = max(1, int(short // (1 / ratio))) if ratio <= 1 else short
    pieces = (matrices[:, d * r : (d + 1) * r, :c] for d in range(long // short))
    return [squared_singular_values(piece).flatten().sort().values for piece in pieces]


def _fits(spectra: list[Tensor], method: Any, xmin_pos: int, bins: int) -> list[PowerLawFit] | str:
    try:
        fits = [fit_alpha(eigs, method=method, xmin_pos=xmin_pos, bins=bins) for eigs in spectra]
    except ValueError as error:
        return str(error)
    return fits if all(fit.alpha > 0 for fit in fits) else f"no tail of it fits a power law (method {method})"


def _layer(name: str, shape: tuple[int, ...], spectra: list[Tensor], fits: list[PowerLawFit]) -> LayerSpectrum:
    largest, total = ([float(value) for value in values] for values in zip(*((e[-1], e.sum()) for e in spectra)))
    return LayerSpectrum(
        name=name,
        shape=shape,
        alpha=_mean(fit.alpha for fit in fits),
        ks_distance=_mean(fit.ks_distance for fit in fits),
        xmin=_mean(fit.xmin for fit in fits),
        n_tail=round(_mean(fit.n_tail for fit in fits)),
        spectral_norm=_mean(largest),
        squared_frobenius=_mean(total),
        stable_rank=_mean(s / e for s, e in zip(total, largest)),
        alpha_hat=_mean(fit.alpha * math.log10(e) for fit, e in zip(fits, largest)),
        n_eigs=sum(map(len, spectra)),
        eigs=torch.cat(spectra).sort().values,
    )


def _mean(values: Iterable[float]) -> float:
    return float(np.mean(list(values)))


def _weightwatcher(place: int, layer: LayerSpectrum) -> dict[str, Any]:
    longname = layer.name.removesuffix(".weight")
    long, short = max(layer.shape[:2]), min(layer.shape[:2])
    logs = np.log10(np.maximum(layer.eigs.double().numpy(), np.finfo(np.float64).tiny)) * layer.alpha
    return {
        "layer_id": place,
        "name": longname.rpartition(".")[2],
        "longname": longname,
        "layer_type": "conv2d" if len(layer.shape) == 4 else "dense",
        "N": long,
        "M": short,
        "rf": math.prod(layer.shape[2:]),
        "Q": long / short,
        "num_evals": layer.n_eigs,
        "alpha": layer.alpha,
        "xmin": layer.xmin,
        "xmax": float(layer.eigs[-1]),
        "D": layer.ks_distance,
        "num_pl_spikes": layer.n_tail,
        "norm": layer.squared_frobenius,
        "log_norm": math.log10(layer.squared_frobenius),
        "spectral_norm": layer.spectral_norm,
        "log_spectral_norm": math.log10(layer.spectral_norm),
        "alpha_weighted": layer.alpha_hat,
        "log_alpha_norm": float(logs.max() + np.log10(np.sum(10 ** (logs - logs.max())))),
        "stable_rank": layer.stable_rank,
        "lambda_max": layer.spectral_norm,
    }
