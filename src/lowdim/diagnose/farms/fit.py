"""A power law fitted to the upper tail of eigenvalues."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from torch import Tensor

from lowdim.errors import check_choice, check_float, check_int
from lowdim.results import Result

__all__ = ["METHODS", "PowerLawFit", "fit_alpha"]

METHODS = ("median", "ks", "peak")
_ROWS = 64  # candidates for the start of the tail that are tried at once
_COARSE = 64  # points of a tail at which its distance is bounded from below


@dataclass(frozen=True)
class PowerLawFit(Result):
    """The tail of a spectrum as `p(e) ∝ e^-alpha` from `xmin` on.

    Attributes:
        alpha: the exponent; small is heavy. 0 where no start of the tail gives one.
        ks_distance: largest distance between the tail and the fitted law, from 0 (it fits) to 1.
        xmin: the smallest eigenvalue of the tail.
        n_tail: eigenvalues in the tail.
    """

    alpha: float
    ks_distance: float
    xmin: float
    n_tail: int


def fit_alpha(
    eigs: Tensor | np.ndarray | list[float],  # (N,)
    *,
    method: Literal["median", "ks", "peak"] = "median",
    xmin_pos: int = 2,
    bins: int = 100,
    eig_threshold: float | None = None,
) -> PowerLawFit:
    """The exponent of the upper tail of eigenvalues, by maximum likelihood (Hill's estimator).

    Formula: of `e_0 <= ... <= e_{N-1}`, from index i on, with `n_i = N - i`:
    `alpha_i = 1 + n_i / (Σ_{j>=i} ln e_j - n_i ln e_i)`, `D_i = max_{j>=i} |1 - (e_j / e_i)^(1 - alpha_i) - (j - i) / n_i|`.

    Args:
        eigs: `(N,)`, in any order.
        method: where the tail starts. `median`: `i = ⌊N / xmin_pos⌋`. `ks`: the smallest `D_i` among those with
            `alpha_i > 1` (the first of equal ones). `peak`: as `ks`, among eigenvalues near the fullest of `bins` bins of
            `log10 e`: between `log10(0.95 p)` and `1.5 p`, p being the bin's left edge. The first bound is a logarithm, as in
            the authors' program; with `p < 1` it admits everything below `1.5 p`.
        xmin_pos: for `median`; >= 2.
        bins: for `peak`; >= 1.
        eig_threshold: leave out smaller eigenvalues, unless none is left.

    Returns:
        PowerLawFit. If no start gives `D < 1`: alpha 0, distance 1, the whole spectrum.

    Raises:
        ValueError: fewer than 2 eigenvalues, negative or infinite ones, an option out of range; `median` over a tail that
            starts at 0 (set eig_threshold) or whose eigenvalues are all equal.

    Example:
        >>> import torch
        >>> from lowdim.diagnose import fit_alpha
        >>> quantiles = torch.arange(0.0005, 1, 0.001, dtype=torch.float64)
        >>> round(fit_alpha((1 - quantiles) ** -0.5).alpha, 1)  # a Pareto law with exponent 3
        3.0

    Eigenvalues of overlapping windows depend on each other, so the distance is not a test statistic with a p-value.
    Scaling the weights does not change `median` and `ks`; it does change `peak`.

    Source: Hu, Goel, Killiakov, Yang, arXiv 2506.06280; the estimator is that of Clauset, Shalizi and Newman, arXiv 0706.1062.
    """
    check_choice("method", method, METHODS)
    check_int("xmin_pos", xmin_pos, 2)
    check_int("bins", bins, 1)
    values = np.sort(_array(eigs))
    if eig_threshold is not None:
        check_float("eig_threshold", eig_threshold)
        kept = values[values >= eig_threshold]
        values = kept if len(kept) else values
    if len(values) < 2:
        raise ValueError(f"eigs must hold at least 2 eigenvalues; got {len(values)}")
    if not np.isfinite(values).all() or values[0] < 0:
        raise ValueError(f"eigs must be finite and not negative; they go from {values[0]:g} to {values[-1]:g}")
    if method == "median":
        return _at_median(values, xmin_pos)
    return _best(values, _candidates(values, bins if method == "peak" else None))


def _array(eigs: Any) -> np.ndarray:
    values = eigs.detach().cpu().double().numpy() if isinstance(eigs, Tensor) else np.asarray(eigs, dtype=np.float64)
    if values.ndim != 1:
        raise ValueError(f"eigs must be one list of eigenvalues; got shape {values.shape}")
    return values


def _at_median(values: np.ndarray, xmin_pos: int) -> PowerLawFit:
    i = int(len(values) / xmin_pos)
    if values[i] == 0:
        raise ValueError(f"the tail starts at an eigenvalue of 0 (place {i} of {len(values)}); set eig_threshold above 0")
    if values[i] == values[-1]:
        raise ValueError(f"the tail from place {i} of {len(values)} on holds equal eigenvalues, which have no exponent")
    alpha = float(_exponents(np.log(values[i:]))[0])
    return PowerLawFit(alpha, float(_distances(values, np.array([i]), np.array([alpha]))[0]), float(values[i]), len(values) - i)


def _exponents(logs: np.ndarray) -> np.ndarray:
    """`alpha_i` for every start i; infinite or NaN where there is none."""
    n = np.arange(len(logs), 0, -1)
    sums = np.cumsum(logs[::-1])[::-1]
    with np.errstate(divide="ignore", invalid="ignore"):
        return 1 + n / (sums - n * logs)


def _candidates(values: np.ndarray, bins: int | None) -> np.ndarray:
    """Where the tail may start: positive eigenvalues but the last, those near the fullest bin if `bins` is given."""
    allowed = (values > 0) & (np.arange(len(values)) < len(values) - 1)
    if bins is not None and values[-1] > 0:
        logs = np.log10(values[values > 0])
        counts, edges = np.histogram(logs, bins=bins)
        peak = 10 ** edges[int(counts.argmax())]
        allowed &= (values >= math.log10(0.95 * peak)) & (values <= 1.5 * peak)
    return np.flatnonzero(allowed)


def _best(values: np.ndarray, starts: np.ndarray) -> PowerLawFit:
    """The start of the smallest distance.

    A distance at a few points bounds the whole from below, so most starts need no more than these.
    """
    best, chosen, exponent = 1.0, 0, 0.0
    if len(starts):
        first = int(starts[0])
        alphas = _exponents(np.log(values[first:]))[starts - first]
        good = np.isfinite(alphas) & (alphas > 1)
        starts, alphas = starts[good], alphas[good]
        bounds = _distances(values, starts, alphas, coarse=True)
        order = np.argsort(bounds, kind="stable")
        for k in range(0, len(order), _ROWS):
            part = order[k : k + _ROWS]
            if bounds[part[0]] > best:
                break
            for start, alpha, found in zip(starts[part], alphas[part], _distances(values, starts[part], alphas[part])):
                if found < best or (found == best < 1 and start < chosen):
                    best, chosen, exponent = float(found), int(start), float(alpha)
    return PowerLawFit(exponent, best, float(values[chosen]), len(values) - chosen)


def _distances(values: np.ndarray, starts: np.ndarray, alphas: np.ndarray, *, coarse: bool = False) -> np.ndarray:
    """`D_i` of each start, or with `coarse` its value over a few points of the tail."""
    found = np.empty(len(starts))
    logs = np.log(np.maximum(values, np.finfo(np.float64).tiny))
    for k in range(0, len(starts), _ROWS):
        i, alpha = starts[k : k + _ROWS, None], alphas[k : k + _ROWS, None]
        n = len(values) - i
        if coarse:
            j = i + (np.linspace(0, 1, _COARSE)[None] * (n - 1)).astype(np.int64)
        else:
            j = np.arange(int(i.min()), len(values))[None]
        gaps = np.abs(1 - np.exp((1 - alpha) * np.maximum(logs[j] - logs[i], 0)) - (j - i) / n)
        found[k : k + _ROWS] = np.where(j >= i, gaps, 0).max(1)
    return found
