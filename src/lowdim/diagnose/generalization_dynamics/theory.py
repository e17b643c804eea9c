"""Test and training error of a linear student over training time, for many parameters and samples."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lowdim.errors import check_float, check_int
from lowdim.results import Result

__all__ = [
    "GeneralizationDynamics",
    "generalization_dynamics",
    "marchenko_pastur_edges",
    "optimal_stopping_time",
    "ridge_test_error",
]

_FROZEN = 1e-12  # of the largest eigenvalue: what is below does not move
_LONGEST = 1e15  # a stopping time beyond this is no time


@dataclass(frozen=True)
class GeneralizationDynamics(Result):
    """Errors over training time.

    Attributes:
        times: `t`, `(n,)` float64; gradient descent with rate `eta` has `t = eta · steps`.
        test_error: `(n,)`, with the noise of the test targets in it: the excess error is `test_error − noise_var`.
        train_error: `(n,)`.
        frozen_fraction: share of the weights that gradient descent never moves.
    """

    times: Tensor
    test_error: Tensor
    train_error: Tensor
    frozen_fraction: float

    @property
    def best_time(self) -> float:
        """The time among `times` with the smallest test error."""
        return float(self.times[int(self.test_error.argmin())])

    def rows(self) -> list[dict[str, Any]]:
        """A row for each time."""
        columns = zip(self.times.tolist(), self.test_error.tolist(), self.train_error.tolist())
        return [{"time": t, "test_error": test, "train_error": train} for t, test, train in columns]

    def plot(self, *, ax: Any = None) -> Any:
        """Both errors against time."""
        return plot_errors(self._axes(ax), self.times, {"test error": self.test_error, "training error": self.train_error})

    @property
    def summary(self) -> str:
        """One line."""
        best, last = float(self.test_error.min()), float(self.test_error[-1])
        return (
            f"test error {best:.4g} at time {self.best_time:.4g}, {last:.4g} at {float(self.times[-1]):.4g}; "
            f"{self.frozen_fraction:.0%} of the weights are frozen"
        )


def generalization_dynamics(
    alpha: float,
    snr: float,
    times: Any,  # (n,)
    *,
    inr: float = 0.0,
    noise_var: float = 1.0,
    eigenvalues: Any = None,  # (N,)
    nodes: int = 400,
) -> GeneralizationDynamics:
    """Errors of a linear network that learns a noisy linear teacher by gradient flow, in the limit of large networks.

    Formula: `P` samples, `N` weights, `alpha = P/N`; `dw/dt = Xᵀ(y − X w)`; `λ` are the eigenvalues of `XᵀX`, by
    Marchenko-Pastur; `d = exp(−λ t)`, `s = snr + inr`, `f = max(0, 1 − alpha)` the frozen fraction:
    `test = σ² (∫ρ [s d² + (1 − d)²/λ] + f s + 1)`, `train = σ² (∫ρ (λ s + 1) d² / alpha + max(0, 1 − min(1, alpha)/alpha))`.

    Args:
        alpha: samples over weights, > 0. Rows of `X` have entries of variance `1/N`; divide standardised data by `√N`.
        snr: variance of the teacher's weights over that of the noise, > 0.
        times: training times, >= 0; numpy, torch or a list.
        inr: variance of the initial weights over that of the noise (not of the signal), >= 0.
        noise_var: `σ²`, > 0.
        eigenvalues: measured ones, all `N` of them with the zeros, in place of Marchenko-Pastur's; those up to `1e-12` of the
            largest are frozen.
        nodes: of the quadrature, >= 1.

    Returns:
        A `GeneralizationDynamics`.

    Raises:
        ValueError: a value out of range, negative times.

    Example:
        >>> from lowdim.diagnose import generalization_dynamics
        >>> found = generalization_dynamics(1.0, 5.0, [0.0, 3.0, 150.0])  # as many samples as weights: over-training is worst
        >>> [round(error, 2) for error in found.test_error.tolist()]
        [6.0, 2.84, 8.77]

    Features of real networks are not isotropic: give their `eigenvalues` and take `snr` for a fit, or use `feature_dynamics`.

    Source: Advani, Saxe, Sompolinsky, "High-dimensional dynamics of generalization error in neural networks", Neural Networks
    132, 2020, arXiv 1710.03667.
    """
    _check(alpha, snr, inr, nodes)
    check_float("noise_var", noise_var, 0.0, low_open=True)
    moments = read_times(times)
    integrate, frozen = _measure(alpha, eigenvalues, nodes)
    s, t = snr + inr, moments[:, None]
    test = integrate(lambda l: s * torch.exp(-2 * l * t) + torch.expm1(-l * t) ** 2 / l) + frozen * s + 1.0
    left = max(0.0, 1.0 - min(1.0, alpha) / alpha) if eigenvalues is None else max(0.0, 1.0 - (1.0 - frozen) / alpha)
    train = integrate(lambda l: (l * s + 1.0) * torch.exp(-2 * l * t)) / alpha + left
    return GeneralizationDynamics(moments, noise_var * test, noise_var * train, frozen)


def optimal_stopping_time(alpha: float, snr: float, *, inr: float = 0.0, nodes: int = 400) -> float:
    """The training time with the smallest test error.

    Formula: the root of `∫ρ e^(−λt) (1 − e^(−λt) (1 + s λ)) = 0`; one mode alone stops at `ln(1 + s λ)/λ`.

    Args:
        alpha, snr, inr, nodes: as in `generalization_dynamics`.

    Raises:
        ValueError: a value out of range.

    Example:
        >>> from lowdim.diagnose import optimal_stopping_time
        >>> [round(optimal_stopping_time(4.0, snr), 2) for snr in (1.0, 10.0, 100.0)]  # about logarithmic
        [0.49, 1.84, 3.87]

    Without noise it would be infinite.

    Source: Advani, Saxe, Sompolinsky, arXiv 1710.03667.
    """
    _check(alpha, snr, inr, nodes)
    integrate, _ = _measure(alpha, None, nodes)
    s = snr + inr

    def slope(t: float) -> float:
        # scaled by e^(l− t), which has no sign, so that it does not vanish at long times
        low = marchenko_pastur_edges(alpha)[0]
        found = integrate(lambda l: torch.exp(-(l - low) * t) * (1.0 - torch.exp(-l * t) * (1.0 + s * l)))
        return float(found)

    low, high = 0.0, 1.0
    while slope(high) < 0.0 and high < _LONGEST:
        low, high = high, 2.0 * high
    for _ in range(200):
        middle = (low + high) / 2.0
        if not low < middle < high:
            break
        low, high = (middle, high) if slope(middle) < 0.0 else (low, middle)
    return (low + high) / 2.0


def ridge_test_error(alpha: float, snr: float, gamma: float, *, noise_var: float = 1.0, nodes: int = 400) -> float:
    """Test error of ridge regression, `w = (XᵀX + γ)⁻¹ Xᵀ y`, to compare early stopping with.

    Formula: `σ² (∫ρ (snr γ² + λ)/(λ + γ)² + f snr + 1)`; smallest at `γ = 1/snr`.

    Args:
        alpha, snr, noise_var, nodes: as in `generalization_dynamics`.
        gamma: the penalty, > 0.

    Raises:
        ValueError: a value out of range.

    Example:
        >>> from lowdim.diagnose import ridge_test_error
        >>> [round(ridge_test_error(1.0, 5.0, gamma), 2) for gamma in (0.02, 0.2, 2.0)]
        [4.41, 2.79, 3.96]

    Source: Advani, Saxe, Sompolinsky, arXiv 1710.03667.
    """
    _check(alpha, snr, 0.0, nodes)
    check_float("gamma", gamma, 0.0, low_open=True)
    check_float("noise_var", noise_var, 0.0, low_open=True)
    integrate, frozen = _measure(alpha, None, nodes)
    return noise_var * (float(integrate(lambda l: (snr * gamma**2 + l) / (l + gamma) ** 2)) + frozen * snr + 1.0)


def marchenko_pastur_edges(alpha: float) -> tuple[float, float]:
    """`(√alpha − 1)², (√alpha + 1)²`: between them lie the eigenvalues of `XᵀX` that are not zero."""
    root = math.sqrt(alpha)
    return (root - 1.0) ** 2, (root + 1.0) ** 2


def read_times(times: Any) -> Tensor:
    """Training times as float64.

    Raises:
        ValueError: not a vector of finite numbers >= 0.
    """
    found = as_float64(times).reshape(-1)
    if not len(found) or not bool(torch.isfinite(found).all()) or bool((found < 0).any()):
        raise ValueError(f"times must be finite numbers >= 0; got {found.tolist()[:5]}")
    return found


def as_float64(values: Any) -> Tensor:
    """Numbers of torch, numpy or a list, on the CPU."""
    if isinstance(values, Tensor):
        return values.detach().to("cpu", torch.float64)
    return torch.from_numpy(np.asarray(values, dtype=np.float64).copy())


def plot_errors(axes: Any, times: Tensor, curves: dict[str, Tensor]) -> Any:
    """Errors against time, both on a logarithmic scale."""
    for label, values in curves.items():
        axes.plot(times.tolist(), values.tolist(), marker=".", label=label)
    axes.set_xscale("symlog", linthresh=max(float(times[times > 0].min()) if bool((times > 0).any()) else 1.0, 1e-6))
    axes.set_yscale("log")
    axes.set_xlabel("training time")
    axes.set_ylabel("error")
    axes.legend()
    return axes


#: An integral over the eigenvalues that are not zero: integrand of `(k,)` eigenvalues -> its mean over all `N`.
_Integral = Callable[[Callable[[Tensor], Tensor]], Tensor]


def _measure(alpha: float, eigenvalues: Any, nodes: int) -> tuple[_Integral, float]:
    """The integral over the moving part of the spectrum, and the frozen fraction."""
    if eigenvalues is not None:
        found = as_float64(eigenvalues).reshape(-1)
        if not len(found) or not bool(torch.isfinite(found).all()):
            raise ValueError(f"eigenvalues must be finite numbers; got {found.tolist()[:5]}")
        moving = found[found > _FROZEN * found.max()]
        count = len(found)
        return lambda integrand: integrand(moving).sum(-1) / count, 1.0 - len(moving) / count
    low, high = marchenko_pastur_edges(alpha)
    points, weights = _gauss(nodes)
    u = (points + 1.0) * (math.pi / 4)  # λ = l− + (l+ − l−) sin² u takes the ends' square roots away
    sin2 = torch.sin(u) ** 2
    l = low + (high - low) * sin2
    density = weights * (math.pi / 4) * (high - low) ** 2 * sin2 * (1.0 - sin2) / (math.pi * l)
    return lambda integrand: (integrand(l) * density).sum(-1), max(0.0, 1.0 - alpha)


@functools.cache
def _gauss(nodes: int) -> tuple[Tensor, Tensor]:
    points, weights = np.polynomial.legendre.leggauss(nodes)
    return torch.from_numpy(points), torch.from_numpy(weights)


def _check(alpha: float, snr: float, inr: float, nodes: int) -> None:
    check_float("alpha", alpha, 0.0, low_open=True)
    check_float("snr", snr, 0.0, low_open=True)
    check_float("inr", inr, 0.0)
    check_int("nodes", nodes, 1)
