"""Soft clusters as doubly stochastic matrices, by Sinkhorn's iteration in the log domain."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lowdim.errors import check_choice, check_float, check_int
from lowdim.linalg import as_given, as_tensor, compute_dtype

__all__ = ["KERNELS", "membership", "sinkhorn_projection"]

KERNELS = ("abs", "inner")
#: Largest difference of scores whose exponentials keep their digits.
_SPREAD = {torch.float32: 30.0, torch.float64: 200.0}


def sinkhorn_projection(
    S: Any,  # (n, n)
    eta: float = 0.175,
    *,
    iterations: int = 5,
    tol: float | None = None,
) -> Any:
    """The doubly stochastic matrix nearest to an affinity, with entropy.

    Formula: `Γ = argmax ⟨S, Γ⟩ - η Σ Γ log Γ` over doubly stochastic Γ, which is `diag(e^u) exp(S/η) diag(e^v)`. From
    `u = v = 0` one iteration updates one of them: `u = -logsumexp_j(S_ij/η + v_j)` and `v = -logsumexp_i(S_ij/η + u_i)` in
    turn. After an odd number rows sum to 1 exactly, columns nearly.

    Args:
        S: affinities, numpy or torch; gradients flow through all iterations.
        eta: η > 0, the weight of the entropy.
        iterations: single updates, u first, at most.
        tol: stops after a u, from the second on, that moved by no more than this; None makes all iterations.

    Returns:
        Γ `(n, n)` in float32 or better, in the kind of S.

    Raises:
        ValueError: S not square, η <= 0, fewer than 1 iteration.

    Example:
        >>> import numpy as np
        >>> from lowdim.represent import sinkhorn_projection
        >>> gamma = sinkhorn_projection(np.array([[1.0, 0.0], [0.2, 1.0]]), eta=1.0, iterations=1000, tol=1e-12)
        >>> gamma.sum(axis=0).round(9), gamma.sum(axis=1).round(9)
        (array([1., 1.]), array([1., 1.]))

    Source: Ding et al., arXiv 2301.01805; Cuturi, "Sinkhorn Distances", NeurIPS 2013.
    """
    check_float("eta", eta, 0.0, low_open=True)
    check_int("iterations", iterations, 1)
    if tol is not None:
        check_float("tol", tol, 0.0)
    affinities = S if isinstance(S, Tensor) else as_tensor(S)
    if affinities.ndim != 2 or affinities.shape[0] != affinities.shape[1] or not len(affinities):
        raise ValueError(f"S must be a square matrix; got shape {tuple(affinities.shape)}")
    with torch.autocast(affinities.device.type, enabled=False):
        scores = affinities.to(compute_dtype(affinities.dtype)) / eta
        if not (scores.requires_grad and torch.is_grad_enabled()):
            spread = float(scores.detach().max() - scores.detach().min())
            if spread <= _SPREAD[scores.dtype]:
                gamma = _by_products(scores.detach(), iterations, tol)
                return gamma if isinstance(S, Tensor) else as_given(gamma, S)
        u = v = scores.new_zeros(len(scores))
        for i in range(iterations):
            if i % 2:
                v = -(scores + u[:, None]).logsumexp(0)
                continue
            last, u = u, -(scores + v).logsumexp(1)
            if i and tol is not None and float((u - last).detach().abs().max()) <= tol:
                break
        gamma = (scores + u[:, None] + v).exp()
    return gamma if isinstance(S, Tensor) else as_given(gamma, S)


def membership(
    C: Any,  # (n, d)
    eta: float = 0.175,
    *,
    kernel: str = "abs",
    iterations: int = 5,
    tol: float | None = None,
) -> Any:
    """Memberships of samples in each other's clusters, from cluster features.

    Formula: `sinkhorn_projection(S)` with `S = |C Cᵀ|` (`kernel="abs"`, so that opposite directions are one subspace) or `C Cᵀ`
    (`"inner"`).

    Args:
        C: cluster features, rows of length 1; numpy or torch.
        eta, iterations, tol: as in `sinkhorn_projection`.

    Returns:
        Γ `(n, n)` in float32 or better, in the kind of C.

    Raises:
        ValueError: C not 2-D, an unknown kernel, options out of range.

    Example:
        >>> import numpy as np
        >>> from lowdim.represent import membership
        >>> membership(np.array([[1.0, 0.0], [-1.0, 0.0], [0.0, 1.0]]), iterations=1).round(2)
        array([[0.5 , 0.5 , 0.  ],
               [0.5 , 0.5 , 0.  ],
               [0.  , 0.  , 0.99]])

    Source: Ding et al., arXiv 2301.01805; `"abs"` as in the same group's successor, CPP.
    """
    check_choice("kernel", kernel, KERNELS)
    features = C if isinstance(C, Tensor) else as_tensor(C)
    if features.ndim != 2:
        raise ValueError(f"C must be (n, d); got shape {tuple(features.shape)}")
    with torch.autocast(features.device.type, enabled=False):
        features = features.to(compute_dtype(features.dtype))
        S = features @ features.T
    gamma = sinkhorn_projection(S.abs() if kernel == "abs" else S, eta, iterations=iterations, tol=tol)
    return gamma if isinstance(C, Tensor) else as_given(gamma, C)


def _by_products(scores: Tensor, iterations: int, tol: float | None) -> Tensor:
    """The same updates of `e^u` and `e^v`, by products with the kernel: no exponential in an iteration, and no gradient."""
    kernel = (scores - scores.max()).exp()
    a = b = torch.ones_like(kernel[0])
    for i in range(iterations):
        if i % 2:
            b = 1 / (a @ kernel)
            continue
        last, a = a, 1 / (kernel @ b)
        if i and tol is not None and float((a.log() - last.log()).abs().max()) <= tol:
            break
    return kernel.mul_(a[:, None]).mul_(b)
