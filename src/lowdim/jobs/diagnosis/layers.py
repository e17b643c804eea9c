"""The numbers of one layer: its spectrum, and with a base what tuning changed in it."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from lowdim.results import Result

if TYPE_CHECKING:
    from torch import Tensor

    from lowdim.diagnose import LayerSpectrum

__all__ = ["LayerDiagnosis", "measure_layer"]

_POINTS = 32  # of a spectrum that are kept for the chart


@dataclass(frozen=True)
class LayerDiagnosis(Result):
    """One weight matrix. Without a base the fields of `tuning` are None.

    Attributes:
        name, shape: as in `state_dict`, `(out, in)`.
        alpha, alpha_error, ks_distance, n_tail: FARMS' exponent, its cautious standard error, and how well the tail fits.
        full_alpha, full_alpha_error, full_ks_distance: the same of the whole matrix, biased by its shape; None without a fit.
        spectral_norm, frobenius_norm: of the whole matrix.
        stable_rank: `‖W‖_F² / ‖W‖_2²`.
        effective_rank: exponential of the entropy of the squared singular values' shares.
        rank_90: singular values that hold 90 % of the energy.
        half_rank: rank at which two factors have half of the parameters.
        half_error: `‖W - W_r‖_F / ‖W‖_F` at that rank.
        strength: `‖W - W0‖_F / ‖W0‖_F`.
        update_rank: effective rank of `W - W0`; None if nothing changed.
        update_spectral: `‖W - W0‖_2 / ‖W0‖_2`.
        intruders, doubtful: intruder dimensions among the first k, and those of near-equal singular values.
        least_similar: smallest similarity among the first k.
        overlap: mean squared cosine between the first k left singular vectors and the base's.
        overlap_chance: what random directions would have, `k / out`.
        spectrum: singular values over the largest, at evenly spaced places.
    """

    name: str
    shape: tuple[int, ...]
    alpha: float
    alpha_error: float
    ks_distance: float
    n_tail: int
    full_alpha: float | None
    full_alpha_error: float | None
    full_ks_distance: float | None
    spectral_norm: float
    frobenius_norm: float
    stable_rank: float
    effective_rank: float
    rank_90: int
    half_rank: int
    half_error: float
    strength: float | None = None
    update_rank: float | None = None
    update_spectral: float | None = None
    intruders: int | None = None
    doubtful: int | None = None
    least_similar: float | None = None
    overlap: float | None = None
    overlap_chance: float | None = None
    spectrum: tuple[float, ...] = ()


def measure_layer(windows: LayerSpectrum, weight: Tensor, base: Tensor | None, *, k: int, threshold: float) -> LayerDiagnosis:
    """The numbers of one matrix `(out, in)`, computed in float32 or better.

    Args:
        windows: its FARMS.
        base: the matrix before tuning, or None.
        k, threshold: as in `intruder_dimensions`; `k` is also the number of directions whose overlap is measured.

    Raises:
        ValueError: shapes that differ, or numbers that are not finite (the layer is named).
    """
    import torch

    from lowdim.diagnose import fit_alpha, intruder_dimensions
    from lowdim.linalg import compute_dtype
    from lowdim.ranks import parameter_rank

    wide = weight.detach().to(compute_dtype(weight.dtype))
    tuning: dict[str, Any] = {}
    if base is None:
        s = torch.linalg.svdvals(wide)
    else:
        (found,) = intruder_dimensions({windows.name: base}, {windows.name: weight}, k=k, threshold=threshold).layers.values()
        s = found.singular_values.to(wide)
        first = min(k, len(s))
        before = base.detach().to(wide)
        change = torch.linalg.svdvals(wide - before)
        size = float(torch.linalg.matrix_norm(before))
        tuning = {
            "strength": float(change.norm()) / size if size else None,
            "update_rank": _effective_rank(change) if float(change[0]) > 0 else None,
            "update_spectral": float(change[0] / torch.linalg.matrix_norm(before, 2)) if size else None,
            "intruders": found.count,
            "doubtful": len(found.doubtful),
            "least_similar": float(found.similarity.min()),
            "overlap": float(found.overlap[:first, :first].square().sum()) / first,
            "overlap_chance": first / weight.shape[0],
        }
    energy = s.double().square()
    shares = energy.cumsum(0) / energy.sum()
    half = min(len(s), max(1, parameter_rank(weight.shape[0], weight.shape[1], share=0.5)))
    full: dict[str, Any] = {"full_alpha": None, "full_alpha_error": None, "full_ks_distance": None}
    try:
        fit = fit_alpha(energy)
        full = {
            "full_alpha": fit.alpha,
            "full_alpha_error": (fit.alpha - 1) / math.sqrt(fit.n_tail),
            "full_ks_distance": fit.ks_distance,
        }
    except ValueError:  # the tail starts at 0, as of a weight of low rank
        pass
    places = torch.linspace(0, len(s) - 1, min(_POINTS, len(s))).round().long()
    return LayerDiagnosis(
        name=windows.name,
        shape=windows.shape,
        alpha=windows.alpha,
        alpha_error=windows.alpha_error,
        ks_distance=windows.ks_distance,
        n_tail=windows.n_tail,
        **full,
        spectral_norm=float(s[0]),
        frobenius_norm=float(energy.sum().sqrt()),
        stable_rank=float(energy.sum() / energy[0]),
        effective_rank=_effective_rank(s),
        rank_90=int((shares < 0.9).sum()) + 1,
        half_rank=half,
        half_error=math.sqrt(max(0.0, 1 - float(shares[half - 1]))),
        **tuning,
        spectrum=tuple((s[places.to(s.device)] / s[0]).tolist()),
    )


def _effective_rank(s: Tensor) -> float:
    p = s.double().square()
    p = p[p > 0] / p.sum()
    return float((-(p * p.log()).sum()).exp())
