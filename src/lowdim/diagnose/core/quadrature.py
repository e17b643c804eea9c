"""Spectra of symmetric operators by stochastic Lanczos quadrature."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lowdim.linalg import as_operator, lanczos
from lowdim.results import Result

__all__ = ["Quadrature", "lanczos_quadrature"]


@dataclass(frozen=True)
class Quadrature(Result):
    """A spectrum as a few weighted points.

    Attributes:
        nodes: `(m,)` float64, ascending. The outermost approximate the extreme eigenvalues, from within.
        weights: `(m,)`, they sum to 1.
        bounds: `(m,)`: an eigenvalue of the operator lies within `bounds[j]` of `nodes[j]`.
    """

    nodes: Tensor
    weights: Tensor
    bounds: Tensor

    def rows(self) -> list[dict[str, Any]]:
        """A row for each node."""
        columns = zip(self.nodes.tolist(), self.weights.tolist(), self.bounds.tolist())
        return [{"node": node, "weight": weight, "bound": bound} for node, weight, bound in columns]

    def plot(self, *, ax: Any = None) -> Any:
        """Weights over nodes."""
        return plot_spectrum(self._axes(ax), self.nodes, self.weights, self.bounds)

    @property
    def summary(self) -> str:
        """One line: the extremes with their bounds."""
        return (
            f"{len(self.nodes)} nodes from {self.nodes[0]:.4g} ± {self.bounds[0]:.1g} "
            f"to {self.nodes[-1]:.4g} ± {self.bounds[-1]:.1g}"
        )


def lanczos_quadrature(
    operator: Any,
    probe: Tensor,  # (n,)
    *,
    steps: int = 20,
) -> Quadrature:
    """The spectrum of a symmetric operator as a vector sees it, from a few products.

    Formula: `m` Lanczos steps from `v` give a tridiagonal `T = Y diag(nodes) Yᵀ`, `weights_j = Y[0, j]²`; then
    `Σ_j weights_j nodes_j^k = vᵀ Hᵏ v / vᵀ v` for `k <= 2 m − 1`. With `β` the next off-diagonal entry,
    `bounds_j = β |Y[m − 1, j]|`.

    Args:
        operator: whatever `lowdim.linalg.as_operator` accepts: a matrix, a function, operators of scipy and curvlinops.
        probe: `v (n,)`. The mean over random probes with independent entries estimates the spectral density.
        steps: products at most, >= 1; fewer where the Krylov space is complete.

    Raises:
        ValueError: steps below 1, a probe of another length than the operator, zero or not finite.

    Example:
        >>> import torch
        >>> from lowdim.diagnose import lanczos_quadrature
        >>> found = lanczos_quadrature(torch.diag(torch.tensor([1.0, 2.0, 5.0])), torch.ones(3))
        >>> [round(x, 4) for x in found.nodes.tolist()], [round(w, 4) for w in found.weights.tolist()]
        ([1.0, 2.0, 5.0], [0.3333, 0.3333, 0.3333])

    Without full re-orthogonalisation, as in many programs, float32 gives copies of the largest eigenvalues: their positions are
    right and their weights are not. For eigenvectors, or many eigenvalues at one end, use scipy's `eigsh` with
    `as_operator(…).as_linear_operator()`.

    Source: Golub, Welsch, "Calculation of Gauss quadrature rules", 1969; for neural networks Granziol, Zohren, Roberts,
    arXiv 2006.09092.
    """
    probe = torch.as_tensor(probe)
    if probe.ndim != 1:
        raise ValueError(f"probe must be a vector; got shape {tuple(probe.shape)}")
    found = lanczos(as_operator(operator, len(probe) if not hasattr(operator, "shape") else None), probe, steps)
    nodes, vectors = found.eigh()
    return Quadrature(nodes, vectors[0].square(), found.residual * vectors[-1].abs())


def plot_spectrum(axes: Any, nodes: Tensor, weights: Tensor, bounds: Tensor) -> Any:
    """Weights over nodes, with the nodes' bounds, on these axes."""
    axes.vlines(nodes.tolist(), 0.0, weights.tolist(), color="C0")
    axes.errorbar(nodes.tolist(), weights.tolist(), xerr=bounds.tolist(), fmt="o", color="C0", markersize=3)
    axes.set_xlabel("eigenvalue")
    axes.set_ylabel("weight")
    axes.set_yscale("log")
    axes.set_ylim(bottom=max(1e-8, float(weights.min()) / 2))
    return axes
